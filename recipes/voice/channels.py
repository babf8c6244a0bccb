"""Test channels for voices: codecs, band limits, noise and a room, the same for every run."""

from pathlib import Path

import numpy as np
from scipy import signal

from kaggle_utils.media.sound import SAMPLE_RATE
from recipes.voice.data import CODECS, Voices, noisy, prepared, read_voices, recoded, to_int16

CHANNELS = (
    "as recorded",
    "aac_64",
    "mp3_48",
    "opus_24",
    "telephone",
    "low-pass 3.4 kHz",
    "22 kHz",
    "noise 15 dB",
    "room",
)


def heard_through(voices: Voices, channel: str, processes: int = 1) -> Voices:
    """Pass recorded voices at 16 kHz through one of ``CHANNELS``; returns canonical voices."""
    if channel in CODECS:
        samples = recoded(voices.samples, channel, voices.rate, processes)
    else:
        samples = [_heard(channel, samples, seed) for seed, samples in enumerate(voices.samples)]
    return prepared(Voices(voices.table, samples), processes=processes)


def _heard(channel: str, samples: np.ndarray, seed: int) -> np.ndarray:
    match channel:
        case "as recorded":
            return samples
        case "noise 15 dB":
            return noisy(samples, 15, seed)
        case "room":
            return to_int16(_in_a_room(samples / np.float32(32768), seed))
        case "low-pass 3.4 kHz":
            return to_int16(
                signal.sosfilt(signal.butter(8, 3400, fs=SAMPLE_RATE, output="sos"), samples / 32768)
            )
        case "22 kHz":
            there = signal.resample_poly(samples / 32768, 441, 320)
            return to_int16(signal.resample_poly(there, 320, 441))
    raise ValueError(f"channel: found {channel!r}, expected one of {', '.join(CHANNELS)}")


def _in_a_room(samples: np.ndarray, seed: int) -> np.ndarray:
    """Add reverberation 3 dB below the direct sound: noise that decays by 60 dB in 0.5 s (Moorer 1979)."""
    seconds = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    tail = np.random.default_rng(seed).standard_normal(len(seconds)) * np.exp(-6.9 * seconds / 0.5)
    tail *= 10 ** (-3 / 20) / np.sqrt(np.sum(np.square(tail)))
    tail[0] += 1
    wet = signal.fftconvolve(samples, tail)[: len(samples)]
    return wet * min(1.0, 0.99 / max(float(np.abs(wet).max()), 1e-6))


def make_channels(folder: str | Path, corpus: Voices, output: str | Path, processes: int = 1) -> None:
    """Write the voices of ``corpus`` through each channel to ``CHANNEL.npz`` in ``output``, if missing.

    Args:
        folder: the source of ``corpus`` (``data.read_voices``): channels are applied to the recordings.
    """
    lacking = [channel for channel in CHANNELS if not channel_file(output, channel).is_file()]
    if not lacking:
        return
    recorded = read_voices(folder)
    place = {
        name: row for row, name in enumerate(zip(recorded.table["page"], recorded.table["file"], strict=True))
    }
    names = zip(corpus.table["page"], corpus.table["file"], strict=True)
    recorded = recorded.take(np.array([place[name] for name in names]))
    for channel in lacking:
        heard_through(recorded, channel, processes).save(channel_file(output, channel))


def channel_file(folder: str | Path, channel: str) -> Path:
    return Path(folder) / f"{channel.replace(' ', '_')}.npz"


def with_channels(voices: Voices, folder: str | Path) -> Voices:
    """Canonical voices whose copies are their versions through each channel, read from ``folder``."""
    heard = [Voices.load(channel_file(folder, channel)).samples for channel in CHANNELS[1:]]
    copies = [[copy for copy in some if len(copy)] for some in zip(*heard, strict=True)]
    return Voices(voices.table, voices.samples, voices.rate, copies)
