"""Make spoofed speech from bona fide speech: copy-synthesis with the vocoders of signal processing.

A vocoder takes a recording apart (spectrogram, source and filter) and builds it anew: same words, same speaker, same
length, another generator. The twin teaches a detector the traces of synthesis and nothing else (Wang and Yamagishi
2023).

WORLD needs the optional package ``pyworld``.
"""

from collections.abc import Callable

import numpy as np
from scipy import fft, linalg, signal

from .signal import triangular_filters

FRAME_S, STEP_S = 0.032, 0.008  # analysis frames of the source-filter vocoder
PITCH_HZ = (60, 400)


def griffin_lim(samples: np.ndarray, rate: int, seed: int, bands: int | None = 80, iterations: int = 32,
                fft_length: int = 1024, hop: int = 256) -> np.ndarray:
    """Magnitudes of ``bands`` mel bands (None: of all FFT bins), phases by fast Griffin-Lim (Perraudin et al. 2013)."""
    magnitude = np.abs(stft(samples, fft_length, hop))
    if bands is not None:
        filters = mel_filters(bands, rate, fft_length)
        magnitude = np.maximum(np.linalg.pinv(filters) @ (filters @ magnitude), 0)
    phase, before = np.exp(2j * np.pi * np.random.default_rng(seed).random(magnitude.shape)), 0
    for _ in range(iterations):
        consistent = stft(istft(magnitude * phase, fft_length, hop, len(samples)), fft_length, hop)
        phase, before = _unit(consistent + 0.99 * (consistent - before)), consistent
    return istft(magnitude * phase, fft_length, hop, len(samples))


def mel_filters(bands: int, rate: int, fft_length: int, top: float | None = None) -> np.ndarray:
    """Triangles of height 1, evenly spaced on O'Shaughnessy's mel scale up to ``top`` Hz: (bands, fft_length / 2 + 1)."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + (top or rate / 2) / 700), bands + 2) / 2595) - 1)
    return triangular_filters(edges, rate, fft_length)


def mel_corrected(samples: np.ndarray, target: np.ndarray, rate: int, rounds: int = 3, bands: int = 80) -> np.ndarray:
    """A twin whose mel spectrogram is that of its recording ``target``, as a well-trained vocoder's would be.

    What is left to tell them apart is what the mel spectrogram does not hold: phase and fine structure.
    """
    filters = mel_filters(bands, rate, 1024)
    wanted, weight = filters @ np.abs(stft(target, 1024, 256)), np.maximum(filters.sum(axis=0), 1e-6)
    for _ in range(rounds):
        spectrum = stft(samples, 1024, 256)
        gain = np.clip((wanted + 1e-5) / (filters @ np.abs(spectrum) + 1e-5), 0.05, 20)
        samples = istft(spectrum * (filters.T @ gain / weight[:, None]), 1024, 256, len(target))
    return samples.astype(np.float32)


def stft(samples: np.ndarray, fft_length: int, hop: int) -> np.ndarray:
    """Hann windows, centred: complex (fft_length / 2 + 1, frames); ``hop`` is a quarter of ``fft_length`` or less."""
    padded = np.pad(samples, (fft_length // 2, fft_length // 2 + -len(samples) % hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft_length)[::hop]
    return fft.rfft(frames * signal.get_window("hann", fft_length), axis=1).T


def istft(spectrum: np.ndarray, fft_length: int, hop: int, length: int) -> np.ndarray:
    """The least-squares inverse of ``stft`` (Griffin and Lim 1984): (length,)."""
    window, overlap = signal.get_window("hann", fft_length), fft_length // hop
    frames = (fft.irfft(spectrum.T, axis=1) * window).reshape(-1, overlap, hop)
    blocks, weights = np.zeros((len(frames) + overlap - 1, hop)), np.zeros((len(frames) + overlap - 1, hop))
    for i in range(overlap):
        blocks[i : i + len(frames)] += frames[:, i]
        weights[i : i + len(frames)] += np.square(window).reshape(overlap, hop)[i]
    samples = (blocks / np.maximum(weights, 1e-9)).ravel()[fft_length // 2 :]
    return np.pad(samples, (0, max(0, length - len(samples))))[:length]


def _unit(spectrum: np.ndarray) -> np.ndarray:
    return spectrum / np.maximum(np.abs(spectrum), 1e-12)


def world(samples: np.ndarray, rate: int, seed: int, coded: int | None = None) -> np.ndarray:
    """WORLD (Morise et al. 2016): pitch, spectral envelope, aperiodicity; the envelope in ``coded`` coefficients."""
    import pyworld

    pitch, envelope, aperiodicity = pyworld.wav2world(samples.astype(np.float64), rate)
    if coded is not None:
        size = pyworld.get_cheaptrick_fft_size(rate)
        code = pyworld.code_spectral_envelope(envelope, rate, coded)
        envelope = pyworld.decode_spectral_envelope(code, rate, size)
    return pyworld.synthesize(pitch, envelope, aperiodicity, rate)


def linear_prediction(samples: np.ndarray, rate: int, seed: int, order: int = 20) -> np.ndarray:
    """Linear prediction (Atal and Hanauer 1971): pulses at the pitch or noise through an all-pole filter per frame."""
    random = np.random.default_rng(seed)
    size, step = int(FRAME_S * rate), int(STEP_S * rate)
    window = signal.get_window("hann", size)
    padded = np.pad(samples, (size // 2, size))
    result, next_pulse = np.zeros(len(padded)), 0
    for start in range(0, len(samples), step):
        frame = padded[start : start + size] * window
        predictor, gain, period = _analyse(frame, rate, order)
        source = np.zeros(size)
        if period:
            next_pulse = max(next_pulse, start)
            first = next_pulse - start
            source[first::period] = np.sqrt(period)
            next_pulse += -(-max(step - first, 0) // period) * period
        else:
            source = random.standard_normal(size)
        result[start : start + size] += signal.lfilter([gain], predictor, source) * window
    return result[size // 2 : size // 2 + len(samples)] / (window.sum() / step)


def _analyse(frame: np.ndarray, rate: int, order: int) -> tuple[np.ndarray, float, int]:
    """Predictor (order + 1,), gain, and the pitch period in samples (0: unvoiced) of a windowed frame."""
    correlation = signal.correlate(frame, frame, method="fft")[len(frame) - 1 :]
    power = correlation[0] + 1e-9
    lags = correlation[1 : order + 1]
    weights = linalg.solve_toeplitz(np.concatenate([[power * 1.0001], lags[:-1]]), lags)
    gain = np.sqrt(max(power - weights @ lags, 0) / len(frame) * 8 / 3)  # 8 / 3: the window's loss of power
    low, high = rate // PITCH_HZ[1], min(rate // PITCH_HZ[0], len(frame) - 1)
    period = low + int(np.argmax(correlation[low:high]))
    return np.concatenate([[1], -weights]), gain, period if correlation[period] > 0.35 * power else 0


def pitch_shift(samples: np.ndarray, rate: int, seed: int, semitones: float = 2.0) -> np.ndarray:
    """Up by ``semitones`` and back down: each way a phase vocoder, then resampling to the old length."""
    for factor in (2 ** (semitones / 12), 2 ** (-semitones / 12)):
        samples = signal.resample_poly(_stretch(samples, factor), 1000, round(1000 * factor))
    return samples


def time_stretch(samples: np.ndarray, rate: int, seed: int, factor: float = 1.25) -> np.ndarray:
    """Slower by ``factor`` and faster again with a phase vocoder."""
    return _stretch(_stretch(samples, factor), 1 / factor)


def _stretch(samples: np.ndarray, factor: float, fft_length: int = 1024) -> np.ndarray:
    """Phase vocoder (Flanagan and Golden 1966): ``factor`` times longer at the same pitch."""
    hop = fft_length // 4
    spectrum = stft(samples, fft_length, hop)
    places = np.arange(0, spectrum.shape[1] - 1, 1 / factor)
    left, share = places.astype(int), places % 1
    magnitude = (1 - share) * np.abs(spectrum[:, left]) + share * np.abs(spectrum[:, left + 1])
    advance = np.angle(spectrum[:, left + 1] * np.conj(spectrum[:, left]))
    phase = np.angle(spectrum[:, :1]) + np.cumsum(np.pad(advance, ((0, 0), (1, 0)))[:, :-1], axis=1)
    return istft(magnitude * np.exp(1j * phase), fft_length, hop, round(len(samples) * factor))

GENERATORS: dict[str, tuple[Callable, dict]] = {  # "family:variant" -> function and its options
    "griffin_lim:mel80": (griffin_lim, {"bands": 80, "iterations": 32}),
    "griffin_lim:mel80_8": (griffin_lim, {"bands": 80, "iterations": 8}),
    "griffin_lim:mel128": (griffin_lim, {"bands": 128, "iterations": 60, "fft_length": 2048}),
    "griffin_lim:linear": (griffin_lim, {"bands": None, "iterations": 60, "fft_length": 800, "hop": 200}),
    "world:full": (world, {}),
    "world:coded": (world, {"coded": 40}),
    "linear_prediction:20": (linear_prediction, {"order": 20}),
    "phase_vocoder:pitch": (pitch_shift, {}),
    "phase_vocoder:stretch": (time_stretch, {}),
}


def family(generator: str) -> str:
    """What is left out together in a leave-one-generator-out test: ``griffin_lim:mel80`` -> ``griffin_lim``."""
    return generator.partition(":")[0]


def copy_synthesis(samples: np.ndarray, rate: int, generator: str, seed: int = 0) -> np.ndarray:
    """The spoofed twin of a voice.

    Args:
        samples: float (T,) in [-1, 1].
        rate: in Hz.
        generator: a key of ``GENERATORS``.
        seed: of the phases or the noise that a generator starts from.

    Returns:
        float32 (T,) with the RMS of ``samples``.

    Raises:
        ValueError: no such generator.
    """
    if generator not in GENERATORS:
        raise ValueError(f"generator: found {generator!r}, expected one of {', '.join(GENERATORS)}")
    function, options = GENERATORS[generator]
    made = np.asarray(function(np.asarray(samples, np.float32), rate, seed, **options), np.float32)
    made = np.pad(made, (0, max(0, len(samples) - len(made))))[: len(samples)]
    level, target = (np.sqrt(np.mean(np.square(x, dtype=np.float64))) for x in (made, samples))
    return made * np.float32(target / max(level, 1e-9))
