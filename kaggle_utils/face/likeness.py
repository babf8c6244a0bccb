"""Decide by colours and shades whether two frames show the same scene and two crops the same head.

The limits were set on 22 clips of DFDC, FaceForensics++ and the web, on frames about a second apart. All
pairs from one clip pass. Of the pairs from two clips, 2 % of the frames and 0.1 % of the heads pass.
"""

from collections.abc import Sequence

import cv2
import numpy as np

SCENE, HEAD = 64, 32  # px, side of the thumbnails
BINS = 8  # of each of the three channels of Lab
SAME_SCENE = 0.62  # minimum shared fraction of the colours of two frames
SAME_HEAD, SAME_SHADES = 0.72, 0.33  # the same for two heads, and the minimum correlation of their shades
TURNED_HEAD = 0.6  # minimum shared fraction of the colours if a head has turned or is partly covered
HEAD_SIDE = 1.6  # side of the square around a head, in multiples of the tight square


class Looks:
    """Compares the frames of one clip and the heads in them; each thumbnail is made once, on demand.

    Args:
        frames: uint8 RGB pictures (H, W, 3).
    """

    def __init__(self, frames: Sequence[np.ndarray]):
        self._frames, self._scenes, self._heads = frames, {}, {}

    def same_scene(self, one: int, other: int) -> bool:
        """Whether two frames may belong to one shot, or to shots of one scene."""
        return _shared(self._scene(one), self._scene(other)) >= SAME_SCENE

    def same_head(self, one: tuple[int, np.ndarray], other: tuple[int, np.ndarray],
                  turned: bool = False) -> bool:
        """Whether two squares, each given as frame and tight box, may show one head, ``turned`` or not."""
        (colours, shades), (colours_2, shades_2) = self._head(*one), self._head(*other)
        shared = _shared(colours, colours_2)
        if turned:
            return shared >= TURNED_HEAD
        return shared >= SAME_HEAD and float((shades * shades_2).sum()) >= SAME_SHADES

    def _scene(self, frame: int) -> np.ndarray:
        if frame not in self._scenes:
            self._scenes[frame] = _colours(_thumbnail(self._frames[frame], SCENE))
        return self._scenes[frame]

    def _head(self, frame: int, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = frame, tuple(box)
        if key not in self._heads:
            x, y, side, _ = box + box[2] * (HEAD_SIDE - 1) * np.array([-0.5, -0.5, 1, 1])
            columns, rows = (np.clip([start, start + side], 0, size).astype(int)
                             for start, size in zip((x, y), self._frames[frame].shape[1::-1], strict=True))
            part = self._frames[frame][rows[0]:rows[1], columns[0]:columns[1]]
            small = _thumbnail(part if part.size else self._frames[frame], HEAD)
            shades = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
            shades -= shades.mean() if np.ptp(shades) else 0.0  # two plain squares are alike
            self._heads[key] = _colours(small), shades / max(float(np.linalg.norm(shades)), 1e-6)
        return self._heads[key]


def _thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)


def _colours(picture: np.ndarray) -> np.ndarray:
    """The colour histogram of a picture, float32 (BINS³,), sum 1."""
    lab = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)
    counts = cv2.calcHist([lab], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3)
    return counts.ravel() / counts.sum()


def _shared(one: np.ndarray, other: np.ndarray) -> float:
    """Histogram intersection: the fraction of colours that two pictures share (Swain and Ballard 1991)."""
    return float(np.minimum(one, other).sum())
