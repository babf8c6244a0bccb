"""Synthesise the voices of the miniature data set: vowels and hisses from a source-filter model."""

import numpy as np

from .drawing import Person

SOUND_RATE = 16000  # Hz, of the synthesis; the clips hold 44.1 kHz AAC, like DFDC's
# First three formants of adult vowels in Hz (Peterson and Barney, 1952).
VOWELS = (
    (730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410),
    (660, 1720, 2410),
)


# --- sound --------------------------------------------------------------------------------------------------
def speak(person: Person, seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Babble: a glottal pulse train filtered by the formants of vowels, with hisses between them.

    Returns:
        samples, float64 (T,) at 16 kHz with a peak of 0.6; and the opening of the mouth at each sample, 0..1.
    """
    count = round(seconds * SOUND_RATE)
    glottis = _glottis(person.pitch, count, rng)
    samples, opening = rng.normal(0, 0.002, count), np.zeros(count)
    more = np.random.default_rng(count)  # of further hisses: with few of them, babble is not heard as speech
    start = int(rng.uniform(0.05, 0.15) * SOUND_RATE)
    while (length := int(rng.uniform(0.14, 0.28) * SOUND_RATE)) < count - start:
        window = np.hanning(length) ** 0.5
        vowel = np.array(VOWELS[rng.integers(len(VOWELS))]) * person.tract
        voiced = _formants(glottis[start:start + length], vowel) * window
        now = slice(start, start + length)
        samples[now] += voiced / np.abs(voiced).max() * rng.uniform(0.5, 1)
        opening[now] = np.maximum(opening[now], window * vowel[0] / (730 * person.tract))
        hissing = rng if rng.random() < 0.4 else more if more.random() < 0.7 else None
        if hissing is not None:
            hiss = _formants(hissing.normal(size=length // 3), (hissing.uniform(3000, 5500),))
            hiss *= np.hanning(length // 3)
            samples[start:start + length // 3] += 0.15 * hiss / np.abs(hiss).max()
        start += int(0.85 * length) + int((rng.random() < 0.2) * rng.uniform(0.08, 0.2) * SOUND_RATE)
    return 0.6 * samples / np.abs(samples).max(), opening


def _glottis(pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """The derivative of the glottal air flow: raised-cosine pulses whose pitch falls, sways and jitters."""
    times = np.arange(count) / SOUND_RATE
    sway = 1 + 0.08 * np.sin(2 * np.pi * rng.uniform(0.5, 1) * times + rng.uniform(0, 6))
    sway += 0.01 * np.sin(33 * times)
    jitter = np.repeat(rng.normal(1, 0.01, count // 100 + 1), 100)[:count]
    phase = np.cumsum(pitch * (1.08 - 0.16 * times / times[-1]) * sway * jitter) / SOUND_RATE % 1
    flow = np.where(phase < 0.6, 0.5 - 0.5 * np.cos(2 * np.pi * phase / 0.6), 0)
    return np.diff(flow, prepend=0) + rng.normal(0, 0.002, count)


def _formants(source: np.ndarray, frequencies: tuple[float, ...]) -> np.ndarray:
    """A cascade of two-pole resonators at ``frequencies`` in Hz (Klatt, 1980), applied to the spectrum."""
    length = 2 * len(source)  # room for the ringing
    delay = np.exp(-2j * np.pi * np.fft.rfftfreq(length))
    response = np.ones_like(delay)
    for index, frequency in enumerate(frequencies):
        radius = np.exp(-np.pi * (60 + 40 * index) / SOUND_RATE)
        poles = [1, -2 * radius * np.cos(2 * np.pi * frequency / SOUND_RATE), radius**2]
        response *= sum(poles) / (poles[0] + poles[1] * delay + poles[2] * delay**2)
    return np.fft.irfft(np.fft.rfft(source, length) * response, length)[:len(source)]


def resynthesize(samples: np.ndarray, seed: int = 0, bands: int = 48) -> np.ndarray:
    """A crude vocoder: keep ``bands`` mel bands, discard the phase and estimate it (Griffin and Lim, 1984).

    Args:
        samples: (T,) at 16 kHz.
    """
    import librosa
    from scipy import signal

    transform = signal.ShortTimeFFT(signal.get_window("hann", 512), hop=128, fs=SOUND_RATE)
    mel = librosa.filters.mel(sr=SOUND_RATE, n_fft=512, n_mels=bands)
    magnitude = np.maximum(np.linalg.pinv(mel) @ (mel @ np.abs(transform.stft(samples))), 0)
    phase = np.exp(2j * np.pi * np.random.default_rng(seed).random(magnitude.shape))
    for _ in range(12):
        consistent = transform.stft(transform.istft(magnitude * phase, k1=len(samples)))
        phase = np.exp(1j * np.angle(consistent))
    voice = transform.istft(magnitude * phase, k1=len(samples))
    return voice / np.abs(voice).max() * np.abs(samples).max()
