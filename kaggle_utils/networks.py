"""The networks: those of the study (Choo 2020), the baselines and the ones that replace them.

Every branch maps one face crop or one voice to a dict of outputs: "embedding" and up to three side outputs
"side1" to "side3" taken on the way. `with_head` adds a "logit", `last_cnn` fuses ten faces and a voice.
P(fake) = sigmoid(logit). Written in `keras` and `keras.ops` alone, so that one file trains on JAX or PyTorch
and serves on TensorFlow. Pixels are RGB in 0..255 as float; samples are mono in -1..1.
"""

import json
import math
import re
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

__all__ = [
    "LogSpectrogram",
    "MinPooling1D",
    "OverFrames",
    "SpecAugment",
    "averaged",
    "face_inception",
    "last_cnn",
    "load_branch",
    "load_inception_weights",
    "load_network",
    "mesoinception4",
    "one_image_cnn",
    "save_network",
    "voice_cnn",
    "voice_inception",
    "whole_network",
    "with_head",
]

FRAMES = 10
FACE_OUTPUTS = {"embedding": 64, "side1": 128, "side2": 88, "side3": 64}
VOICE_OUTPUTS = {"embedding": 32, "side1": 128, "side2": 128, "side3": 128}
registered = keras.saving.register_keras_serializable("kaggle_utils")


# --- pieces ------------------------------------------------------------------------------------------------


def _normalize(x, kind: str):
    """BatchNorm, GroupNorm (Wu & He 2018; eight groups, or one where a group would hold one channel) or none."""
    channels = x.shape[-1]
    if kind == "batch":
        return layers.BatchNormalization()(x)
    if kind == "group":
        return layers.GroupNormalization(math.gcd(channels, 8) if channels > 8 else 1)(x)
    if kind == "none":
        return x
    raise ValueError(f"normalization: found {kind!r}, expected 'batch', 'group' or 'none'")


def _concat(*parts, name: str | None = None):
    return layers.Concatenate(name=name)(list(parts))


def _conv2d(x, filters: int, size: int, dilation: int = 1, gated: bool = False):
    """ReLU convolution; gated: convolution times the sigmoid of another (Dauphin et al. 2017)."""
    conv = partial(layers.Conv2D, filters, size, padding="same", dilation_rate=dilation)
    if gated:
        return layers.Multiply()([conv()(x), conv(activation="sigmoid")(x)])
    return conv(activation="relu")(x)


def _leaky_dense(x, units: int, name: str):
    return layers.LeakyReLU(negative_slope=0.1, name=name)(layers.Dense(units)(x))


# --- the face networks of the study ------------------------------------------------------------------------


def one_image_cnn(
    input_size: int = 256, normalization: str = "batch", attention: str | None = None, block: str = "inception"
) -> keras.Model:
    """The study's network for one face crop (its figure 3), and the remedies that the study proposes.

    (input_size, input_size, 3) pixels -> embedding (64), side1 (128), side2 (88), side3 (64): the sides are
    global maxima of the 1 x 1 convolution and of the second and third pooled stage. 524,520 parameters
    as in the study, at the defaults.

    normalization: "batch", "group" or "none".
    attention: None, "bam" or "time_series", after the second and third pooling.
    block: "inception"; "residual" (every stage adds its projected input, He et al. 2016); "gated" (every
        convolution, Dauphin et al. 2017); "dense" (blocks in which each layer reads all before it and the
        block's input, Huang et al. 2017, brought back to the width of the inception block).
    """
    blocks = {"inception": _inception, "residual": _inception, "gated": partial(_inception, gated=True), "dense": _dense}
    if block not in blocks:
        raise ValueError(f"block: found {block!r}, expected one of {sorted(blocks)}")
    conv = partial(_conv2d, gated=block == "gated")

    def stage(x, transform, pool: int, attention: str | None = None):
        y = transform(x)
        if block == "residual":
            y = layers.Add()([y, layers.Conv2D(y.shape[-1], 1)(x)])
        y = layers.MaxPooling2D(pool, padding="same")(_normalize(y, normalization))
        return _attend(y, attention)

    pixels = keras.Input((input_size, input_size, 3), name="pixels")
    wide = conv(pixels, 128, 1)
    first = stage(pixels, lambda x: _concat(wide, blocks[block](x, 4, 16, 16, 8)), 2)
    second = stage(first, lambda x: blocks[block](x, 8, 16, 16, 8), 2, attention)
    third = stage(second, lambda x: conv(x, 64, 5), 2, attention)
    fourth = stage(third, lambda x: conv(x, 64, 5), 4)
    x = layers.Dropout(0.5)(layers.Flatten()(fourth))
    outputs = {"embedding": _leaky_dense(x, FACE_OUTPUTS["embedding"], "embedding")}
    for name, x in {"side1": wide, "side2": second, "side3": third}.items():
        outputs[name] = layers.GlobalMaxPooling2D(name=name)(x)
    return keras.Model(pixels, outputs, name="one_image_cnn")


def _inception(x, a: int, b: int, c: int, d: int, gated: bool = False):
    """The study's densely chained inception block; a + (a + b) + (2a + b + c) + d channels."""
    conv = partial(_conv2d, gated=gated)
    x1 = conv(x, a, 1)
    x2 = _concat(x1, conv(conv(x, b, 1), b, 3))
    x3 = _concat(x1, x2, conv(conv(x2, c, 1), c, 3, dilation=2))
    x4 = conv(conv(x3, d, 1), d, 3, dilation=3)
    return _concat(x1, x2, x3, x4)


def _dense(x, a: int, b: int, c: int, d: int):
    """Dense block (Huang et al. 2017): four layers that each add 16 channels to all before them."""
    for _ in range(4):
        x = _concat(x, _conv2d(_conv2d(x, 32, 1), 16, 3))
    return _conv2d(x, 4 * a + 2 * b + c + d, 1)


def _attend(x, kind: str | None):
    """x + x times an attention map in 0..1 of the shape of x; x itself when kind is None."""
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
    spatial = _conv2d(x, narrow, 1)
    for _ in range(2):
        spatial = _conv2d(spatial, narrow, 3, dilation)
    spatial = layers.BatchNormalization()(layers.Conv2D(1, 1)(spatial))
    return layers.Activation("sigmoid")(layers.Add()([channel, spatial]))


def _time_series_attention(x):
    """The study's time-series attention in 2D: sigmoid of a channel branch times sigmoid of a convolutional one.

    Channel branch: global average, two 1 x 1 convolutions; the other: three 3 x 3 convolutions. Each is
    followed by SELU and GroupNorm, and both narrow to half the channels in between.
    """
    channels = x.shape[-1]

    def conv(y, filters, size):
        return _normalize(layers.Conv2D(filters, size, padding="same", activation="selu")(y), "group")

    channel = layers.GlobalAveragePooling2D(keepdims=True)(x)
    channel = conv(conv(channel, channels // 2, 1), channels, 1)
    local = conv(conv(conv(x, channels // 2, 3), channels // 2, 3), channels, 3)
    return layers.Multiply()([layers.Activation("sigmoid")(channel), layers.Activation("sigmoid")(local)])


# --- the voice and fusion networks of the study ------------------------------------------------------------


@registered
class MinPooling1D(layers.Layer):
    """The smallest value under a window that moves by one step: (n, time, channels) -> the same shape."""

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
    through a dense layer. 5,584,440 parameters as drawn. When it ran (as_run) c3 read c2 in place of the
    second stage, and the embedding read the pooled features past the dense 512 and its dropout; both were
    dead, which left 4,598,264.

    A head on the embedding alone does not train the three dense layers of the sides.
    """
    samples = keras.Input((30000, 1), name="samples")

    def conv(x, filters, width, name=None, stride=1, padding="same"):
        x = layers.Conv1D(filters, width, stride, padding)(x)
        return layers.ReLU(name=name)(_normalize(x, normalization))

    def stage(name, c, filters):
        n1 = _concat(c, conv(c, filters, 10), name=f"{name}_n1")
        n2 = _concat(c, n1, conv(n1, filters, 5), name=f"{name}_n2")
        m = conv(n2, filters, 2)
        n3 = _concat(n1, n2, m, c, name=f"{name}_n3")
        return _concat(c, n1, n2, m, conv(n3, filters, 1), name=f"{name}_n4")

    def first_stage(c, filters):
        n1 = _concat(c, conv(c, filters, 20), name="stage1_n1")
        n2 = _concat(c, n1, conv(n1, filters, 10), name="stage1_n2")
        n3 = _concat(n1, n2, conv(n2, filters, 5), c, name="stage1_n3")
        return _concat(n1, n2, n3, conv(n3, filters, 1), c, name="stage1_n4")

    pooled = [
        layers.MaxPooling1D(10, 1, "same")(samples),
        layers.AveragePooling1D(10, 1, "same")(samples),
        MinPooling1D(10)(samples),
    ]
    stem = _concat(*(conv(x, 4, 1) for x in pooled), conv(samples, 64, 1), samples, name="stem")
    c1 = conv(stem, 128, 50, "c1", stride=10, padding="valid")
    c2 = conv(first_stage(c1, 4), 64, 30, "c2", stride=2, padding="valid")
    c3 = conv(c2 if as_run else stage("stage2", c2, 16), 128, 20, "c3", stride=2, padding="valid")
    c4 = conv(stage("stage3", c3, 32), 256, 10, "c4", padding="valid")
    x = _concat(layers.GlobalMaxPooling1D()(c4), layers.GlobalAveragePooling1D()(c4))
    if not as_run:
        x = layers.Dropout(0.8)(layers.Dense(512, activation="relu")(x))
    outputs = {"embedding": _leaky_dense(x, VOICE_OUTPUTS["embedding"], "embedding")}
    for name, c in {"side1": c1, "side2": c2, "side3": c3}.items():
        outputs[name] = _projected_side(layers.GlobalMaxPooling1D()(c), VOICE_OUTPUTS[name], name, normalization)
    return keras.Model(samples, outputs, name="voice_cnn")


def _projected_side(x, units: int, name: str, normalization: str):
    return layers.ReLU(name=name)(_normalize(layers.Dense(units)(x), normalization))


def last_cnn(as_run: bool = False, normalization: str = "batch") -> keras.Model:
    """The study's fusion (its figure 5): the outputs of ten faces and a voice -> logit (1).

    Inputs, by name: face_embedding (10, 64), face_side1 (10, 128), face_side2 (10, 88), face_side3 (10, 64),
    voice_embedding (32), voice_side1 to voice_side3 (128); face_mask (10,) and voice_mask (1,) hold 1 where
    there is a face or a voice and 0 where not: what is masked enters as zeros. The masks, which the study
    lacked, add no parameter.

    726,657 parameters as drawn. When it ran (as_run) the side outputs of the first seven images alone were
    read, and a dense 128 with BatchNorm was left unconnected, which no Keras model counts: 383,393.
    """
    face = {key: keras.Input((FRAMES, units), name=f"face_{key}") for key, units in FACE_OUTPUTS.items()}
    voice = {key: keras.Input((units,), name=f"voice_{key}") for key, units in VOICE_OUTPUTS.items()}
    face_mask, voice_mask = keras.Input((FRAMES,), name="face_mask"), keras.Input((1,), name="voice_mask")
    inputs = {x.name: x for x in [*face.values(), *voice.values(), face_mask, voice_mask]}

    per_frame = layers.Reshape((FRAMES, 1))(face_mask)
    face = {key: layers.Multiply()([x, per_frame]) for key, x in face.items()}
    voice = {key: layers.Multiply()([x, voice_mask]) for key, x in voice.items()}
    if as_run:
        face.update({key: layers.Cropping1D((0, 3))(face[key]) for key in ("side1", "side2", "side3")})
    face = {key: layers.Flatten()(x) for key, x in face.items()}

    def dense(x, units, activation):
        return activation(_normalize(layers.Dense(units)(x), normalization))

    y = _concat(face["embedding"], voice["embedding"], name="y")
    a = dense(y, 256, layers.LeakyReLU(negative_slope=0.1))
    b = dense(_concat(y, a, face["side3"], voice["side3"]), 64, layers.ReLU())
    c = dense(_concat(y, a, b, face["side2"], voice["side2"]), 64, layers.ReLU())
    d = _concat(y, a, b, c, face["side1"], voice["side1"], name="d")
    if not as_run:
        d = dense(d, 128, layers.ReLU())
    return keras.Model(inputs, layers.Dense(1, name="logit")(d), name="last_cnn")


@registered
class OverFrames(layers.Layer):
    """One network, with shared weights, applied to every frame: (n, frames, ...) -> a dict of (n, frames, units)."""

    def __init__(self, branch: keras.Model, **kwargs):
        super().__init__(**kwargs)
        self.branch = branch

    def call(self, frames, training=None):
        count = frames.shape[1]
        outputs = self.branch(ops.reshape(frames, (-1, *frames.shape[2:])), training=training)
        return {key: ops.reshape(x, (-1, count, x.shape[-1])) for key, x in outputs.items()}

    def compute_output_shape(self, input_shape):
        return {key: (*input_shape[:2], x.shape[-1]) for key, x in self.branch.output.items()}

    def get_config(self):
        return {**super().get_config(), "branch": keras.saving.serialize_keras_object(self.branch)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "branch": keras.saving.deserialize_keras_object(config["branch"])})


def whole_network(face: keras.Model, voice: keras.Model, last: keras.Model) -> keras.Model:
    """The whole structure (the study's figure 6), to be trained end to end or on a frozen `face` and `voice`.

    Inputs: faces (10, H, W, 3), face_mask (10,), voice (as the voice network takes it), voice_mask (1,)
    -> logit (1). As run, with the three networks of the study: 5,506,177 parameters, since one face network
    serves all ten images; ten copies of it, as the study had them, make 10,226,857.
    """
    faces = keras.Input((FRAMES, *face.input_shape[1:]), name="faces")
    samples = keras.Input(voice.input_shape[1:], name="voice")
    masks = {"face_mask": keras.Input((FRAMES,), name="face_mask"), "voice_mask": keras.Input((1,), name="voice_mask")}
    seen, heard = OverFrames(face, name="face_network")(faces), voice(samples)
    fused = {**{f"face_{key}": x for key, x in seen.items()}, **{f"voice_{key}": x for key, x in heard.items()}, **masks}
    return keras.Model(
        {"faces": faces, "voice": samples, **masks}, last({key: fused[key] for key in last.input}), name="whole_network"
    )


def with_head(branch: keras.Model) -> keras.Model:
    """The same network (weights shared) with one more output, "logit" (1): a dense 1 on the embedding."""
    outputs = dict(branch.output)
    outputs["logit"] = layers.Dense(1, name="logit")(outputs["embedding"])
    return keras.Model(branch.input, outputs, name=branch.name)


# The 5 × 5 filter of the spatial rich model (Fridrich and Kodovský 2012): what a pixel differs from its surroundings by.
RESIDUAL_FILTER = np.array([
    [-1, 2, -2, 2, -1], [2, -6, 8, -6, 2], [-2, 8, -12, 8, -2], [2, -6, 8, -6, 2], [-1, 2, -2, 2, -1],
], "float32") / 12


# --- face networks of others -------------------------------------------------------------------------------


def mesoinception4(input_size: int = 256) -> keras.Model:
    """MesoInception-4 (Afchar et al. 2018): (input_size, input_size, 3) pixels -> embedding (16).

    28,615 parameters with its head, at 256. The authors' published weights answer 1 for REAL.
    """

    def inception(x, a, b, c, d):
        branches = [_conv2d(x, a, 1), _conv2d(_conv2d(x, b, 1), b, 3)]
        branches += [_conv2d(_conv2d(x, n, 1), n, 3, dilation) for n, dilation in ((c, 2), (d, 3))]
        return _concat(*branches)

    def pool(x, size):
        return layers.MaxPooling2D(size, padding="same")(layers.BatchNormalization()(x))

    pixels = keras.Input((input_size, input_size, 3), name="pixels")
    x = layers.Rescaling(1 / 255)(pixels)
    x = pool(inception(x, 1, 4, 4, 2), 2)
    x = pool(inception(x, 2, 4, 4, 2), 2)
    x = pool(_conv2d(x, 16, 5), 2)
    x = pool(_conv2d(x, 16, 5), 4)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    x = layers.LeakyReLU(negative_slope=0.1)(layers.Dense(16)(x))
    return keras.Model(pixels, {"embedding": layers.Dropout(0.5, name="embedding")(x)}, name="mesoinception4")


def face_inception(
    input_size: int = 224, weights: str | None = None, dropout: float = 0.5, high_pass: bool = False
) -> keras.Model:
    """InceptionV3 (Szegedy et al. 2016) as a face branch: (H, W, 3) pixels of any size -> the outputs of `one_image_cnn`.

    The picture is resized inside to `input_size`. The sides are global maxima of three grids on the way
    (Keras' mixed2, mixed5 and mixed7) through a dense layer; the embedding reads them and the average of the
    last grid, so that a head on the embedding trains all of them.

    weights: None (random, or to be filled by `load_inception_weights`) or "imagenet", which downloads.
    high_pass: show the network four times the residual of each channel (`RESIDUAL_FILTER`) about mid-grey instead of the colours.
    """
    pixels = keras.Input((None, None, 3), name="pixels")
    x = layers.Resizing(input_size, input_size, antialias=True, name="resize")(pixels)
    if high_pass:
        residual = layers.DepthwiseConv2D(5, padding="same", use_bias=False, trainable=False, name="residual")
        x = layers.Rescaling(4.0, 127.5)(residual(x))
        residual.set_weights([np.repeat(RESIDUAL_FILTER[:, :, None, None], 3, axis=2)])
    # Keras' own ImageNet weights expect -1..1, the weights that load_inception_weights reads 0..1.
    x = layers.Rescaling(1 / 127.5, -1)(x) if weights == "imagenet" else layers.Rescaling(1 / 255)(x)
    backbone = keras.applications.InceptionV3(include_top=False, weights=weights, input_tensor=x)
    sides = {}
    for name, grid in {"side1": "mixed2", "side2": "mixed5", "side3": "mixed7"}.items():
        grid = layers.GlobalMaxPooling2D()(backbone.get_layer(grid).output)
        sides[name] = layers.Dense(FACE_OUTPUTS[name], activation="relu", name=name)(grid)
    x = _concat(layers.GlobalAveragePooling2D()(backbone.output), *sides.values())
    x = layers.Dropout(dropout)(x)
    outputs = {"embedding": _leaky_dense(x, FACE_OUTPUTS["embedding"], "embedding"), **sides}
    return keras.Model(pixels, outputs, name="face_inception")


def load_inception_weights(model: keras.Model, path: Path | str) -> None:
    """Fills the InceptionV3 inside `model` from an 8-bit file `inception_v3_notop_uint8.npz`.

    The file holds arrays NAME, NAME:scale and NAME:min (value = q * scale + min) of conv2d_1 to conv2d_94
    and batch_normalization_1 to _94, in the order in which Keras makes the layers. The moving variances are
    kept above 1e-4: quantisation may have taken them to zero. Raises ValueError when the layers differ.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    stored = {key: arrays[key] * arrays[f"{key}:scale"] + arrays[f"{key}:min"] for key in arrays if ":" not in key}
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


# --- the voice network that replaces the study's -----------------------------------------------------------


@registered
class LogSpectrogram(layers.Layer):
    """Samples (n, T) at `sample_rate` -> log spectrogram (n, frames, bands, 1), in float32 inside any policy.

    Hann windows of `fft_length` samples every `hop`, centred, edges mirrored: frames = 1 + T // hop.
    kind: "mel" (triangles of height 1 on the HTK mel scale), "linear" (the log power of every FFT bin:
        fft_length // 2 + 1 bands, `bands` is not used) or "lfcc" (linear frequency cepstral coefficients:
        DCT-II of the log of `bands` linear triangles; Sahidullah et al. 2015).
    standardize: "band" (each band to mean 0 and deviation 1 over the clip, which removes level and microphone),
        "clip" (one mean and deviation for all bands) or "none".
    `floor` is added to the power before the log.
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
    """Overlapping triangles of height 1, evenly spaced in mel (HTK) or hertz: float32 (fft_length // 2 + 1, bands)."""
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
    """In training, zeroes `masks` random stretches of time and of bands (Park et al. 2019): (n, time, bands, channels).

    A stretch is up to `time` or `bands` (shares of the whole, 0..1) wide. Does nothing at inference.
    """

    def __init__(self, time: float = 0.15, bands: float = 0.15, masks: int = 2, seed: int | None = None, **kwargs):
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
) -> keras.Model:
    """A small inception network on spectrograms of a voice at 16 kHz: (samples,) -> the outputs of `voice_cnn`.

    Each of `kinds` of `LogSpectrogram` has a tower of its own: a 5 x 5 convolution, then three stages of two
    inception blocks with 2, 4 and 8 times `width` channels. The sides are global maxima of the stages through
    a dense layer; the embedding reads them and the pooled last stage, so that its head trains all of them.
    """
    waveform = keras.Input((samples,), name="samples")
    pooled, stages = [], {"side1": [], "side2": [], "side3": []}
    for kind in kinds:
        x = SpecAugment()(LogSpectrogram(kind, standardize=standardize, floor=floor, name=f"log_{kind}")(waveform))
        x = _normalized_conv(x, width, 5, normalization)
        for number, name in enumerate(stages):
            x = layers.MaxPooling2D(2, padding="same")(x)
            for _ in range(2):
                x = _spectrogram_block(x, width * 2 ** (number + 1), normalization)
            stages[name].append(layers.GlobalMaxPooling2D()(x))
        pooled.append(layers.GlobalAveragePooling2D()(x))
    sides = {
        name: _projected_side(_join(parts), VOICE_OUTPUTS[name], name, normalization) for name, parts in stages.items()
    }
    x = layers.Dropout(dropout)(_concat(*pooled, *sides.values()))
    outputs = {"embedding": _leaky_dense(x, VOICE_OUTPUTS["embedding"], "embedding"), **sides}
    return keras.Model(waveform, outputs, name="voice_inception")


def _join(parts):
    return _concat(*parts) if len(parts) > 1 else parts[0]


def _normalized_conv(x, filters: int, size: int, normalization: str):
    return layers.ReLU()(_normalize(layers.Conv2D(filters, size, padding="same", use_bias=False)(x), normalization))


def _spectrogram_block(x, filters: int, normalization: str):
    """Four branches of a quarter of `filters` each: 1 x 1; 3 x 3; two 3 x 3; 3 x 3 maximum (Szegedy et al. 2016)."""
    conv = partial(_normalized_conv, filters=filters // 4, normalization=normalization)
    three, five = conv(x, size=1), conv(x, size=1)
    return _concat(
        conv(x, size=1),
        conv(three, size=3),
        conv(conv(five, size=3), size=3),
        conv(layers.MaxPooling2D(3, 1, "same")(x), size=1),
    )


# --- files -------------------------------------------------------------------------------------------------


def save_network(model: keras.Model, path: Path | str, policy: str = "float16") -> None:
    """Writes `model` as a .keras file without optimizer, its weights in float16 (half the size) or float32.

    Raises ValueError naming the layer when a weight is not finite in that type (above 65,504 in float16, or NaN).
    """
    weights = [np.asarray(ops.convert_to_numpy(x), "float32") for x in model.weights]
    with np.errstate(over="ignore"):
        stored = [x.astype(policy) for x in weights]
    for variable, weight, kept in zip(model.weights, weights, stored, strict=True):
        if not np.isfinite(kept).all():
            worst = np.abs(weight).max()
            raise ValueError(f"{path}: layer {variable.path} holds {worst:.6g}, which {policy} "
                             f"(up to {np.finfo(policy).max:.6g}) cannot store")
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)  # with it the file would hold an optimizer
    twin = _rebuilt(config, policy)
    twin.set_weights(stored)
    twin.save(path)


def load_network(path: Path | str, policy: str = "float32") -> keras.Model:
    """The network of a .keras file, built under `policy` whatever that of the file; no code in it is run.

    Raises FileNotFoundError when there is no such file and ValueError when it is not a .keras file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected weights in a .keras file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: found {path.stat().st_size} bytes that are no archive, expected a .keras file")
    with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
        model = _rebuilt(json.loads(file.read("config.json")), policy)
        model.load_weights(file.extract("model.weights.h5", folder))  # in the archive, each step back reads it from the start
    return model


def load_branch(folder: Path | str, name: str) -> keras.Model:
    """The network NAME.keras of a folder, `averaged` with the members NAME_*.keras that lie beside it."""
    first = load_network(Path(folder) / f"{name}.keras")
    others = [load_network(path) for path in sorted(Path(folder).glob(f"{name}_*.keras"))]
    return averaged(first, *others) if others else first


def averaged(first: keras.Model, *others: keras.Model) -> keras.Model:
    """The network `first` with the mean of its logit and that of `others` on the same input in the place of its own.

    The layers of `first` stay as they are, so that its "logit" layer still holds what it says alone.
    """
    logits = [first.output["logit"], *(other(first.input)["logit"] for other in others)]
    return keras.Model(first.input, {**first.output, "logit": layers.Average(name="mean_logit")(logits)}, name=first.name)


def _rebuilt(config: dict, policy: str) -> keras.Model:
    """A fresh model of a serialized one, every layer under the dtype policy `policy`."""
    return keras.saving.deserialize_keras_object(_with_policy(config, policy), safe_mode=True)


# What newer releases of Keras write into a file and 3.13, Kaggle's, does not know; at these values it changes nothing.
NEWER_DEFAULTS = {
    "input_axes": None, "output_axes": None, "renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99,
}  # fmt: skip


def _with_policy(config, policy: str):
    if isinstance(config, list):
        return [_with_policy(x, policy) for x in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {"name": policy}}
    return {
        key: _with_policy(x, policy)
        for key, x in config.items()
        if not (key in NEWER_DEFAULTS and x == NEWER_DEFAULTS[key])
    }
