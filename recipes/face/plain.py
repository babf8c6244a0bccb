"""Run a saved Keras network in plain PyTorch: bfloat16 convolutions, batch normalisation folded and frozen.

On a CPU with AMX this trains faster than Keras on PyTorch: no batch statistics, one layout, few casts.
Needs torch and Keras on its PyTorch backend (``KERAS_BACKEND=torch``).
"""

import keras
import numpy as np
import torch
from torch import nn
from torch.nn import functional

CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)  # the first includes the second


def _tensor(variable) -> torch.Tensor:
    return torch.from_numpy(np.array(keras.ops.convert_to_numpy(variable), "float32"))


def _scale_and_shift(layer: keras.layers.BatchNormalization) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer does at inference: its scale and shift of each channel."""
    scale = 1 / torch.sqrt(_tensor(layer.moving_variance) + layer.epsilon)
    scale = scale * _tensor(layer.gamma) if layer.scale else scale
    shift = -_tensor(layer.moving_mean) * scale
    return scale, shift + _tensor(layer.beta) if layer.center else shift


class PlainNetwork(nn.Module):
    """The "logit" of a functional Keras network, float32 (N, 1), of pixels 0–255 float32 (N, H, W, 3).

    ``weights`` holds a float32 parameter for each kernel and bias; :meth:`write_back` puts them into the
    network.

    Raises:
        ValueError: the network has a layer that this module does not know.
    """

    def __init__(self, network: keras.Model, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        nodes = [
            node
            for depth in sorted(network._nodes_by_depth, reverse=True)
            for node in network._nodes_by_depth[depth]
        ]
        users: dict[int, list] = {}
        for node in nodes:
            for tensor in node.input_tensors:
                users.setdefault(id(tensor), []).append(node.operation)
        self.dtype, self.weights, self.statistics = dtype, nn.ParameterDict(), {}
        self.folded: dict[str, keras.layers.BatchNormalization] = {}
        self.pixels, self.logit = id(network.inputs[0]), id(network.output["logit"])
        self.nodes = [
            (node.operation, [id(x) for x in node.input_tensors], id(node.output_tensors[0]))
            for node in nodes
            if not node.is_input
        ]
        for layer, _, output in self.nodes:
            following = users.get(output, [])
            self._add(layer, following[0] if len(following) == 1 else None)

    def _add(self, layer: keras.layers.Layer, following) -> None:
        name = layer.name
        if isinstance(layer, CONVOLUTIONS):
            axes = (2, 3, 0, 1) if isinstance(layer, keras.layers.DepthwiseConv2D) else (3, 2, 0, 1)
            kernel, bias = (
                _tensor(layer.kernel).permute(axes),
                _tensor(layer.bias) if layer.use_bias else None,
            )
            if isinstance(following, keras.layers.BatchNormalization) and bias is None:
                self.folded[name] = following
                scale, bias = _scale_and_shift(following)
                kernel = kernel * scale[:, None, None, None]
            self.weights[f"{name}_kernel"] = nn.Parameter(
                kernel.contiguous(memory_format=torch.channels_last)
            )
            if bias is not None:
                self.weights[f"{name}_bias"] = nn.Parameter(bias)
        elif isinstance(layer, keras.layers.Dense):
            self.weights[f"{name}_kernel"] = nn.Parameter(_tensor(layer.kernel).T.contiguous())
            self.weights[f"{name}_bias"] = nn.Parameter(_tensor(layer.bias))
        elif type(layer).__name__ == "GridStatistics":
            self.statistics[name] = _tensor(layer.scale), _tensor(layer.shift)

    def freeze_before(self, name: str) -> None:
        """Freeze all convolutions that run before the layer ``name``."""
        names = [layer.name for layer, _, _ in self.nodes]
        for earlier in names[: names.index(name)]:
            for part in ("kernel", "bias"):
                if f"{earlier}_{part}" in self.weights:
                    self.weights[f"{earlier}_{part}"].requires_grad_(False)

    def write_back(self) -> None:
        """Put the weights into the Keras network: kernels without the folded scale, biases into ``beta``."""
        for layer, _, _ in self.nodes:
            if f"{layer.name}_kernel" not in self.weights:
                continue
            kernel = self.weights[f"{layer.name}_kernel"].detach()
            bias = (
                self.weights[f"{layer.name}_bias"].detach() if f"{layer.name}_bias" in self.weights else None
            )
            if isinstance(layer, keras.layers.Dense):
                layer.set_weights([kernel.T.numpy(), bias.numpy()])
                continue
            if layer.name in self.folded:
                norm = self.folded[layer.name]
                scale, shift = _scale_and_shift(norm)
                kernel = kernel / scale[:, None, None, None]
                norm.beta.assign((_tensor(norm.beta) + bias - shift).numpy())
            elif bias is not None:
                layer.bias.assign(bias.numpy())
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            layer.kernel.assign(kernel.permute((2, 3, 0, 1) if depthwise else (2, 3, 1, 0)).numpy())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = {self.pixels: pixels.permute(0, 3, 1, 2)}
        for layer, inputs, output in self.nodes:
            values[output] = self._apply(layer, [values[key] for key in inputs])
        return values[self.logit]

    def _apply(self, layer: keras.layers.Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
        x, kind = inputs[0], type(layer).__name__
        if isinstance(layer, CONVOLUTIONS):
            return self._convolve(layer, x)
        if kind == "BatchNormalization":
            if layer in self.folded.values():
                return x
        elif kind in ("Activation", "ReLU", "LeakyReLU"):
            return self._activate(layer, x)
        elif kind == "MaxPooling2D":
            if layer.padding == "same":
                x = _padded(x, layer.pool_size, layer.strides, float("-inf"))
            return functional.max_pool2d(x, layer.pool_size, layer.strides)
        elif kind == "AveragePooling2D" and layer.padding == "same" and tuple(layer.strides) == (1, 1):
            return functional.avg_pool2d(
                x, layer.pool_size, 1, layer.pool_size[0] // 2, count_include_pad=False
            )
        elif kind == "Concatenate":
            return torch.cat(inputs, 1)
        elif kind == "Add":
            return sum(inputs[1:], x)
        elif kind == "GlobalMaxPooling2D":
            return x.float().amax((2, 3))
        elif kind == "GlobalAveragePooling2D":
            return x.float().mean((2, 3))
        elif kind == "Dense":
            kernel, bias = (self.weights[f"{layer.name}_{part}"] for part in ("kernel", "bias"))
            return self._activate(layer, functional.linear(x.float(), kernel, bias))
        elif kind == "Dropout":
            return functional.dropout(x, layer.rate, self.training)
        elif kind == "Resizing":
            if tuple(x.shape[2:]) != (layer.height, layer.width):
                size = (layer.height, layer.width)
                x = functional.interpolate(x.float(), size, mode="bilinear", antialias=True)
            return x.contiguous(memory_format=torch.channels_last)
        elif kind in ("Rescaling", "Normalization"):
            rescaling = kind == "Rescaling"
            first, second = (
                (layer.scale, layer.offset) if rescaling else (layer.input_mean, layer.input_variance)
            )
            first, second = (
                torch.tensor(np.asarray(y, "float32")).view(1, -1, 1, 1) for y in (first, second)
            )
            return x * first + second if rescaling else (x - first) / second.sqrt()
        elif kind == "GridStatistics":
            x = x.float()
            mean = x.mean((2, 3))
            deviation = torch.sqrt((x - mean[:, :, None, None]).square().mean((2, 3)) + 1e-6)
            scale, shift = self.statistics[layer.name]
            return torch.clamp(torch.cat([mean, deviation], 1) * scale - shift, -layer.limit, layer.limit)
        raise ValueError(f"expected a layer of a face network, found {kind} {layer.name}")

    def _convolve(self, layer: keras.layers.Layer, x: torch.Tensor) -> torch.Tensor:
        kernel, name = self.weights[f"{layer.name}_kernel"].to(self.dtype), f"{layer.name}_bias"
        bias = self.weights[name].to(self.dtype) if name in self.weights else None
        stride = (layer.strides,) * 2 if isinstance(layer.strides, int) else layer.strides
        if layer.padding == "same":
            x = _padded(x, layer.kernel_size, stride, 0.0)
        groups = x.shape[1] if isinstance(layer, keras.layers.DepthwiseConv2D) else 1
        return self._activate(layer, functional.conv2d(x.to(self.dtype), kernel, bias, stride, groups=groups))

    @staticmethod
    def _activate(layer: keras.layers.Layer, x: torch.Tensor) -> torch.Tensor:
        kind = type(layer).__name__
        if kind == "LeakyReLU":
            return functional.leaky_relu(x, layer.negative_slope)
        name = ("relu6" if layer.max_value == 6 else "relu") if kind == "ReLU" else layer.activation.__name__
        if name not in ("relu", "relu6", "linear"):
            raise ValueError(f"expected relu, relu6 or linear, found {name} in {layer.name}")
        return x if name == "linear" else getattr(functional, name)(x)


def _padded(x: torch.Tensor, size: tuple[int, int], stride: tuple[int, int], value: float) -> torch.Tensor:
    """Pad as Keras' "same" does: the odd pixel goes to the right and below."""
    pads: list[int] = []
    for length, side, step in zip(x.shape[:1:-1], size[::-1], stride[::-1], strict=True):
        total = max((-(-length // step) - 1) * step + side - length, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value) if any(pads) else x
