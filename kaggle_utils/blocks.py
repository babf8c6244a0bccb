"""What every branch has in common: names and widths of its outputs; a layer that saved networks need."""

import keras
from keras import layers, ops

FRAMES = 10
FACE_OUTPUTS = {"embedding": 64, "side1": 128, "side2": 88, "side3": 64}
VOICE_OUTPUTS = {"embedding": 32, "side1": 128, "side2": 128, "side3": 128}
registered = keras.saving.register_keras_serializable("kaggle_utils")


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
