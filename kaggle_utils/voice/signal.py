"""Prepare a voice for the networks: resampling, canonical form, windows with speech; spectrograms.

Sound is read through moviepy's ffmpeg, which also resamples. ``AudioFileClip(path, fps=...)`` is not used.
Its ``to_soundarray`` returns a constant on moviepy 2.2 and fails on 1.0.3 with numpy 2. For a lower rate it
takes every n-th sample, which causes aliasing.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import fft, signal

from ..media.sound import REFERENCE_RATE, REFERENCE_SAMPLES, SAMPLE_RATE, mixed
from . import speech

WINDOW_SAMPLES = 64600  # 4.04 s, the input of RawNet2 and AASIST
SILENCE = 10 ** (-60 / 20)  # peak of full scale (−60 dBFS)
SPEECH_LEVEL = 10 ** (-26 / 20)  # RMS of full scale (−26 dBov, as ITU-T P.56 material is played)
MOST = 8  # maximum number of scored windows per voice, evenly spread
MARGIN_S = 0.25  # kept before the first and after the last speech
LOUDEST_TO_EDGE = 10 ** (-35 / 20)  # a frame at the ends this far below the loudest frame is silence


# --- canonical form -----------------------------------------------------------------------------------------
def to_mono(samples: np.ndarray, sample_rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mix to one channel and resample to ``target_rate``.

    Args:
        samples: (T,) or (T, channels), float in [-1, 1] or integers, which are divided by full scale.
        sample_rate, target_rate: in Hz.

    Returns:
        float32 (T · target_rate / sample_rate,).

    Raises:
        ValueError: another shape or type, a value that is not finite, or a rate that is not positive.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] < samples.shape[1]):
        raise ValueError(f"samples: found shape {samples.shape}, expected (T,) or (T, channels)")
    if sample_rate <= 0 or target_rate <= 0:
        raise ValueError(f"sampling rates: found {sample_rate} and {target_rate} Hz, expected positive ones")
    mono = _to_float(samples)
    mono = mixed(mono) if mono.ndim == 2 else mono
    if not np.isfinite(mono).all():
        raise ValueError("samples: found NaN or infinity, expected finite values")
    if sample_rate == target_rate or not len(mono):
        return mono
    ratio = Fraction(target_rate / sample_rate).limit_denominator(2000)
    return signal.resample_poly(mono, ratio.numerator, ratio.denominator, window=("kaiser", 8.0)).astype(
        np.float32
    )


def _to_float(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:  # zero is 128 in 8-bit WAV
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.signedinteger):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if np.issubdtype(samples.dtype, np.floating):
        return samples.astype(np.float32)
    raise ValueError(f"samples: found type {samples.dtype}, expected float, signed integers or uint8")


def is_silent(samples: np.ndarray) -> bool:
    """Whether float samples (T,) never exceed −60 dBFS, apart from a constant offset."""
    return not len(samples) or bool(np.abs(samples - samples.mean()).max() < SILENCE)


def canonical(samples: np.ndarray, rate: int) -> np.ndarray:
    """The canonical form of a voice, without clues to the class that come from the recording or the file.

    The voice is filtered to 60 Hz to 0.45 × rate (no DC, hum or resampler edges), trimmed of silence at both
    ends, and scaled to an RMS of −26 dBFS. Both classes get the same treatment, in training and in scoring.
    In some data sets, silence, level or file format alone separate the classes (Müller et al. 2021).

    Args:
        samples: float (T,).
        rate: in Hz.

    Returns:
        float32 (up to T,); empty when ``samples`` are silent.
    """
    return canonical_from(samples, rate)[0]


def canonical_from(samples: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """The canonical voice, and its start time in ``samples``, in s."""
    if is_silent(samples):
        return np.zeros(0, np.float32), 0.0
    band = signal.butter(4, (60, 0.45 * rate), "bandpass", fs=rate, output="sos")
    filtered = signal.sosfilt(band, samples - samples.mean())
    start, stop = _voiced_span(filtered, rate)
    voiced = filtered[start:stop]
    rms = math.sqrt(np.mean(np.square(voiced)))
    return (voiced * (SPEECH_LEVEL / max(rms, 1e-9))).astype(np.float32), start / rate


def _voiced_span(samples: np.ndarray, rate: int) -> tuple[int, int]:
    """The span from the first to the last frame of 20 ms that is within 35 dB of the loudest."""
    frame = min(rate // 50, len(samples))
    energy = np.square(samples[: len(samples) // frame * frame]).reshape(-1, frame).mean(axis=1)
    loud = np.flatnonzero(energy >= energy.max() * LOUDEST_TO_EDGE**2)
    return loud[0] * frame, (loud[-1] + 1) * frame


def windows(samples: np.ndarray, length: int = WINDOW_SAMPLES, most: int = MOST) -> np.ndarray:
    """Split a voice into evenly spread windows of one length; a short voice is repeated to fill one window.

    Args:
        samples: (T,), not empty.
        most: maximum number of windows. By default they cover half a minute of sound at most.

    Returns:
        (n, length), in time order. Windows overlap as needed for the last one to end with the voice.
    """
    if len(samples) <= length:
        return np.resize(samples, (1, length))
    return np.stack([samples[start : start + length] for start in window_starts(len(samples), length, most)])


def window_starts(found: int, length: int = WINDOW_SAMPLES, most: int | None = MOST) -> np.ndarray:
    """First samples of the windows of a voice of ``found`` samples, int (n,); ``most`` None: cover it all."""
    count = -(-found // length) if most is None else min(-(-found // length), most)
    return np.linspace(0, max(found - length, 0), count).round().astype(int)


@dataclass(frozen=True)
class Heard:
    """The input of a voice network.

    Attributes:
        samples: the canonical voice from the first to the last speech, float32 (T,). rate: its rate in Hz.
        start_s: its start time in the recording, in s.
        starts: first samples of the windows with speech, int (n,), as positions in ``samples``.
        windows: float32 (n, length).
    """

    samples: np.ndarray
    rate: int
    start_s: float
    starts: np.ndarray
    windows: np.ndarray


def hear(samples: np.ndarray, sample_rate: int, reference: bool = False) -> Heard | None:
    """Prepare the input of a voice network from samples of any rate (see :func:`to_mono`).

    Args:
        reference: True for the study's network: windows of 30,000 samples at 8 kHz. Otherwise, windows have
            64,600 samples at 16 kHz.

    Returns:
        None if there is less than a second of speech. Windows with less than half a second of it are left
        out.
    """
    mono = to_mono(samples, sample_rate)
    spoken = np.zeros(0, bool) if is_silent(mono) else speech.speech_frames(mono)
    if speech.seconds_of_speech(spoken) < speech.LEAST_S:
        return None
    first, last = np.flatnonzero(spoken)[[0, -1]] + (0, 1)
    before_s = max(first * speech.FRAME / SAMPLE_RATE - MARGIN_S, 0)
    after_s = last * speech.FRAME / SAMPLE_RATE + MARGIN_S
    rate, length = (REFERENCE_RATE, REFERENCE_SAMPLES) if reference else (SAMPLE_RATE, WINDOW_SAMPLES)
    mono = to_mono(samples, sample_rate, rate)[round(before_s * rate) : round(after_s * rate)]
    voice, start_s = canonical_from(mono, rate)
    start_s += before_s
    starts = window_starts(len(voice), length, most=None)
    spoken_s = np.array([_spoken_s(spoken, start_s + start / rate, length / rate) for start in starts])
    starts = starts[spoken_s >= speech.LEAST_WINDOW_S]
    if not len(starts):
        return None
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, MOST).round().astype(int))]
    windows = np.stack([np.resize(voice[start : start + length], length) for start in starts])
    return Heard(voice, rate, start_s, starts, windows)


def _spoken_s(spoken: np.ndarray, start_s: float, length_s: float) -> float:
    """Seconds of speech in a window, counted in frames of 32 ms."""
    first, last = (round(time * SAMPLE_RATE / speech.FRAME) for time in (start_s, start_s + length_s))
    return speech.seconds_of_speech(spoken[first:last])


# --- spectrograms -------------------------------------------------------------------------------------------
def log_power(samples: np.ndarray, rate: int, fft_length: int = 512,
              hop: int = 160) -> tuple[np.ndarray, ...]:
    """Short-time power spectrum in dB relative to its loudest bin, floor −80 dB (Hann windows, centred).

    Returns:
        levels float32 (fft_length / 2 + 1, frames), times (frames,) in s, frequencies in Hz.
    """
    levels = _decibels(_power(samples, fft_length, hop))
    return levels, np.arange(levels.shape[1]) * hop / rate, np.linspace(0, rate / 2, fft_length // 2 + 1)


def log_mel(samples: np.ndarray, rate: int, bands: int = 80, fft_length: int = 512,
            hop: int = 160) -> tuple[np.ndarray, ...]:
    """As :func:`log_power`, in librosa's mel bands: levels (bands, frames), times in s, centres in Hz."""
    import librosa

    power = librosa.filters.mel(sr=rate, n_fft=fft_length, n_mels=bands) @ _power(samples, fft_length, hop)
    centres = librosa.mel_frequencies(bands + 2, fmax=rate / 2)[1:-1]
    return _decibels(power), np.arange(power.shape[1]) * hop / rate, centres


def lfcc(samples: np.ndarray, rate: int, bands: int = 20, fft_length: int = 512,
         hop: int = 160) -> np.ndarray:
    """Linear frequency cepstral coefficients and their first and second differences (Sahidullah et al. 2015).

    The front end of the ASVspoof baseline: log energy in ``bands`` evenly spaced triangles, DCT-II.

    Returns:
        float32 (3 · bands, frames).
    """
    filters = triangular_filters(np.linspace(0, rate / 2, bands + 2), rate, fft_length)
    static = fft.dct(np.log(filters @ _power(samples, fft_length, hop) + 1e-8), axis=0, norm="ortho")
    slope = np.gradient(static, axis=1)
    return np.concatenate([static, slope, np.gradient(slope, axis=1)]).astype(np.float32)


def triangular_filters(edges: np.ndarray, rate: int, fft_length: int) -> np.ndarray:
    """Overlapping triangles of height 1 between ``edges`` (bands + 2,) in Hz: (bands, fft_length / 2 + 1)."""
    frequencies = np.linspace(0, rate / 2, fft_length // 2 + 1)
    return np.stack(
        [np.interp(frequencies, edges[i : i + 3], (0, 1, 0), 0, 0) for i in range(len(edges) - 2)]
    )


def _power(samples: np.ndarray, fft_length: int, hop: int) -> np.ndarray:
    """(fft_length / 2 + 1, frames)."""
    padded = np.pad(
        samples, fft_length // 2, mode="reflect" if len(samples) > fft_length // 2 else "constant"
    )
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft_length)[::hop]
    return np.square(np.abs(fft.rfft(frames * signal.get_window("hann", fft_length), axis=1))).T


def _decibels(power: np.ndarray) -> np.ndarray:
    loudest = max(float(power.max()), 1e-10)
    return (10 * np.log10(np.maximum(power / loudest, 1e-8))).astype(np.float32)
