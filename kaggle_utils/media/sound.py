"""Read the sound track of a clip through ffmpeg, at a known rate."""

import re
from pathlib import Path

import numpy as np

from .files import CONTAINERS, MP4_BOXES, UnreadableClip, check_file, run_ffmpeg

REFERENCE_RATE = 8000  # Hz, for the study's 1D network
REFERENCE_SAMPLES = 30000
SAMPLE_RATE = 16000  # Hz, for the spectrogram networks: vocoders leave traces above 4 kHz
LONGEST = 600.0  # s
MOST_CHANNELS = 64
LOST = 0.25  # a mix below this fraction of its loudest channel has lost the voice: the channels cancel out
LOUD = 0.06  # a mix with at least this RMS has not

DEMUXERS = f"{CONTAINERS},wav,flac,mp3,aac,aiff,caf,au"
MAGIC = (b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2",
         b"\xff\xf1", b"\xff\xf9", b"FLV", b"0&\xb2u", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"G",
         b"FORM", b"caff", b".snd")


# --- reading ------------------------------------------------------------------------------------------------
def read_voice(path: str | Path, sample_rate: int = SAMPLE_RATE,
               seconds: float | None = LONGEST) -> np.ndarray | None:
    """Read the sound track of a clip, mixed to mono: float32 (T,) in [-1, 1]; None without a sound track.

    If the two channels of a stereo track cancel each other out, the louder one is returned.

    Args:
        sample_rate: in Hz; ffmpeg resamples with a low-pass filter.
        seconds: how much to read from the start; None: all of it (64 kB per second at 16 kHz).

    Raises:
        UnreadableClip: not a clip or sound file, or its sound track cannot be decoded.
    """
    samples, listed = _decode(Path(path), sample_rate, 1, seconds)
    if samples is None:
        return None
    if re.search(r"Audio: .*stereo", listed) and _rms(samples) < LOUD:
        channels, _ = _decode(Path(path), sample_rate, 2, seconds)
        if channels is not None and _rms(samples) < LOST * max(_rms(channels[:, 0]), _rms(channels[:, 1])):
            return mixed(channels)
    return samples[:, 0]


def mixed(samples: np.ndarray) -> np.ndarray:
    """Mix channels (T, channels) to mono (T,); if they cancel out, return the loudest one."""
    mix = samples.mean(axis=1)
    loudest = max(samples.T, key=_rms)
    return loudest if _rms(mix) < LOST * _rms(loudest) else mix


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples)))) if samples.size else 0.0


def read_reference_voice(path: str | Path) -> np.ndarray | None:
    """The study's input (its figure 1): left channel at 8 kHz, the first 3.75 s, zero-padded.

    float32 (30000, 1) in [-1, 1], or None without a sound track.

    Raises:
        UnreadableClip: as :func:`read_voice`.
    """
    samples, _ = _decode(Path(path), REFERENCE_RATE, 2, REFERENCE_SAMPLES / REFERENCE_RATE)
    return None if samples is None else fixed_length(samples[:, 0], REFERENCE_SAMPLES)[:, None]


def fixed_length(samples: np.ndarray, length: int) -> np.ndarray:
    """The first ``length`` samples (T,), zero-padded."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _decode(path: Path, sample_rate: int, channels: int,
            seconds: float | None) -> tuple[np.ndarray | None, str]:
    """Samples float32 (T, channels), or None without a sound track, and ffmpeg's description of the file."""
    _check_container(path)
    length = [] if seconds is None else ["-t", seconds]

    def run(*mix: object) -> tuple[bytes, bytes]:
        return run_ffmpeg(path, "-vn", "-sn", "-dn", *mix, "-ac", channels, "-ar", sample_rate, *length,
                          "-f", "s16le", "-", demuxers=DEMUXERS, kept="both")

    decoded, listed = run()
    if not decoded and (many := re.search(rb"Audio: .*, (\d+) channels", listed)):
        count = min(int(many[1]), MOST_CHANNELS)
        mean = "+".join(f"{1 / count:.6f}*c{channel}" for channel in range(count))
        decoded, listed = run("-af", f"pan=mono|c0={mean}")
    samples = np.frombuffer(decoded[: len(decoded) // (2 * channels) * 2 * channels], "<i2")
    if len(samples):
        return (samples / np.float32(32768)).reshape(-1, channels), listed.decode(errors="replace")
    if _has_sound_track(path):
        raise UnreadableClip(path, "its sound track cannot be decoded")
    return None, ""


def _check_container(path: Path) -> None:
    """Accept only clips and sound files: a playlist named like a clip could lead ffmpeg to other files."""
    check_file(path)
    with open(path, "rb") as file:
        start = file.read(16)
    if not (start.startswith(MAGIC) or start[4:8] in MP4_BOXES):
        raise UnreadableClip(path, "not a clip or sound file: none of the known containers")


def _has_sound_track(path: Path) -> bool:
    """Whether ffmpeg, which decoded no sound from a file, lists a sound track in it."""
    found = run_ffmpeg(path, demuxers=DEMUXERS, kept="stderr")
    tracks = re.findall(rb"^ +Stream #.*: (Audio|Video): ", found, re.MULTILINE)
    if not tracks:
        raise UnreadableClip(path, "ffmpeg finds no clip or sound in it")
    return b"Audio" in tracks


def sound_format(path: str | Path) -> str | None:
    """ffmpeg's description of the first sound track, such as "aac (LC), 44100 Hz, stereo"; None without one.

    Raises:
        UnreadableClip: not a clip or sound file.
    """
    _check_container(Path(path))
    listed = run_ffmpeg(Path(path), demuxers=DEMUXERS, kept="stderr").decode(errors="replace")
    found = re.search(r"^ +Stream #.*: Audio: (.+)", listed, re.MULTILINE)
    return ", ".join(re.sub(r" \(\w+ / 0x\w+\)", "", found[1]).split(", ")[:3]) if found else None
