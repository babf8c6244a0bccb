"""Voice networks: the study's 1D CNN, an inception network on spectrograms, and Distill-MOS."""

from functools import partial

import keras
from keras import layers

from kaggle_utils.voice.layers import (
    BandPosition,
    CompressedSpectrum,
    LogSpectrogram,
    MeanAndDeviation,
    MinPooling1D,
    SpecAugment,
    Statistics,
)
from recipes.blocks import VOICE_OUTPUTS, concat, leaky_dense, normalize, projected_side


# --- the study's network ------------------------------------------------------------------------------------
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
