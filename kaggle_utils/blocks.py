"""Layers shared by several networks, and the names and widths of every branch's outputs."""

import math
from functools import partial

import keras
from keras import layers

FRAMES = 10
FACE_OUTPUTS = {"embedding": 64, "side1": 128, "side2": 88, "side3": 64}
VOICE_OUTPUTS = {"embedding": 32, "side1": 128, "side2": 128, "side3": 128}
registered = keras.saving.register_keras_serializable("kaggle_utils")


# --- pieces -------------------------------------------------------------------------------------------------
def normalize(x, kind: str):
    """BatchNorm, GroupNorm (Wu & He 2018; eight groups, or one if each would hold one channel) or none."""
    channels = x.shape[-1]
    if kind == "batch":
        return layers.BatchNormalization()(x)
    if kind == "group":
        return layers.GroupNormalization(math.gcd(channels, 8) if channels > 8 else 1)(x)
    if kind == "none":
        return x
    raise ValueError(f"normalization: found {kind!r}, expected 'batch', 'group' or 'none'")


def concat(*parts, name: str | None = None):
    return layers.Concatenate(name=name)(list(parts))


def conv2d(x, filters: int, size: int, dilation: int = 1, gated: bool = False):
    """ReLU convolution; gated: a convolution times the sigmoid of another (Dauphin et al. 2017)."""
    conv = partial(layers.Conv2D, filters, size, padding="same", dilation_rate=dilation)
    if gated:
        return layers.Multiply()([conv()(x), conv(activation="sigmoid")(x)])
    return conv(activation="relu")(x)


def leaky_dense(x, units: int, name: str):
    return layers.LeakyReLU(negative_slope=0.1, name=name)(layers.Dense(units)(x))


def projected_side(x, units: int, name: str, normalization: str):
    return layers.ReLU(name=name)(normalize(layers.Dense(units)(x), normalization))


def with_head(branch: keras.Model) -> keras.Model:
    """The same network (shared weights) with one more output, "logit" (1): a dense 1 on the embedding."""
    outputs = dict(branch.output)
    outputs["logit"] = layers.Dense(1, name="logit")(outputs["embedding"])
    return keras.Model(branch.input, outputs, name=branch.name)
