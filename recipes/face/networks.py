"""The study's face networks (Choo 2020), the baselines, and the networks that replace them.

Every branch maps one face crop or one voice to a dict of outputs: "embedding" and up to three intermediate
side outputs, "side1" to "side3". ``with_head`` adds a "logit", ``last_cnn`` fuses ten faces and a voice.
P(fake) = sigmoid(logit). Only ``keras`` and ``keras.ops`` are used: one file trains on JAX or PyTorch and
serves on TensorFlow. Pixels are RGB in 0..255 as float; samples are mono in -1..1.
"""

import re
from functools import partial
from pathlib import Path

import keras
import numpy as np
from keras import layers

from recipes.blocks import FACE_OUTPUTS, concat, conv2d, leaky_dense, normalize


# --- the face networks of the study -------------------------------------------------------------------------
def one_image_cnn(input_size: int = 256, normalization: str = "batch", attention: str | None = None,
                  block: str = "inception") -> keras.Model:
    """The study's network for one face crop (its figure 3), with the study's proposed improvements.

    (input_size, input_size, 3) pixels -> embedding (64), side1 (128), side2 (88), side3 (64): the sides are
    global maxima of the 1 x 1 convolution and of the second and third pooled stage. By default, 524,520
    parameters, as in the study.

    Args:
        normalization: "batch", "group" or "none".
        attention: None, "bam" or "time_series", after the second and third pooling.
        block: "inception"; "residual" (every stage adds its projected input, He et al. 2016); "gated" (every
            convolution, Dauphin et al. 2017); "dense" (each layer reads all earlier ones and the block's
            input, Huang et al. 2017, projected back to the width of the inception block).
    """
    blocks = {"inception": inception_block, "residual": inception_block,
              "gated": partial(inception_block, gated=True), "dense": _dense}
    if block not in blocks:
        raise ValueError(f"block: found {block!r}, expected one of {sorted(blocks)}")
    conv = partial(conv2d, gated=block == "gated")

    def stage(x, transform, pool: int, attention: str | None = None):
        y = transform(x)
        if block == "residual":
            y = layers.Add()([y, layers.Conv2D(y.shape[-1], 1)(x)])
        y = layers.MaxPooling2D(pool, padding="same")(normalize(y, normalization))
        return _attend(y, attention)

    pixels = keras.Input((input_size, input_size, 3), name="pixels")
    wide = conv(pixels, 128, 1)
    first = stage(pixels, lambda x: concat(wide, blocks[block](x, 4, 16, 16, 8)), 2)
    second = stage(first, lambda x: blocks[block](x, 8, 16, 16, 8), 2, attention)
    third = stage(second, lambda x: conv(x, 64, 5), 2, attention)
    fourth = stage(third, lambda x: conv(x, 64, 5), 4)
    x = layers.Dropout(0.5)(layers.Flatten()(fourth))
    outputs = {"embedding": leaky_dense(x, FACE_OUTPUTS["embedding"], "embedding")}
    for name, x in {"side1": wide, "side2": second, "side3": third}.items():
        outputs[name] = layers.GlobalMaxPooling2D(name=name)(x)
    return keras.Model(pixels, outputs, name="one_image_cnn")


def inception_block(x, a: int, b: int, c: int, d: int, gated: bool = False):
    """The study's densely chained inception block; a + (a + b) + (2a + b + c) + d channels."""
    conv = partial(conv2d, gated=gated)
    x1 = conv(x, a, 1)
    x2 = concat(x1, conv(conv(x, b, 1), b, 3))
    x3 = concat(x1, x2, conv(conv(x2, c, 1), c, 3, dilation=2))
    x4 = conv(conv(x3, d, 1), d, 3, dilation=3)
    return concat(x1, x2, x3, x4)


def _dense(x, a: int, b: int, c: int, d: int):
    """Dense block (Huang et al. 2017): four layers that each append 16 channels."""
    for _ in range(4):
        x = concat(x, conv2d(conv2d(x, 32, 1), 16, 3))
    return conv2d(x, 4 * a + 2 * b + c + d, 1)


def _attend(x, kind: str | None):
    """x + x times an attention map in 0..1 of the same shape; x itself if kind is None."""
    if kind is None:
        return x
    if kind not in ("bam", "time_series"):
        raise ValueError(f"attention: found {kind!r}, expected None, 'bam' or 'time_series'")
    attention = _bam(x) if kind == "bam" else _time_series_attention(x)
    return layers.Add()([x, layers.Multiply()([x, attention])])


def _bam(x, reduction: int = 16, dilation: int = 4):
    """Bottleneck attention module (Park et al. 2018): sigmoid of a channel map plus a spatial map."""
    channels = x.shape[-1]
    narrow = max(channels // reduction, 4)
    channel = layers.Dense(narrow, activation="relu")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    channel = layers.BatchNormalization()(layers.Dense(channels)(channel))
    spatial = conv2d(x, narrow, 1)
    for _ in range(2):
        spatial = conv2d(spatial, narrow, 3, dilation)
    spatial = layers.BatchNormalization()(layers.Conv2D(1, 1)(spatial))
    return layers.Activation("sigmoid")(layers.Add()([channel, spatial]))


def _time_series_attention(x):
    """The study's time-series attention in 2D: sigmoid of a channel branch × sigmoid of a spatial one.

    Channel branch: global average, two 1 x 1 convolutions; spatial branch: three 3 x 3 convolutions. SELU and
    GroupNorm follow each convolution, and both branches narrow to half the channels in between.
    """
    channels = x.shape[-1]

    def conv(y, filters, size):
        return normalize(layers.Conv2D(filters, size, padding="same", activation="selu")(y), "group")

    channel = layers.GlobalAveragePooling2D(keepdims=True)(x)
    channel = conv(conv(channel, channels // 2, 1), channels, 1)
    local = conv(conv(conv(x, channels // 2, 3), channels // 2, 3), channels, 3)
    return layers.Multiply()([layers.Activation("sigmoid")(channel), layers.Activation("sigmoid")(local)])

# The 5 × 5 filter of the spatial rich model (Fridrich and Kodovský 2012): a pixel minus its surroundings.
RESIDUAL_FILTER = np.array([
    [-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1],
], "float32") / 12


# --- face networks of others --------------------------------------------------------------------------------
def mesoinception4(input_size: int = 256) -> keras.Model:
    """MesoInception-4 (Afchar et al. 2018): (input_size, input_size, 3) pixels -> embedding (16).

    28,615 parameters with its head, at 256. The authors' published weights answer 1 for REAL.
    """

    def inception(x, a, b, c, d):
        branches = [conv2d(x, a, 1), conv2d(conv2d(x, b, 1), b, 3)]
        branches += [conv2d(conv2d(x, n, 1), n, 3, dilation) for n, dilation in ((c, 2), (d, 3))]
        return concat(*branches)

    def pool(x, size):
        return layers.MaxPooling2D(size, padding="same")(layers.BatchNormalization()(x))

    pixels = keras.Input((input_size, input_size, 3), name="pixels")
    x = layers.Rescaling(1 / 255)(pixels)
    x = pool(inception(x, 1, 4, 4, 2), 2)
    x = pool(inception(x, 2, 4, 4, 2), 2)
    x = pool(conv2d(x, 16, 5), 2)
    x = pool(conv2d(x, 16, 5), 4)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    x = layers.LeakyReLU(negative_slope=0.1)(layers.Dense(16)(x))
    return keras.Model(pixels, {"embedding": layers.Dropout(0.5, name="embedding")(x)}, name="mesoinception4")


def face_inception(input_size: int = 224, weights: str | None = None, dropout: float = 0.5,
                   high_pass: bool = False) -> keras.Model:
    """InceptionV3 (Szegedy et al. 2016) as a face branch: pixels -> the outputs of ``one_image_cnn``.

    Pictures (H, W, 3) of any size are resized inside to ``input_size``. The sides are global maxima of three
    intermediate grids (Keras' mixed2, mixed5 and mixed7) through a dense layer. The embedding reads them and
    the average of the last grid: a head on the embedding trains all of them.

    Args:
        weights: None (random, or for ``load_inception_weights``) or "imagenet", which downloads.
        high_pass: input four times each channel's residual (``RESIDUAL_FILTER``) about mid-grey, not colours.
    """
    pixels = keras.Input((None, None, 3), name="pixels")
    x = layers.Resizing(input_size, input_size, antialias=True, name="resize")(pixels)
    if high_pass:
        residual = layers.DepthwiseConv2D(5, padding="same", use_bias=False, trainable=False, name="residual")
        x = layers.Rescaling(4.0, 127.5)(residual(x))
        residual.set_weights([np.repeat(RESIDUAL_FILTER[:, :, None, None], 3, axis=2)])
    # Keras' ImageNet weights expect -1..1; those of load_inception_weights expect 0..1.
    x = layers.Rescaling(1 / 127.5, -1)(x) if weights == "imagenet" else layers.Rescaling(1 / 255)(x)
    backbone = keras.applications.InceptionV3(include_top=False, weights=weights, input_tensor=x)
    sides = {}
    for name, grid in {"side1": "mixed2", "side2": "mixed5", "side3": "mixed7"}.items():
        grid = layers.GlobalMaxPooling2D()(backbone.get_layer(grid).output)
        sides[name] = layers.Dense(FACE_OUTPUTS[name], activation="relu", name=name)(grid)
    x = concat(layers.GlobalAveragePooling2D()(backbone.output), *sides.values())
    x = layers.Dropout(dropout)(x)
    outputs = {"embedding": leaky_dense(x, FACE_OUTPUTS["embedding"], "embedding"), **sides}
    return keras.Model(pixels, outputs, name="face_inception")


def load_inception_weights(model: keras.Model, path: Path | str) -> None:
    """Fill the InceptionV3 inside ``model`` from an 8-bit file ``inception_v3_notop_uint8.npz``.

    The file holds arrays NAME, NAME:scale and NAME:min (value = q * scale + min) of conv2d_1 to conv2d_94 and
    batch_normalization_1 to _94, in Keras' order of layers. The moving variances are kept above 1e-4:
    quantisation may have set them to zero.

    Raises:
        ValueError: the layers differ.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    stored = {key: arrays[key] * arrays[f"{key}:scale"] + arrays[f"{key}:min"]
              for key in arrays if ":" not in key}
    for kind, prefix in ((layers.Conv2D, "conv2d"), (layers.BatchNormalization, "batch_normalization")):
        own = sorted((x for x in model.layers if type(x) is kind), key=lambda x: _number(x.name))
        names = sorted({key.split("/")[0] for key in stored if key.startswith(prefix)}, key=_number)
        if len(own) != len(names):
            raise ValueError(f"{path}: found {len(names)} layers {prefix}, the network has {len(own)}")
        for layer, name in zip(own, names, strict=True):
            for variable in layer.weights:
                value = stored[f"{name}/{variable.name}"].astype("float32")
                variable.assign(np.maximum(value, 1e-4) if variable.name == "moving_variance" else value)


def _number(name: str) -> int:
    digits = re.search(r"_(\d+)$", name)
    return int(digits[1]) if digits else 0


def between(start: list[np.ndarray], end: list[np.ndarray], share: float) -> list[np.ndarray]:
    """Weights ``share`` of the way from ``start`` to ``end``; over 1 goes beyond."""
    both = zip(start, end, strict=True)
    return [(first + share * (last - first)).astype(first.dtype) for first, last in both]
