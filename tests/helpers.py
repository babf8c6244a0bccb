"""What several tests share."""

from pathlib import Path

import numpy as np

from kaggle_utils.datasets.drawing import blend_mask
from kaggle_utils.datasets.miniature import clip_facts


def clip_mask(folder: Path, filename: str, frame_index: int) -> np.ndarray:
    """Where a frame of a miniature clip is altered: the blend mask, float32 (H, W) in 0..1; zeros when nowhere."""
    facts = clip_facts(folder, filename)
    if facts["fake_face"] is None:
        return np.zeros((facts["height"], facts["width"]), np.float32)
    return blend_mask(facts["height"], facts["width"], facts["faces"][facts["fake_face"]][frame_index])
