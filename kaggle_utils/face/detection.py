"""Find faces with MTCNN (Zhang et al. 2016) on downscaled frames.

Boxes are x, y, width, height in pixels of the source frame, as floats, and may extend beyond the frame.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

PNET_CELL = 12  # px, side of P-Net's window
PYRAMID_START, PYRAMID_FACTOR = 20, 0.709  # the package's: smallest face in px, step between levels
MOST_WINDOWS, MOST_PROPOSALS = 800, 240  # per picture, of a level and of P-Net; usual: up to 280 and 180
MOST_FACES = 48  # per picture, the largest: the four most prominent people are followed
CROPS = 128  # that R-Net and O-Net take at once
PNET_THRESHOLD, PNET_NMS, PYRAMID_NMS = 0.6, 0.5, 0.7  # the package's defaults


@dataclass(eq=False)
class Detection:
    """A face in a frame.

    ``box`` float (4,) x, y, width, height; ``confidence`` in [0, 1]; ``landmarks`` float (5, 2) in source
    pixels: eye, eye, nose, mouth corner, mouth corner, each pair from left to right in the picture.
    """

    box: np.ndarray
    confidence: float
    landmarks: np.ndarray

    @property
    def side(self) -> float:
        """Geometric mean of the box's width and height, in pixels."""
        return float(np.sqrt(self.box[2] * self.box[3]))

    @property
    def centre(self) -> np.ndarray:
        """x, y of the box's centre, in pixels."""
        return self.box[:2] + self.box[2:] / 2


@dataclass(eq=False)
class Stages:
    """The output of each MTCNN stage; boxes (n, 5): x, y, width, height in pixels, confidence."""

    pyramid: list[tuple[float, np.ndarray]]  # scale and uint8 RGB picture of each level
    candidates: list[np.ndarray]  # P-Net's windows, level by level
    proposals: np.ndarray  # after non-maximum suppression
    refined: np.ndarray  # after R-Net
    faces: list[Detection]  # after O-Net


class FaceFinder:
    """Finds faces with MTCNN on downscaled frames; the networks load once, at the first call.

    Args:
        long_side: frames with a longer side are shrunk to it, in pixels; None searches at full size.
        smallest: skip pyramid levels that only find faces below this share of the long side; 0 keeps all.
        batch: number of frames of one size that go through the networks together.
    """

    def __init__(self, long_side: int | None = 640, smallest: float = 1 / 25, batch: int = 5,
                 device: str = "CPU:0"):
        self.long_side, self.smallest, self.batch, self.device = long_side, smallest, batch, device

    def __call__(self, frames: Iterable[np.ndarray]) -> list[list[Detection]]:
        """The faces of each frame, most confident first; of a crowd the ``MOST_FACES`` largest.

        Args:
            frames: uint8 RGB pictures (H, W, 3), of any sizes.

        Raises:
            ValueError: a frame is anything else.
        """
        small = [self._shrink(frame) for frame in frames]
        found: list[list[Detection]] = [[] for _ in small]
        for shape in dict.fromkeys(picture.shape for picture, _ in small):
            alike = [index for index, (picture, _) in enumerate(small) if picture.shape == shape]
            for start in range(0, len(alike), self.batch):
                chunk = alike[start : start + self.batch]
                rows = self._search(np.stack([small[index][0] for index in chunk])).faces
                for place, index in enumerate(chunk):
                    faces = _detections(rows[rows[:, 0] == place], small[index][1])
                    least = sorted((face.side for face in faces), reverse=True)[:MOST_FACES]
                    found[index] = [face for face in faces if face.side >= least[-1]]
        return found

    def stages(self, frame: np.ndarray) -> Stages:
        """Run MTCNN on one uint8 RGB picture (H, W, 3) and return each stage's output, in source pixels."""
        from mtcnn.utils.images import scale_images

        picture, ratio = self._shrink(frame)
        found = self._search(picture[None])
        pyramid = [(scale, scale_images(picture, scale).numpy().astype(np.uint8)) for scale in found.scales]
        candidates = [_boxes(rows, ratio) for rows in found.candidates]
        return Stages(pyramid, candidates, _boxes(found.proposals, ratio), _boxes(found.refined, ratio),
                      _detections(found.faces, ratio))

    @cached_property
    def _stages(self) -> list:
        """The package's three stages with compiled networks: uncompiled, MTCNN mostly waits for Python."""
        import keras
        import tensorflow as tf

        if keras.backend.backend() != "tensorflow":
            raise RuntimeError("mtcnn needs Keras on TensorFlow, found the backend "
                               f"{keras.backend.backend()!r}: unset KERAS_BACKEND to extract faces")
        from mtcnn import MTCNN

        stages = MTCNN(device=self.device).stages
        for stage, side in zip(stages, (None, 24, 48), strict=True):
            pictures = tf.TensorSpec((None, side, side, 3), tf.float32)
            whole = tf.function(stage.model.__call__, input_signature=[pictures])
            stage._model = _in_parts(whole) if side else whole
        return stages

    def _shrink(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The downscaled frame, and the source pixels per pixel of it in x and y."""
        if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
                and frame.shape[2] == 3):
            found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"frame: expected a uint8 RGB picture (H, W, 3), found {found}")
        height, width = frame.shape[:2]
        if self.long_side is None or max(height, width) <= self.long_side:
            return frame, np.ones(2)
        scale = self.long_side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        ratio = np.array([width / size[0], height / size[1]])
        return cv2.resize(frame, size, interpolation=cv2.INTER_AREA), ratio

    def _scales(self, height: int, width: int) -> np.ndarray:
        """The package's pyramid scales, without the levels that only find faces below the smallest wanted."""
        from mtcnn.utils.images import build_scale_pyramid

        if min(height, width) < PYRAMID_START:
            return np.empty(0)
        scales = build_scale_pyramid(width, height, PYRAMID_START, PYRAMID_FACTOR)
        return scales[scales * self.smallest * max(height, width) <= PNET_CELL]

    def _search(self, pictures: np.ndarray) -> "_Search":
        """Run the package's steps on our pyramid, for uint8 pictures (n, H, W, 3) of one size."""
        import tensorflow as tf
        from mtcnn.utils import bboxes, images

        propose, refine, conclude = self._stages
        scales = self._scales(*pictures.shape[1:3])
        with tf.device(self.device):
            tensor = images.normalize_images(tf.cast(pictures, tf.float32))
            candidates = []
            for scale in scales:
                offsets, scores = propose.model(images.scale_images(tensor, scale))
                rows = _first(bboxes.generate_bounding_box(offsets, scores, PNET_THRESHOLD), MOST_WINDOWS)
                candidates.append(bboxes.upscale_bboxes(rows, np.full(len(pictures), scale)))
            kept = [bboxes.smart_nms_from_bboxes(rows, PNET_NMS, initial_sort=False) for rows in candidates]
            kept = bboxes.smart_nms_from_bboxes(np.concatenate([np.empty((0, 6)), *kept]), PYRAMID_NMS)
            proposals = bboxes.resize_to_square(_first(kept, MOST_PROPOSALS))
            refined, faces = proposals, np.empty((0, 16))
            if len(proposals):
                refined = refine(images_normalized=tensor, bboxes_batch=proposals)
            if len(refined):
                faces = conclude(images_normalized=tensor, bboxes_batch=refined)
        return _Search(scales, candidates, proposals, refined, faces)


class _Search(NamedTuple):
    """Like ``Stages``, for several pictures, as rows: picture, x1, y1, x2, y2, confidence, landmarks."""

    scales: np.ndarray
    candidates: list[np.ndarray]
    proposals: np.ndarray
    refined: np.ndarray
    faces: np.ndarray


def _first(rows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` rows of each picture, the most confident ones: a wall of faces has thousands."""
    if len(rows) <= count:
        return rows
    order = np.argsort(-rows[:, 5], kind="stable")
    best = [order[rows[order, 0] == picture][:count] for picture in np.unique(rows[:, 0])]
    return rows[np.sort(np.concatenate(best))]


def _in_parts(network: Callable) -> Callable:
    """``network``, which returns a list of tensors, on ``CROPS`` crops at a time, to bound its memory."""
    import tensorflow as tf

    def run(crops) -> list:
        parts = [network(crops[start : start + CROPS]) for start in range(0, len(crops), CROPS)]
        return [tf.concat(tensors, 0) for tensors in zip(*parts, strict=True)]

    return run


def _detections(rows: np.ndarray, ratio: np.ndarray) -> list[Detection]:
    """One picture's O-Net rows (n, 16) in source pixels, most confident first."""
    rows = rows[np.argsort(-rows[:, 5], kind="stable")]
    boxes = _boxes(rows, ratio)
    landmarks = rows[:, 6:].reshape(-1, 2, 5).transpose(0, 2, 1) * ratio
    return [Detection(box[:4], float(box[4]), points) for box, points in zip(boxes, landmarks, strict=True)]


def _boxes(rows: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """The package's rows as (n, 5): x, y, width, height in source pixels, confidence."""
    return np.column_stack([rows[:, 1:3] * ratio, (rows[:, 3:5] - rows[:, 1:3]) * ratio, rows[:, 5]])
