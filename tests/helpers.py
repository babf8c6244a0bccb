"""What several tests share."""

import json
import subprocess
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from kaggle_utils.datasets.drawing import blend_mask
from kaggle_utils.datasets.miniature import MARK


def clip_facts(folder: str | Path, filename: str) -> dict:
    """The entry of a clip in ``miniature.json``.

    Keys: ``label``, ``original``, ``fake_face`` (index of the altered face, or null), ``fake_voice``,
    ``sound``, ``turned``, ``width``, ``height``, ``fps``, and ``faces``: for each person, an ellipse per
    frame in the upright picture [centre x, centre y, half width, half height in pixels, degrees clockwise].
    """
    return json.loads((Path(folder) / MARK).read_text(encoding="utf-8"))["clips"][filename]


def clip_mask(folder: Path, filename: str, frame_index: int) -> np.ndarray:
    """Where a frame of a miniature clip is altered: the blend mask, float32 (H, W) in 0..1; zeros when
    nowhere.
    """
    facts = clip_facts(folder, filename)
    if facts["fake_face"] is None:
        return np.zeros((facts["height"], facts["width"]), np.float32)
    return blend_mask(facts["height"], facts["width"], facts["faces"][facts["fake_face"]][frame_index])


def ffmpeg(*arguments: object, stdin: bytes = b"") -> None:
    """Run ffmpeg; raises where it fails."""
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True, input=stdin)
