"""Small neural vocoders, trained here in minutes, for spoofed twins of bona fide speech (copy-synthesis).

Four unrelated ways from a log-mel spectrogram to samples: transposed convolutions with multi-receptive-field blocks
(HiFi-GAN, Kong et al. 2020) or dilated stacks (MelGAN, Kumar et al. 2019), the complex spectrum itself (Vocos, Siuzdak
2023) and the reverse of a diffusion (WaveGrad, Chen et al. 2021). The first three learn against discriminators of
periods and of spectrograms. They are no match for published ones, and need not be: what a detector learns from them is
what neural synthesis leaves behind.

Networks are Keras; the training loop is JAX (KERAS_BACKEND=jax).
"""

import time
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from .networks import filter_bank
from .voice import SAMPLE_RATE

BANDS, FFT_LENGTH, HOP = 80, 1024, 256
SEGMENT = 8192  # samples of a training example
PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = (512, 1024, 2048)
NOISE_STEPS = (0.999, 0.99, 0.95, 0.85, 0.65, 0.4, 0.2, 0.08, 0.02)  # variance of the noise while sampling, falling


def log_mel(samples):
    """Samples (n, T), T a multiple of 256 -> log-mel spectrogram (n, T / 256, 80), natural log of amplitudes."""
    real, imaginary = ops.stft(samples, FFT_LENGTH, HOP, FFT_LENGTH)
    amplitude = ops.sqrt(ops.square(real) + ops.square(imaginary) + 1e-9)[:, :-1]
    return ops.log(ops.maximum(ops.matmul(amplitude, filter_bank("mel", BANDS, SAMPLE_RATE, FFT_LENGTH)), 1e-5))


# --- generators: log-mel (frames, 80) -> samples (frames · 256,) ----------------------------------------------------
def hifigan(channels: int = 256) -> keras.Model:
    """Three transposed convolutions, each followed by the mean of residual blocks of widths 3, 7 and 11."""
    return _upsampling("hifigan", channels, (8, 8, 4), (3, 7, 11), (1, 3, 5))


def melgan(channels: int = 256) -> keras.Model:
    """Four transposed convolutions, each followed by one residual stack of dilations 1, 3 and 9."""
    return _upsampling("melgan", channels, (8, 8, 2, 2), (3,), (1, 3, 9))


def _upsampling(name: str, channels: int, factors: tuple, widths: tuple, dilations: tuple) -> keras.Model:
    mel = keras.Input((None, BANDS))
    x = layers.Conv1D(channels, 7, padding="same")(mel)
    for factor in factors:
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
    return keras.Model(mel, layers.Reshape((-1,))(x), name=name)


class InverseSTFT(layers.Layer):
    """(n, frames, 2 · bins), log amplitude beside phase -> samples (n, frames · 256)."""

    def call(self, x):
        x = ops.concatenate([x, x[:, -1:]], axis=1)  # centred frames: one more than T / 256
        amplitude, phase = ops.split(x, 2, axis=-1)
        amplitude = ops.exp(ops.minimum(amplitude, 6.0))
        spectrum = (amplitude * ops.cos(phase), amplitude * ops.sin(phase))
        return ops.istft(spectrum, FFT_LENGTH, HOP, FFT_LENGTH, length=(x.shape[1] - 1) * HOP)


def vocos(channels: int = 384, blocks: int = 6, frames: int = SEGMENT // HOP) -> keras.Model:
    """ConvNeXt blocks at the rate of the frames, then the inverse Fourier transform."""
    mel = keras.Input((frames, BANDS))
    x = layers.LayerNormalization()(layers.Conv1D(channels, 7, padding="same")(mel))
    for _ in range(blocks):
        y = layers.LayerNormalization()(layers.DepthwiseConv1D(7, padding="same")(x))
        x = layers.Add()([x, layers.Dense(channels)(layers.Dense(3 * channels, activation="gelu")(y))])
    x = layers.Dense(FFT_LENGTH + 2)(layers.LayerNormalization()(x))
    return keras.Model(mel, InverseSTFT()(x), name="vocos")


def diffusion(channels: int = 64, depth: int = 20) -> keras.Model:
    """Dilated gated convolutions that find the noise in noisy samples: {"samples", "mel", "level"} -> the noise."""
    samples, mel, level = keras.Input((None,)), keras.Input((None, BANDS)), keras.Input((1,))
    step = ops.concatenate([ops.cos(level * f) for f in (0.5, 1, 2, 4, 8, 16, 32, 64)], axis=-1)
    step = layers.Dense(channels, activation="silu")(layers.Dense(128, activation="silu")(step))
    condition = layers.Conv1D(channels, 3, padding="same")(mel)
    for factor in (16, 16):
        condition = layers.LeakyReLU(0.2)(layers.Conv1DTranspose(channels, 2 * factor, factor, "same")(condition))
    x = layers.Conv1D(channels, 1, activation="relu")(layers.Reshape((-1, 1))(samples))
    skips = []
    for i in range(depth):
        y = layers.Add()([x, layers.Reshape((1, channels))(layers.Dense(channels)(step))])
        y = layers.Conv1D(2 * channels, 3, padding="same", dilation_rate=2 ** (i % 10))(y)
        y = layers.Add()([y, layers.Conv1D(2 * channels, 1)(condition)])
        y = ops.tanh(y[..., :channels]) * ops.sigmoid(y[..., channels:])
        y = layers.Conv1D(2 * channels, 1)(y)
        x, skip = (x + y[..., :channels]) * 0.5**0.5, y[..., channels:]
        skips.append(skip)
    y = layers.Conv1D(channels, 1, activation="relu")(layers.Add()(skips))
    y = layers.Reshape((-1,))(layers.Conv1D(1, 1, kernel_initializer="zeros")(y))
    return keras.Model({"samples": samples, "mel": mel, "level": level}, y, name="diffusion")


GENERATORS: dict[str, Callable[[], keras.Model]] = {
    "hifigan": hifigan, "melgan": melgan, "vocos": vocos, "diffusion": diffusion,
}


# --- discriminators -------------------------------------------------------------------------------------------------
def discriminator(length: int = SEGMENT) -> keras.Model:
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
def spectral_loss(real, made):
    """Mean log-mel distance (× 15) plus spectral convergence and log distance at three resolutions."""
    loss = 15 * ops.mean(ops.abs(log_mel(real) - log_mel(made)))
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
def train_vocoder(name: str, clips: list[np.ndarray], seconds: float, batch_size: int = 16, learning_rate: float = 5e-4,
                  seed: int = 0, report: Callable = print) -> keras.Model:
    """Train a generator for a time.

    Args:
        name: key of ``GENERATORS``.
        clips: float32 voices at 16 kHz, each longer than half a second.
        seconds: wall clock, compilation left out.

    Returns:
        The trained network.
    """
    keras.utils.set_random_seed(seed)
    network = GENERATORS[name]()
    step, state = _denoising(network) if name == "diffusion" else _adversarial(network, SEGMENT)
    random = np.random.default_rng(seed)
    began, count, losses = None, 0, {}
    while began is None or time.monotonic() - began < seconds:
        progress = 0.0 if began is None else (time.monotonic() - began) / seconds
        rate = np.float32(learning_rate * min(1, (count + 1) / 50) * 0.5 * (1 + np.cos(np.pi * progress)))
        state, losses = step(state, _segments(clips, batch_size, random), rate, np.int32(count), np.float32(progress > 0.2))
        if count % 20 == 0:  # waits for the device, so that the clock is right
            losses = {key: float(value) for key, value in losses.items()}
        began = began or time.monotonic()
        count += 1
        if count % 500 == 0:
            report(f"{name}: step {count}, {count / (time.monotonic() - began):.1f} steps/s, "
                   + ", ".join(f"{key} {float(value):.3f}" for key, value in losses.items()))
    for variable, value in zip(network.trainable_variables, state[0], strict=True):
        variable.assign(value)
    report(f"{name}: {count} steps, " + ", ".join(f"{key} {float(value):.3f}" for key, value in losses.items()))
    return network


def _segments(clips: list[np.ndarray], count: int, random: np.random.Generator) -> np.ndarray:
    cut = []
    for i in random.integers(len(clips), size=count):
        start = random.integers(len(clips[i]) - SEGMENT + 1)
        cut.append(clips[i][start : start + SEGMENT] * random.uniform(0.5, 1.2))
    return np.stack(cut).astype(np.float32)


def _adversarial(network: keras.Model, length: int):
    import jax

    judge = discriminator(length)
    optimizers = [keras.optimizers.Adam(5e-4, beta_1=0.8, beta_2=0.99, global_clipnorm=g) for g in (10.0, 10.0)]
    for optimizer, model in zip(optimizers, (network, judge), strict=True):
        optimizer.build(model.trainable_variables)

    def judged(d, samples):
        return judge.stateless_call(d, [], samples)[0]

    def judge_loss(d, real, made):
        return discriminator_loss(judged(d, real), judged(d, made))

    def network_loss(g, d, real, weight):
        made = network.stateless_call(g, [], log_mel(real))[0]
        spectral = spectral_loss(real, made)
        return spectral + weight * adversarial_loss(judged(d, real), judged(d, made)), spectral

    def with_rate(optimizer, variables, rate):
        place = [variable is optimizer._learning_rate for variable in optimizer.variables].index(True)
        return [*variables[:place], rate, *variables[place + 1 :]]

    @jax.jit
    def step(state, real, rate, count, weight):
        g, g_state, d, d_state = state
        made = network.stateless_call(g, [], log_mel(real))[0]
        d_loss, gradient = jax.value_and_grad(judge_loss)(d, real, made)
        d, d_state = optimizers[1].stateless_apply(with_rate(optimizers[1], d_state, rate), gradient, d)
        (_, spectral), gradient = jax.value_and_grad(network_loss, has_aux=True)(g, d, real, weight)
        g, g_state = optimizers[0].stateless_apply(with_rate(optimizers[0], g_state, rate), gradient, g)
        return (g, g_state, d, d_state), {"spectral": spectral, "judge": d_loss}

    values = [[variable.value for variable in variables] for variables in (
        network.trainable_variables, optimizers[0].variables, judge.trainable_variables, optimizers[1].variables)]
    return step, tuple(values)


def _denoising(network: keras.Model):
    import jax

    optimizer = keras.optimizers.Adam(5e-4, global_clipnorm=1.0)
    optimizer.build(network.trainable_variables)
    place = [variable is optimizer._learning_rate for variable in optimizer.variables].index(True)

    def loss_of(weights, real, key):
        level_key, noise_key = jax.random.split(key)
        variance = jax.random.uniform(level_key, (len(real), 1)) ** 2 * 0.998 + 0.001
        noise = jax.random.normal(noise_key, real.shape)
        noisy = ops.sqrt(1 - variance) * 5 * real + ops.sqrt(variance) * noise
        inputs = {"samples": noisy, "mel": log_mel(real), "level": ops.log(variance)}
        return ops.mean(ops.abs(network.stateless_call(weights, [], inputs)[0] - noise))

    @jax.jit
    def step(state, real, rate, count, _):
        weights, variables = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, real, jax.random.key(count))
        variables = [*variables[:place], rate, *variables[place + 1 :]]
        weights, variables = optimizer.stateless_apply(variables, gradient, weights)
        return (weights, variables), {"noise": loss}

    return step, ([v.value for v in network.trainable_variables], [v.value for v in optimizer.variables])


# --- use ------------------------------------------------------------------------------------------------------------
def vocode(network: keras.Model, clips: list[np.ndarray], seed: int = 0, batch: int = 16) -> list[np.ndarray]:
    """The twin of each voice: float32 (T,) at 16 kHz, as long as the voice."""
    longest = -(-max(len(clip) for clip in clips) // HOP) * HOP
    padded = np.stack([np.pad(clip, (0, longest - len(clip))) for clip in clips]).astype(np.float32)
    if network.name == "vocos":  # its inverse transform needs the number of frames
        whole = vocos(frames=longest // HOP)
        whole.set_weights(network.get_weights())
        network = whole
    made = []
    for start in range(0, len(clips), batch):
        part = np.resize(padded[start : start + batch], (batch, longest))  # one shape: one compilation
        mel = ops.convert_to_numpy(log_mel(part))
        made += list(_denoised(network, mel, seed + start) if network.name == "diffusion"
                     else network.predict(mel, batch_size=batch, verbose=0))
    return [samples[: len(clip)] for samples, clip in zip(made, clips, strict=False)]


def _denoised(network: keras.Model, mel: np.ndarray, seed: int) -> np.ndarray:
    """Deterministic steps from noise to samples (Song et al. 2021)."""
    x = np.random.default_rng(seed).standard_normal((len(mel), mel.shape[1] * HOP)).astype(np.float32)
    for variance, after in zip(NOISE_STEPS, (*NOISE_STEPS[1:], 0.0), strict=True):
        level = np.full((len(mel), 1), np.log(variance), np.float32)
        noise = network.predict({"samples": x, "mel": mel, "level": level}, batch_size=len(mel), verbose=0)
        clean = np.clip((x - np.sqrt(variance) * noise) / np.sqrt(1 - variance), -5, 5)
        x = np.sqrt(1 - after) * clean + np.sqrt(after) * noise
    return x / 5
