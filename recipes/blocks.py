"""Pieces that several networks share."""

import math
from functools import partial

import keras
from keras import layers

from kaggle_utils.blocks import FACE_OUTPUTS, FRAMES, VOICE_OUTPUTS, GridStatistics  # noqa: F401


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


def with_statistics(network: keras.Model, grids: tuple[str, ...]) -> keras.Model:
    """The same network (shared weights), its "logit" plus a dense 1 of :class:`GridStatistics` of some
    layers.

    Args:
        network: with a "logit". grids: names of layers that give (n, h, w, c).
    """
    grids = {f"statistics_{name}": network.get_layer(name).output for name in grids}
    found = concat(*(GridStatistics(name=name)(grid) for name, grid in grids.items()), name="statistics")
    correction = layers.Dense(1, name="correction")(found)
    logit = layers.Add(name="corrected_logit")([network.output["logit"], correction])
    return keras.Model(network.input, {**network.output, "logit": logit}, name=network.name)
