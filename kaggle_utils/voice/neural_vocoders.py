"""Small neural vocoders, trained here in minutes, for spoofed twins of bona fide speech (copy-synthesis).

Five unrelated ways from a log-mel spectrogram to samples: transposed convolutions with multi-receptive-field blocks
(HiFi-GAN, Kong et al. 2020) or dilated stacks (MelGAN, Kumar et al. 2019), the complex spectrum itself (Vocos, Siuzdak
2023), the reverse of a diffusion (WaveGrad, Chen et al. 2021) and an invertible flow (WaveGlow, Prenger et al. 2019).
The first three learn against discriminators of periods and of spectrograms. They are no match for published ones, and
need not be: what a detector learns from them is what neural synthesis leaves behind.

A vocoder works at its own sampling rate, most often 22.05 kHz as the published ones do, for its traces lie at
fractions of that rate. Networks are Keras; the training loop is JAX (KERAS_BACKEND=jax).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

from .signal import to_mono
from .vocoders import mel_filters

SEGMENT_FRAMES = 32  # of a training example
BLOCK = 10  # steps in one call of the device
PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = (512, 1024, 2048)
NOISE_STEPS = (0.999, 0.99, 0.95, 0.85, 0.65, 0.4, 0.2, 0.08, 0.02)  # variance of the noise while sampling, falling
GROUP = 8  # samples that the flow transforms together
FLOW_SIGMA = 0.6  # deviation of the noise that the flow samples from


@dataclass(frozen=True)
class Vocoder:
    """What a vocoder hears and is built of.

    Attributes:
        family: hifigan, melgan, vocos, diffusion or flow.
        rate: in Hz. bands, fft_length, hop, top: of its log-mel spectrogram; top in Hz.
        factors: of the upsampling; their product is ``hop``.
        channels: width; batch_size, learning_rate: of the training.
    """

    family: str
    rate: int = 22050
    bands: int = 80
    fft_length: int = 1024
    hop: int = 256
    top: float = 8000.0
    factors: tuple[int, ...] = (8, 8, 2, 2)
    channels: int = 128
    batch_size: int = 16
    learning_rate: float = 5e-4

    @property
    def segment(self) -> int:
        """Samples of a training example."""
        return SEGMENT_FRAMES * self.hop

    def log_mel(self, samples):
        """Samples (n, T), T a multiple of ``hop`` -> (n, T / hop, bands), natural log of amplitudes."""
        real, imaginary = ops.stft(samples, self.fft_length, self.hop, self.fft_length)
        amplitude = ops.sqrt(ops.square(real) + ops.square(imaginary) + 1e-9)[:, :-1]
        filters = mel_filters(self.bands, self.rate, self.fft_length, self.top).T.astype("float32")
        return ops.log(ops.maximum(ops.matmul(amplitude, filters), 1e-5))

    def build(self, frames: int = SEGMENT_FRAMES) -> keras.Model:
        """The network, with new weights, for spectrograms of ``frames`` frames."""
        return BUILDERS[self.family](self, frames)

VOCODERS: dict[str, Vocoder] = {  # "family:variant"
    "hifigan:22k": Vocoder("hifigan"),
    "hifigan:24k": Vocoder("hifigan", 24000, 80, 1200, 300, 7600.0, (5, 5, 4, 3)),
    "melgan:22k": Vocoder("melgan", channels=256),
    "melgan:16k": Vocoder("melgan", 16000, 80, 1024, 200, 7600.0, (5, 5, 4, 2), channels=256),
    "vocos:24k": Vocoder("vocos", 24000, 100, 1024, 256, 8000.0, channels=384),
    "vocos:16k": Vocoder("vocos", 16000, 80, 1024, 256, 8000.0, channels=256),
    "diffusion:22k": Vocoder("diffusion", channels=64),
    "flow:22k": Vocoder("flow", channels=128, learning_rate=1e-3),
}


# --- generators: log-mel (frames, bands) -> samples (frames · hop,) -------------------------------------------------
def hifigan(vocoder: Vocoder, frames: int) -> keras.Model:
    """Transposed convolutions, each followed by the mean of residual blocks of widths 3, 7 and 11."""
    return _upsampling(vocoder, frames, (3, 7, 11), (1, 3, 5))


def melgan(vocoder: Vocoder, frames: int) -> keras.Model:
    """Transposed convolutions, each followed by one residual stack of dilations 1, 3 and 9."""
    return _upsampling(vocoder, frames, (3,), (1, 3, 9))


def _upsampling(vocoder: Vocoder, frames: int, widths: tuple, dilations: tuple) -> keras.Model:
    mel, channels = keras.Input((frames, vocoder.bands)), vocoder.channels
    x = layers.Conv1D(channels, 7, padding="same")(mel)
    for factor in vocoder.factors:
        channels //= 2
        x = layers.Conv1DTranspose(channels, 2 * factor, factor, "same")(layers.LeakyReLU(0.1)(x))
        parts = []
        for width in widths:
            y = x
            for dilation in dilations:
                z = layers.Conv1D(channels, width, padding="same", dilation_rate=dilation)(layers.LeakyReLU(0.1)(y))
                y = layers.Add()([y, layers.Conv1D(channels, width, padding="same")(layers.LeakyReLU(0.1)(z))])
            parts.append(y)
        x = layers.Average()(parts) if len(parts) > 1 else parts[0]
    x = layers.Conv1D(1, 7, padding="same", activation="tanh")(layers.LeakyReLU(0.1)(x))
    return keras.Model(mel, layers.Reshape((-1,))(x), name=vocoder.family)


class InverseSTFT(layers.Layer):
    """(n, frames, 2 · bins), log amplitude beside phase -> samples (n, frames · hop)."""

    def __init__(self, fft_length: int, hop: int):
        super().__init__()
        self.fft_length, self.hop = fft_length, hop

    def call(self, x):
        x = ops.concatenate([x, x[:, -1:]], axis=1)  # centred frames: one more than T / hop
        amplitude, phase = ops.split(x, 2, axis=-1)
        amplitude = ops.exp(ops.minimum(amplitude, 6.0))
        spectrum = (amplitude * ops.cos(phase), amplitude * ops.sin(phase))
        return ops.istft(spectrum, self.fft_length, self.hop, self.fft_length, length=(x.shape[1] - 1) * self.hop)


def vocos(vocoder: Vocoder, frames: int, blocks: int = 6) -> keras.Model:
    """ConvNeXt blocks at the rate of the frames, then the inverse Fourier transform."""
    mel, channels = keras.Input((frames, vocoder.bands)), vocoder.channels
    x = layers.LayerNormalization()(layers.Conv1D(channels, 7, padding="same")(mel))
    for _ in range(blocks):
        y = layers.LayerNormalization()(layers.DepthwiseConv1D(7, padding="same")(x))
        x = layers.Add()([x, layers.Dense(channels)(layers.Dense(3 * channels, activation="gelu")(y))])
    x = layers.Dense(vocoder.fft_length + 2)(layers.LayerNormalization()(x))
    return keras.Model(mel, InverseSTFT(vocoder.fft_length, vocoder.hop)(x), name=vocoder.family)


def diffusion(vocoder: Vocoder, frames: int, depth: int = 20) -> keras.Model:
    """Dilated gated convolutions that find the noise in noisy samples: {"samples", "mel", "level"} -> the noise."""
    channels, level = vocoder.channels, keras.Input((1,), name="level")
    samples, mel = _inputs(vocoder, frames)
    step = ops.concatenate([ops.cos(level * f) for f in (0.5, 1, 2, 4, 8, 16, 32, 64)], axis=-1)
    step = layers.Dense(channels, activation="silu")(layers.Dense(128, activation="silu")(step))
    condition = _upsampled(mel, channels, (16, vocoder.hop // 16))
    x = layers.Conv1D(channels, 1, activation="relu")(layers.Reshape((-1, 1))(samples))
    skips = []
    for i in range(depth):
        y = layers.Add()([x, layers.Reshape((1, channels))(layers.Dense(channels)(step))])
        y = _gated(y, condition, channels, 2 ** (i % 10))
        x, skip = (x + y[..., :channels]) * 0.5**0.5, y[..., channels:]
        skips.append(skip)
    y = layers.Conv1D(channels, 1, activation="relu")(layers.Add()(skips))
    y = layers.Reshape((-1,))(layers.Conv1D(1, 1, kernel_initializer="zeros")(y))
    return keras.Model({"samples": samples, "mel": mel, "level": level}, y, name="diffusion")


def _inputs(vocoder: Vocoder, frames: int) -> tuple:
    return keras.Input((frames * vocoder.hop,), name="samples"), keras.Input((frames, vocoder.bands), name="mel")


def _upsampled(mel, channels: int, factors: tuple):
    x = layers.Conv1D(channels, 3, padding="same")(mel)
    for factor in factors:
        x = layers.LeakyReLU(0.2)(layers.Conv1DTranspose(channels, 2 * factor, factor, "same")(x))
    return x


def _gated(x, condition, channels: int, dilation: int):
    y = layers.Conv1D(2 * channels, 3, padding="same", dilation_rate=dilation)(x)
    y = layers.Add()([y, layers.Conv1D(2 * channels, 1)(condition)])
    return layers.Conv1D(2 * channels, 1)(ops.tanh(y[..., :channels]) * ops.sigmoid(y[..., channels:]))


class Flow(layers.Layer):
    """Eight invertible steps, each a 1 × 1 mixing of ``GROUP`` samples and an affine coupling of their halves.

    Called with samples (n, T) and mel: (n, T / GROUP, GROUP) noise and the mean log determinant for each sample.
    """

    def __init__(self, vocoder: Vocoder, frames: int, steps: int = 8):
        super().__init__()
        self.couplings = [_coupling(vocoder, frames) for _ in range(steps)]

    def build(self, *shapes):
        random = np.random.default_rng(0)
        start = [np.linalg.qr(random.standard_normal((GROUP, GROUP)))[0] for _ in self.couplings]
        self.mixings = [self.add_weight(shape=x.shape, initializer=keras.initializers.Constant(x)) for x in start]

    def call(self, samples, mel):
        x, logdet = ops.reshape(samples, (-1, samples.shape[1] // GROUP, GROUP)), 0.0
        for mixing, coupling in zip(self.mixings, self.couplings, strict=True):
            x = ops.matmul(x, mixing)
            kept, moved = ops.split(x, 2, axis=-1)
            shift, scale = ops.split(coupling([kept, mel]), 2, axis=-1)
            x = ops.concatenate([kept, moved * ops.exp(scale) + shift], axis=-1)
            logdet += ops.mean(scale) / 2 + ops.log(ops.abs(ops.det(mixing))) / GROUP
        return x, logdet

    def inverse(self, noise, mel):
        """(n, T / GROUP, GROUP) -> samples (n, T)."""
        x = noise
        for mixing, coupling in zip(reversed(self.mixings), reversed(self.couplings), strict=True):
            kept, moved = ops.split(x, 2, axis=-1)
            shift, scale = ops.split(coupling([kept, mel]), 2, axis=-1)
            x = ops.concatenate([kept, (moved - shift) * ops.exp(-scale)], axis=-1)
            x = ops.matmul(x, ops.inv(mixing))
        return ops.reshape(x, (len(x), -1))


def _coupling(vocoder: Vocoder, frames: int, depth: int = 5) -> keras.Model:
    """Half of the grouped samples and mel -> shift and log scale of the other half, in ±3."""
    half, mel = keras.Input((frames * vocoder.hop // GROUP, GROUP // 2)), keras.Input((frames, vocoder.bands))
    condition = _upsampled(mel, vocoder.channels, (8, vocoder.hop // 8 // GROUP))
    x, skips = layers.Conv1D(vocoder.channels, 1)(half), []
    for i in range(depth):
        y = _gated(x, condition, vocoder.channels, 2**i)
        x, skip = x + y[..., : vocoder.channels], y[..., vocoder.channels :]
        skips.append(skip)
    y = layers.Conv1D(GROUP, 1, kernel_initializer="zeros")(layers.Add()(skips))
    return keras.Model([half, mel], ops.concatenate([y[..., : GROUP // 2], 3 * ops.tanh(y[..., GROUP // 2 :] / 3)], -1))


def flow(vocoder: Vocoder, frames: int) -> keras.Model:
    """{"samples", "mel"} -> {"noise", "logdet"}; its only layer with weights is a :class:`Flow`."""
    samples, mel = _inputs(vocoder, frames)
    noise, logdet = Flow(vocoder, frames)(samples, mel)
    return keras.Model({"samples": samples, "mel": mel}, {"noise": noise, "logdet": logdet}, name="flow")

BUILDERS: dict[str, Callable[[Vocoder, int], keras.Model]] = {
    "hifigan": hifigan, "melgan": melgan, "vocos": vocos, "diffusion": diffusion, "flow": flow,
}


# --- discriminators -------------------------------------------------------------------------------------------------
def discriminator(length: int) -> keras.Model:
    """Samples -> for each period and resolution a list of features, the score of each patch last."""
    samples = keras.Input((length,))
    outputs = []
    for period in PERIODS:
        x = ops.pad(samples, ((0, 0), (0, -length % period)))
        x = layers.Reshape((-1, period, 1))(x)
        outputs.append(_features(x, ((16, (5, 1), (3, 1)), (64, (5, 1), (3, 1)), (128, (5, 1), (3, 1)), (128, (5, 1), 1))))
    for size in RESOLUTIONS:
        x = ops.stack(ops.stft(samples, size, size // 4, size), axis=-1)
        outputs.append(_features(x, ((32, (3, 9), (1, 2)), (32, (3, 9), (1, 2)), (32, (3, 9), (1, 2)), (32, (3, 3), 1))))
    return keras.Model(samples, outputs, name="discriminator")


def _features(x, plan: tuple) -> list:
    features = []
    for filters, size, stride in plan:
        x = layers.LeakyReLU(0.1)(layers.Conv2D(filters, size, stride, "same")(x))
        features.append(x)
    return [*features, layers.Conv2D(1, 3, padding="same")(x)]


# --- losses ---------------------------------------------------------------------------------------------------------
def spectral_loss(vocoder: Vocoder, real, made):
    """Mean log-mel distance (× 15) plus spectral convergence and log distance at three resolutions."""
    loss = 15 * ops.mean(ops.abs(vocoder.log_mel(real) - vocoder.log_mel(made)))
    for size in RESOLUTIONS:
        a, b = (_amplitude(x, size) for x in (real, made))
        loss += ops.norm(a - b) / ops.norm(a) + ops.mean(ops.abs(ops.log(a) - ops.log(b)))
    return loss


def _amplitude(samples, size: int):
    real, imaginary = ops.stft(samples, size, size // 4, size)
    return ops.sqrt(ops.square(real) + ops.square(imaginary) + 1e-6)


def adversarial_loss(real: list, made: list):
    """Least squares (Mao et al. 2017) plus twice the distance of the features."""
    loss = 0.0
    for r, m in zip(real, made, strict=True):
        loss += ops.mean(ops.square(1 - m[-1]))
        loss += 2 * sum(ops.mean(ops.abs(x - y)) for x, y in zip(r[:-1], m[:-1], strict=True))
    return loss


def discriminator_loss(real: list, made: list):
    return sum(ops.mean(ops.square(1 - r[-1])) + ops.mean(ops.square(m[-1])) for r, m in zip(real, made, strict=True))


# --- training (JAX) -------------------------------------------------------------------------------------------------
def train_vocoder(vocoder: Vocoder, clips: list[np.ndarray], seconds: float, seed: int = 0, report: Callable = print,
                  early: float | None = None) -> list[keras.Model]:
    """Train a vocoder for a time.

    Args:
        clips: float32 voices at the vocoder's rate, each longer than its training example.
        seconds: wall clock, compilation left out.
        early: share of the time after which a snapshot is kept, None: no snapshot.

    Returns:
        The network, and before it the snapshot.
    """
    import jax

    keras.utils.set_random_seed(seed)
    network = vocoder.build()
    step, state = STEPS.get(vocoder.family, _adversarial)(vocoder, network)
    longest = max(len(clip) for clip in clips)
    data = (np.stack([np.resize(clip, longest) for clip in clips]), np.array([len(clip) for clip in clips]))

    @jax.jit
    def block(data, state, key, rate, weight):
        def one(state, key):
            return step(state, _segments(data, vocoder, key), rate, key, weight)

        state, losses = jax.lax.scan(one, state, jax.random.split(key, BLOCK))
        return state, {name: values.mean() for name, values in losses.items()}

    data, kept, blocks, began = jax.device_put(data), [], 0, None
    while began is None or time.monotonic() - began < seconds:
        progress = 0.0 if began is None else (time.monotonic() - began) / seconds
        if early and not kept and progress > early:
            kept.append(_copy(vocoder, network, state[0]))
        rate = np.float32(vocoder.learning_rate * min(1, (blocks + 1) / 5) * 0.5 * (1 + np.cos(np.pi * min(progress, 1))))
        state, losses = block(data, state, jax.random.key(1000 * seed + blocks), rate, np.float32(progress > 0.2))
        losses = {name: round(float(value), 3) for name, value in losses.items()}  # waits: the clock is right
        began = began or time.monotonic()
        blocks += 1
        if blocks % 50 == 0:
            report(f"{vocoder.family}: {blocks * BLOCK} steps in {time.monotonic() - began:.0f} s, {losses}")
    report(f"{vocoder.family}: {blocks * BLOCK} steps in {time.monotonic() - began:.0f} s, {losses}")
    last = _copy(vocoder, network, state[0])
    return [*(kept or [last]), last] if early else [last]


def _copy(vocoder: Vocoder, network: keras.Model, weights: list) -> keras.Model:
    for variable, value in zip(network.trainable_variables, weights, strict=True):
        variable.assign(value)
    copy = vocoder.build()
    copy.set_weights(network.get_weights())
    return copy


def _segments(data: tuple, vocoder: Vocoder, key):
    """Random examples (batch_size, segment) at random levels."""
    import jax

    clips, lengths = data
    row_key, start_key, level_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, (vocoder.batch_size,), 0, len(clips))
    starts = jax.random.uniform(start_key, rows.shape) * (lengths[rows] - vocoder.segment)
    cut = jax.vmap(lambda clip, start: jax.lax.dynamic_slice(clip, (start,), (vocoder.segment,)))
    return cut(clips[rows], starts.astype("int32")) * jax.random.uniform(level_key, (len(rows), 1), minval=0.5, maxval=1.2)


def _with_rate(optimizer, variables, rate):
    place = [variable is optimizer._learning_rate for variable in optimizer.variables].index(True)
    return [*variables[:place], rate, *variables[place + 1 :]]


def _values(variables) -> list:
    return [variable.value for variable in variables]


def _adversarial(vocoder: Vocoder, network: keras.Model):
    import jax

    judge = discriminator(vocoder.segment)
    optimizers = [keras.optimizers.Adam(5e-4, beta_1=0.8, beta_2=0.99, global_clipnorm=10.0) for _ in range(2)]
    for optimizer, model in zip(optimizers, (network, judge), strict=True):
        optimizer.build(model.trainable_variables)

    def judged(d, samples):
        return judge.stateless_call(d, [], samples)[0]

    def judge_loss(d, real, made):
        return discriminator_loss(judged(d, real), judged(d, made))

    def network_loss(g, d, real, weight):
        made = network.stateless_call(g, [], vocoder.log_mel(real))[0]
        spectral = spectral_loss(vocoder, real, made)
        return spectral + weight * adversarial_loss(judged(d, real), judged(d, made)), (made, spectral)

    def step(state, real, rate, key, weight):
        g, g_state, d, d_state = state
        (_, (made, spectral)), gradient = jax.value_and_grad(network_loss, has_aux=True)(g, d, real, weight)
        g, g_state = optimizers[0].stateless_apply(_with_rate(optimizers[0], g_state, rate), gradient, g)
        d_loss, gradient = jax.value_and_grad(judge_loss)(d, real, made)
        d, d_state = optimizers[1].stateless_apply(_with_rate(optimizers[1], d_state, rate), gradient, d)
        return (g, g_state, d, d_state), {"spectral": spectral, "judge": d_loss}

    models = network.trainable_variables, optimizers[0].variables, judge.trainable_variables, optimizers[1].variables
    return step, tuple(_values(variables) for variables in models)


def _plain(network: keras.Model, loss_of: Callable):
    """A step that lowers ``loss_of`` (weights, real, key)."""
    import jax

    optimizer = keras.optimizers.Adam(5e-4, global_clipnorm=1.0)
    optimizer.build(network.trainable_variables)

    def step(state, real, rate, key, weight):
        weights, variables = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, real, key)
        weights, variables = optimizer.stateless_apply(_with_rate(optimizer, variables, rate), gradient, weights)
        return (weights, variables), {"loss": loss}

    return step, (_values(network.trainable_variables), _values(optimizer.variables))


def _denoising(vocoder: Vocoder, network: keras.Model):
    import jax

    def loss_of(weights, real, key):
        level_key, noise_key = jax.random.split(key)
        variance = jax.random.uniform(level_key, (len(real), 1)) ** 2 * 0.998 + 0.001
        noise = jax.random.normal(noise_key, real.shape)
        noisy = ops.sqrt(1 - variance) * 5 * real + ops.sqrt(variance) * noise
        inputs = {"samples": noisy, "mel": vocoder.log_mel(real), "level": ops.log(variance)}
        return ops.mean(ops.abs(network.stateless_call(weights, [], inputs)[0] - noise))

    return _plain(network, loss_of)


def _likelihood(vocoder: Vocoder, network: keras.Model):
    import jax

    def loss_of(weights, real, key):
        real = real + 1e-3 * jax.random.normal(key, real.shape)
        found = network.stateless_call(weights, [], {"samples": real, "mel": vocoder.log_mel(real)})[0]
        return ops.mean(ops.square(found["noise"])) / 2 - found["logdet"]

    return _plain(network, loss_of)

STEPS = {"diffusion": _denoising, "flow": _likelihood}


# --- use ------------------------------------------------------------------------------------------------------------
def vocode(vocoder: Vocoder, network: keras.Model, clips: list[np.ndarray], rate: int, seed: int = 0,
           batch: int = 16) -> list[np.ndarray]:
    """The twin of each voice: float32 (T,) at ``rate`` Hz, as long as the voice, which may have another rate."""
    own = [to_mono(clip, rate, vocoder.rate) for clip in clips]
    longest = -(-max(len(clip) for clip in own) // vocoder.hop) * vocoder.hop
    whole = vocoder.build(longest // vocoder.hop)
    whole.set_weights(network.get_weights())
    made = []
    for start in range(0, len(own), batch):
        part = [np.pad(clip, (0, longest - len(clip))) for clip in own[start : start + batch]]
        mel = ops.convert_to_numpy(vocoder.log_mel(np.resize(np.stack(part), (batch, longest)).astype(np.float32)))
        made += list(_synthesis(whole, mel, vocoder.hop, seed + start))[: len(part)]
    made = [to_mono(samples[: len(clip)], vocoder.rate, rate) for samples, clip in zip(made, own, strict=True)]
    return [np.pad(samples[: len(clip)], (0, max(0, len(clip) - len(samples))))
            for samples, clip in zip(made, clips, strict=True)]


def _synthesis(network: keras.Model, mel: np.ndarray, hop: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((len(mel), mel.shape[1] * hop)).astype(np.float32)
    if network.name == "diffusion":
        return _denoised(network, mel, noise)
    if network.name == "flow":
        layer = next(layer for layer in network.layers if isinstance(layer, Flow))
        noise = ops.convert_to_tensor(FLOW_SIGMA * noise.reshape(len(mel), -1, GROUP))
        return ops.convert_to_numpy(layer.inverse(noise, ops.convert_to_tensor(mel)))
    return network.predict(mel, batch_size=len(mel), verbose=0)


def _denoised(network: keras.Model, mel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Deterministic steps from noise to samples (Song et al. 2021)."""
    for variance, after in zip(NOISE_STEPS, (*NOISE_STEPS[1:], 0.0), strict=True):
        level = np.full((len(mel), 1), np.log(variance), np.float32)
        noise = network.predict({"samples": x, "mel": mel, "level": level}, batch_size=len(mel), verbose=0)
        clean = np.clip((x - np.sqrt(variance) * noise) / np.sqrt(1 - variance), -5, 5)
        x = np.sqrt(1 - after) * clean + np.sqrt(after) * noise
    return x / 5
