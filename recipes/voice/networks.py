"""Voice networks: the study's 1D CNN, an inception network on spectrograms, and Distill-MOS."""

from functools import partial

import keras
import numpy as np
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
    x = _quality_convolutions(CompressedSpectrum()(_middle(waveform, heard)))
    return keras.Model(waveform, {"embedding": MeanAndDeviation(name="embedding")(x)}, name="voice_quality")


def _middle(waveform, heard: int):
    """The middle ``heard`` samples of (n, samples)."""
    samples = waveform.shape[1]
    edge = (samples - heard) // 2
    x = layers.Cropping1D((edge, samples - heard - edge))(layers.Reshape((samples, 1))(waveform))
    return layers.Reshape((heard,))(x)


def _quality_convolutions(x):
    for number, filters in enumerate((64, 64, 128, 256, 256, 256)):
        x = layers.ZeroPadding2D((0, 1))(x)
        x = layers.Conv2D(filters, 3, (2 if number else 1, 2 if number == 5 else 1), name=f"conv{number}")(x)
        x = layers.LeakyReLU(negative_slope=0.1)(x)
    return x


def voice_transformer(
    samples: int = 64600,
    heard: int = 48000,
    width: int = 200,
    depth: int = 7,
    dropout: float = 0.5,
    pretrained: str | None = None,
) -> keras.Model:
    """Distill-MOS as a whole (Stahl and Gamper 2025), to be fine-tuned: convolutions and a transformer.

    The embedding joins the attention-pooled transformer (``width``) and 64 units on mean and deviation of the
    last feature maps. The affine normalisations of the package are part of the layers beside them here, and
    its positions are a trained bias.

    Args:
        pretrained: the file ``distill_mos_v7.pt`` (MIT, package distillmos 0.9.1), which PyTorch reads.
            None: random weights.
    """
    waveform = keras.Input((samples,), name="samples")
    maps = _quality_convolutions(SpecAugment()(CompressedSpectrum()(_middle(waveform, heard))))
    frames, wide = maps.shape[2], maps.shape[1] * maps.shape[3]
    x = layers.Reshape((frames, wide))(layers.Permute((2, 3, 1))(maps))  # a feature is channel, then band
    x = layers.EinsumDense("btc,cd->btd", (frames, width), bias_axes="td", name="projection")(x)
    for number in range(depth):
        attended = layers.MultiHeadAttention(8, width // 8, name=f"attention{number}")(x, x)
        x = layers.Add()([x, layers.Dropout(0.1)(attended)])
        x = layers.LayerNormalization(epsilon=1e-5, name=f"norm{number}a")(x)
        dense = layers.Dense(2 * width, activation="relu", name=f"dense{number}a")(x)
        dense = layers.Dropout(0.1)(layers.Dense(width, name=f"dense{number}b")(dense))
        x = layers.LayerNormalization(epsilon=1e-5, name=f"norm{number}b")(layers.Add()([x, dense]))
    weight = layers.Dense(1, name="pool_b")(layers.Dense(2 * width, activation="relu", name="pool_a")(x))
    pooled = layers.Dot(1)([layers.Softmax(1, dtype="float32")(weight), x])
    pooled = layers.Reshape((width,), name="pooled")(pooled)
    statistics = layers.LayerNormalization(name="statistics")(MeanAndDeviation()(maps))
    statistics = layers.LeakyReLU(negative_slope=0.1)(layers.Dense(64)(layers.Dropout(dropout)(statistics)))
    x = concat(layers.Dropout(dropout / 2)(pooled), statistics, name="embedding")
    network = keras.Model(waveform, {"embedding": x}, name="voice_transformer")
    if pretrained:
        load_distill_mos(network, pretrained)
    return network


def load_distill_mos(network: keras.Model, path: str) -> None:
    """Give :func:`voice_transformer` the weights of the package, except its head."""
    import torch

    weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    weights = {name: value.double().numpy() for name, value in weights.items()}

    def affine(name):
        scale = weights[f"{name}.weight"] / np.sqrt(weights[f"{name}.running_var"] + 1e-5)
        return scale, weights[f"{name}.bias"] - scale * weights[f"{name}.running_mean"]

    def give(layer, *values):
        shapes = [variable.shape for variable in network.get_layer(layer).weights]
        network.get_layer(layer).set_weights(
            [np.reshape(value, shape) for value, shape in zip(values, shapes, strict=True)]
        )

    for number in range(6):
        conv = f"cnn.cnn.{2 * number}"
        give(f"conv{number}", weights[f"{conv}.weight"].transpose(2, 3, 1, 0), weights[f"{conv}.bias"])
    top = "transformer_pool_attn."
    (scale, shift), (again, more) = affine(f"{top}norm_input"), affine(f"{top}transformer.norm")
    kernel = weights[f"{top}transformer.linear_proj.weight"].T
    positions = weights[f"{top}transformer.position_encoding.pe"][0]
    bias = weights[f"{top}transformer.linear_proj.bias"] + (shift * again + more) @ kernel
    frames = network.get_layer("projection").output.shape[1]
    give("projection", (scale * again)[:, None] * kernel, bias + positions[:frames])
    depth = sum(layer.name.startswith("attention") for layer in network.layers)
    for number in range(depth):
        name = f"{top}transformer.transformer_encoder.layers.{number}"
        parts = np.split(weights[f"{name}.self_attn.in_proj_weight"], 3)
        biases = np.split(weights[f"{name}.self_attn.in_proj_bias"], 3)
        query_key_value = [each for part, bias in zip(parts, biases, strict=True) for each in (part.T, bias)]
        out = weights[f"{name}.self_attn.out_proj.weight"].T, weights[f"{name}.self_attn.out_proj.bias"]
        give(f"attention{number}", *query_key_value, *out)
        give(f"norm{number}a", weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"])
        give(f"dense{number}a", weights[f"{name}.linear1.weight"].T, weights[f"{name}.linear1.bias"])
        give(f"dense{number}b", weights[f"{name}.linear2.weight"].T, weights[f"{name}.linear2.bias"])
        scale, shift = weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"]
        if number == depth - 1:
            last, more = affine(f"{top}norm_trans")
            scale, shift = scale * last, shift * last + more
        give(f"norm{number}b", scale, shift)
    for ours, theirs in {"pool_a": "linear1", "pool_b": "linear2"}.items():
        give(ours, weights[f"{top}pool.{theirs}.weight"].T, weights[f"{top}pool.{theirs}.bias"])
