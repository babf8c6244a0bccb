"""Voice networks: the study's 1D CNN, an inception network on spectrograms, and Distill-MOS."""

from functools import partial

import keras
import numpy as np
from keras import layers, ops

from ..blocks import VOICE_OUTPUTS, concat, leaky_dense, normalize, projected_side, registered


# --- the study's network ------------------------------------------------------------------------------------
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


def voice_cnn(as_run: bool = False, normalization: str = "batch") -> keras.Model:
    """The study's 1D network for a voice (its figure 4): 30,000 samples at 8 kHz.

    (30000, 1) samples -> embedding (32), side1 to side3 (128 each): global maxima of c1, c2 and c3, each
    through a dense layer. 5,584,440 parameters as drawn. When the study ran it (``as_run``), c3 read c2
    instead of the second stage, and the embedding read the pooled features instead of the dense 512 with its
    dropout. Both parts were unused, which left 4,598,264 parameters.

    A head on the embedding alone does not train the three dense layers of the sides.
    """
    samples = keras.Input((30000, 1), name="samples")

    def conv(x, filters, width, name=None, stride=1, padding="same"):
        x = layers.Conv1D(filters, width, stride, padding)(x)
        return layers.ReLU(name=name)(normalize(x, normalization))

    def stage(name, c, filters):
        n1 = concat(c, conv(c, filters, 10), name=f"{name}_n1")
        n2 = concat(c, n1, conv(n1, filters, 5), name=f"{name}_n2")
        m = conv(n2, filters, 2)
        n3 = concat(n1, n2, m, c, name=f"{name}_n3")
        return concat(c, n1, n2, m, conv(n3, filters, 1), name=f"{name}_n4")

    def first_stage(c, filters):
        n1 = concat(c, conv(c, filters, 20), name="stage1_n1")
        n2 = concat(c, n1, conv(n1, filters, 10), name="stage1_n2")
        n3 = concat(n1, n2, conv(n2, filters, 5), c, name="stage1_n3")
        return concat(n1, n2, n3, conv(n3, filters, 1), c, name="stage1_n4")

    pooled = [
        layers.MaxPooling1D(10, 1, "same")(samples),
        layers.AveragePooling1D(10, 1, "same")(samples),
        MinPooling1D(10)(samples),
    ]
    stem = concat(*(conv(x, 4, 1) for x in pooled), conv(samples, 64, 1), samples, name="stem")
    c1 = conv(stem, 128, 50, "c1", stride=10, padding="valid")
    c2 = conv(first_stage(c1, 4), 64, 30, "c2", stride=2, padding="valid")
    c3 = conv(c2 if as_run else stage("stage2", c2, 16), 128, 20, "c3", stride=2, padding="valid")
    c4 = conv(stage("stage3", c3, 32), 256, 10, "c4", padding="valid")
    x = concat(layers.GlobalMaxPooling1D()(c4), layers.GlobalAveragePooling1D()(c4))
    if not as_run:
        x = layers.Dropout(0.8)(layers.Dense(512, activation="relu")(x))
    outputs = {"embedding": leaky_dense(x, VOICE_OUTPUTS["embedding"], "embedding")}
    for name, c in {"side1": c1, "side2": c2, "side3": c3}.items():
        outputs[name] = projected_side(
            layers.GlobalMaxPooling1D()(c), VOICE_OUTPUTS[name], name, normalization
        )
    return keras.Model(samples, outputs, name="voice_cnn")


# --- spectrogram and quality networks -----------------------------------------------------------------------
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

    def __init__(
        self,
        kind: str = "mel",
        bands: int = 80,
        sample_rate: int = 16000,
        fft_length: int = 512,
        hop: int = 160,
        standardize: str = "band",
        floor: float = 1e-6,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # half precision would ruin the samples
        if kind not in ("mel", "linear", "lfcc"):
            raise ValueError(f"kind: found {kind!r}, expected 'mel', 'linear' or 'lfcc'")
        if standardize not in ("band", "clip", "none"):
            raise ValueError(f"standardize: found {standardize!r}, expected 'band', 'clip' or 'none'")
        self.settings = {
            "kind": kind,
            "bands": fft_length // 2 + 1 if kind == "linear" else bands,
            "sample_rate": sample_rate,
            "fft_length": fft_length,
            "hop": hop,
            "standardize": standardize,
            "floor": floor,
        }
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


def voice_inception(
    kinds: tuple[str, ...] = ("mel", "lfcc"),
    samples: int = 64600,
    width: int = 32,
    normalization: str = "batch",
    dropout: float = 0.5,
    standardize: str = "band",
    floor: float = 1e-6,
    attentive: bool = False,
) -> keras.Model:
    """A small inception network on spectrograms of a voice at 16 kHz, with the outputs of :func:`voice_cnn`.

    Each of ``kinds`` (of :class:`LogSpectrogram`) has its own tower: a 5 x 5 convolution (with a stride of
    two bands if there are over 128), then three stages of two inception blocks with 2, 4 and 8 times
    ``width`` channels. The side outputs are global maxima of the stages through a dense layer. The embedding
    reads them and the pooled last stage; its head therefore trains all of them.

    Args:
        attentive: add the band position as a channel, and also pool attention-weighted mean and deviation
            over time (Okabe et al. 2018).
    """
    waveform = keras.Input((samples,), name="samples")
    pooled, stages = [], {"side1": [], "side2": [], "side3": []}
    for kind in kinds:
        x = SpecAugment()(
            LogSpectrogram(kind, standardize=standardize, floor=floor, name=f"log_{kind}")(waveform)
        )
        x = BandPosition()(x) if attentive else x
        x = _normalized_conv(x, width, 5, normalization, strides=(1, 2) if x.shape[2] > 128 else 1)
        for number, name in enumerate(stages):
            x = layers.MaxPooling2D(2, padding="same")(x)
            for _ in range(2):
                x = spectrogram_block(x, width * 2 ** (number + 1), normalization)
            stages[name].append(layers.GlobalMaxPooling2D()(x))
        pooled.append(layers.GlobalAveragePooling2D()(x))
        if attentive:
            pooled.append(_attentive_statistics(x))
    sides = {
        name: projected_side(_join(parts), VOICE_OUTPUTS[name], name, normalization)
        for name, parts in stages.items()
    }
    x = layers.Dropout(dropout)(concat(*pooled, *sides.values()))
    outputs = {"embedding": leaky_dense(x, VOICE_OUTPUTS["embedding"], "embedding"), **sides}
    return keras.Model(waveform, outputs, name="voice_inception")


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


def voice_quality(samples: int = 64600, heard: int = 48000) -> keras.Model:
    """The convolutions of Distill-MOS (Stahl and Gamper 2025), an estimator of speech quality.

    Its weights (MIT, package distillmos 0.9.1: ``cnn.cnn.0`` to ``cnn.cnn.10``) were distilled from an
    estimator on wav2vec 2.0 XLS-R and stay frozen. The output ``embedding`` is the mean and deviation of the
    last feature maps over time. The network reads the middle ``heard`` samples.
    """
    waveform = keras.Input((samples,), name="samples")
    edge = (samples - heard) // 2
    x = layers.Cropping1D((edge, samples - heard - edge))(layers.Reshape((samples, 1))(waveform))
    x = CompressedSpectrum()(layers.Reshape((heard,))(x))
    for number, filters in enumerate((64, 64, 128, 256, 256, 256)):
        x = layers.ZeroPadding2D((0, 1))(x)
        x = layers.Conv2D(filters, 3, (2 if number else 1, 2 if number == 5 else 1), name=f"conv{number}")(x)
        x = layers.LeakyReLU(negative_slope=0.1)(x)
    return keras.Model(waveform, {"embedding": MeanAndDeviation(name="embedding")(x)}, name="voice_quality")


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


def _attentive_statistics(x):
    """Sum (n, time, bands, channels) over bands with learned weights, then pool statistics over time."""
    x = layers.DepthwiseConv2D((1, x.shape[2]), use_bias=False)(x)
    x = layers.ReLU()(normalize(layers.Reshape((x.shape[1], x.shape[3]))(x), "batch"))
    return Statistics()(x, layers.Dense(x.shape[2])(layers.Dense(64, activation="tanh")(x)))


def _join(parts):
    return concat(*parts) if len(parts) > 1 else parts[0]


def _normalized_conv(x, filters: int, size: int, normalization: str, strides=1):
    x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(normalize(x, normalization))


def spectrogram_block(x, filters: int, normalization: str):
    """Four branches of ``filters / 4``: 1 x 1; 3 x 3; two 3 x 3; 3 x 3 maximum (Szegedy et al. 2016)."""
    conv = partial(_normalized_conv, filters=filters // 4, normalization=normalization)
    three, five = conv(x, size=1), conv(x, size=1)
    return concat(
        conv(x, size=1),
        conv(three, size=3),
        conv(conv(five, size=3), size=3),
        conv(layers.MaxPooling2D(3, 1, "same")(x), size=1),
    )
