"""Layers shared by several networks, and the names and widths of every branch's outputs."""

import math
from functools import partial

import keras
from keras import layers, ops

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


@registered
class GridStatistics(layers.Layer):
    """Mean and deviation over a grid (n, h, w, c), standardised and clipped to ±``limit``: (n, 2c).

    ``scale`` and ``shift`` (2c) are set, not trained: what a channel is on the crops a head is fitted on.
    """

    def __init__(self, limit: float = 5.0, **kwargs):
        super().__init__(**kwargs)
        self.limit = limit

    def build(self, shape):
        width = (2 * shape[-1],)
        self.scale = self.add_weight(name="scale", shape=width, initializer="ones", trainable=False)
        self.shift = self.add_weight(name="shift", shape=width, initializer="zeros", trainable=False)

    def call(self, x):
        mean = ops.mean(x, axis=(1, 2))
        deviation = ops.sqrt(ops.mean(ops.square(x - mean[:, None, None]), axis=(1, 2)) + 1e-6)
        found = ops.concatenate([mean, deviation], axis=-1)
        return ops.clip(found * self.scale - self.shift, -self.limit, self.limit)

    def compute_output_shape(self, shape):
        return (shape[0], 2 * shape[-1])

    def get_config(self):
        return {**super().get_config(), "limit": self.limit}


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
