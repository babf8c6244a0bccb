"""Layers of the voice networks; a saved network needs them to load."""

import keras
import numpy as np
from keras import layers, ops

from ..blocks import registered


@registered
class MinPooling1D(layers.Layer):
    """Minimum pooling with a stride of one: (n, time, channels) -> the same shape."""

    def __init__(self, pool_size: int, **kwargs):
        super().__init__(**kwargs)
        self.pool_size = pool_size

    def call(self, x):
        return -ops.max_pool(-x, self.pool_size, strides=1, padding="same", data_format="channels_last")

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "pool_size": self.pool_size}


@registered
class LogSpectrogram(layers.Layer):
    """Samples (n, T) at ``sample_rate`` -> log spectrogram (n, frames, bands, 1), computed in float32.

    Hann windows of ``fft_length`` samples every ``hop``, centred, with mirrored edges: frames = 1 + T // hop.

    Args:
        kind: ``mel`` (triangles of height 1 on the HTK mel scale), ``linear`` (log power of every FFT bin:
            fft_length // 2 + 1 bands, ``bands`` is ignored) or ``lfcc`` (linear frequency cepstral
            coefficients: DCT-II of the log of ``bands`` linear triangles; Sahidullah et al. 2015).
        standardize: ``band`` (mean 0 and deviation 1 in each band over the clip, which removes level and
            microphone), ``clip`` (one mean and deviation for all bands) or ``none``.
        floor: added to the power before the log.
    """

    def __init__(self, kind: str = "mel", bands: int = 80, sample_rate: int = 16000, fft_length: int = 512,
                 hop: int = 160, standardize: str = "band", floor: float = 1e-6, **kwargs):
        super().__init__(autocast=False, **kwargs)  # half precision would ruin the samples
        if kind not in ("mel", "linear", "lfcc"):
            raise ValueError(f"kind: found {kind!r}, expected 'mel', 'linear' or 'lfcc'")
        if standardize not in ("band", "clip", "none"):
            raise ValueError(f"standardize: found {standardize!r}, expected 'band', 'clip' or 'none'")
        bins = fft_length // 2 + 1 if kind == "linear" else bands
        self.settings = {"kind": kind, "bands": bins, "sample_rate": sample_rate, "fft_length": fft_length,
                         "hop": hop, "standardize": standardize, "floor": floor}
        self.kind, self.fft_length, self.hop = kind, fft_length, hop
        if kind != "linear":
            self.filters = filter_bank(kind, bands, sample_rate, fft_length)

    def call(self, samples):
        samples = ops.cast(samples, "float32")
        real, imaginary = ops.stft(samples, self.fft_length, self.hop, self.fft_length)
        x = ops.square(real) + ops.square(imaginary)
        if self.kind != "linear":
            x = ops.matmul(x, self.filters)
        x = ops.log(x + self.settings["floor"])
        if self.kind == "lfcc":
            x = ops.matmul(x, _cosines(self.settings["bands"]))
        if self.settings["standardize"] != "none":
            axes = (1,) if self.settings["standardize"] == "band" else (1, 2)
            mean, variance = ops.moments(x, axes, keepdims=True)
            x = (x - mean) * ops.rsqrt(variance + 1e-5)
        return ops.cast(x[..., None], self.compute_dtype)

    def compute_output_shape(self, input_shape):
        frames = None if input_shape[1] is None else 1 + input_shape[1] // self.hop
        return (input_shape[0], frames, self.settings["bands"], 1)

    def get_config(self):
        return {**super().get_config(), **self.settings}


def filter_bank(kind: str, bands: int, sample_rate: int, fft_length: int) -> np.ndarray:
    """Overlapping triangles, evenly spaced in mel (HTK) or hertz: float32 (fft_length // 2 + 1, bands)."""
    top = sample_rate / 2
    if kind == "mel":
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + top / 700), bands + 2) / 2595) - 1)
    else:
        edges = np.linspace(0, top, bands + 2)
    frequency = np.linspace(0, top, fft_length // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((frequency - low) / (centre - low), (high - frequency) / (high - centre))
    return np.maximum(triangles, 0).astype("float32")


def _cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix (size, size) to multiply from the right."""
    step = np.arange(size)
    matrix = np.cos(np.pi * (step[:, None] + 0.5) * step / size) * np.sqrt(2 / size)
    matrix[:, 0] /= np.sqrt(2)
    return matrix.astype("float32")


@registered
class SpecAugment(layers.Layer):
    """In training, zeroes ``masks`` random spans of time and of bands (Park et al. 2019).

    A span covers at most the fraction ``time`` or ``bands`` (0..1) of its axis. No effect at inference.
    """

    def __init__(
        self, time: float = 0.15, bands: float = 0.15, masks: int = 2, seed: int | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        self.time, self.bands, self.masks = time, bands, masks
        self.random = keras.random.SeedGenerator(seed)

    def call(self, x, training=False):
        if not training:
            return x
        count, frames, bands = ops.shape(x)[:3]
        for _ in range(self.masks):
            x = x * ops.cast(self._kept(count, frames, self.time)[:, :, None, None], x.dtype)
            x = x * ops.cast(self._kept(count, bands, self.bands)[:, None, :, None], x.dtype)
        return x

    def _kept(self, count, length, widest):
        width = keras.random.uniform((count, 1), 0, widest, seed=self.random)
        start = keras.random.uniform((count, 1), seed=self.random) * (1 - width)
        place = (ops.arange(length, dtype="float32")[None] + 0.5) / length
        return ops.logical_or(place < start, place > start + width)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "time": self.time, "bands": self.bands, "masks": self.masks}


@registered
class CompressedSpectrum(layers.Layer):
    """Samples (n, T) -> complex spectrum with magnitudes to the power of 0.3: (n, bands, frames, 2).

    The input of Distill-MOS: samples scaled to a peak of 1, Hann windows of 320 samples every 160, edges
    mirrored by 80.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def call(self, samples):
        x = ops.cast(samples, "float32")
        x = x / (ops.max(ops.abs(x), axis=1, keepdims=True) + 1e-8)
        x = ops.pad(x, ((0, 0), (80, 80)), mode="reflect")
        real, imaginary = ops.stft(x, 320, 160, 320, center=False)
        magnitude = ops.maximum(ops.sqrt(ops.square(real) + ops.square(imaginary)), 1e-12)
        gain = magnitude**-0.7
        return ops.cast(
            ops.transpose(ops.stack([real * gain, imaginary * gain], -1), (0, 2, 1, 3)), self.compute_dtype
        )

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 161, input_shape[1] // 160, 2)


@registered
class MeanAndDeviation(layers.Layer):
    """Mean and deviation over time: (n, bands, time, channels) -> (n, 2 * bands * channels)."""

    def call(self, x):
        x = ops.cast(x, "float32")
        count = x.shape[2]
        mean = ops.mean(x, axis=2)
        variance = ops.sum(ops.square(x - mean[:, :, None]), axis=2) / (count - 1)
        both = ops.stack([mean, ops.sqrt(variance + 1e-12)], axis=1)
        return ops.reshape(both, (-1, 2 * x.shape[1] * x.shape[3]))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 2 * input_shape[1] * input_shape[3])


@registered
class BandPosition(layers.Layer):
    """Adds the position of each band, -1..1, as a channel: (n, time, bands, 1) -> (n, time, bands, 2)."""

    def call(self, x):
        place = ops.cast(np.linspace(-1, 1, x.shape[2])[None, None, :, None], x.dtype)
        return ops.concatenate([x, ops.broadcast_to(place, ops.shape(x))], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2 * input_shape[-1])


@registered
class Statistics(layers.Layer):
    """Weighted mean and deviation over time: (n, time, channels) twice -> (n, 2 * channels)."""

    def call(self, x, weight):
        x, weight = ops.cast(x, "float32"), ops.softmax(ops.cast(weight, "float32"), axis=1)
        mean = ops.sum(weight * x, axis=1)
        variance = ops.sum(weight * ops.square(x - mean[:, None]), axis=1)
        return ops.cast(ops.concatenate([mean, ops.sqrt(variance + 1e-5)], axis=-1), self.compute_dtype)

    def compute_output_shape(self, x_shape, weight_shape):
        return (x_shape[0], 2 * x_shape[-1])
