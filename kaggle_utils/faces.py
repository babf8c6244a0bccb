"""Faces of a clip: found by MTCNN on small frames, tracked from frame to frame, cut to one framing.

The detector is MTCNN (Zhang et al. 2016) in the Keras package ``mtcnn``: P-Net proposes windows over an image pyramid,
R-Net refines them, O-Net gives the final box, its confidence and five landmarks. The package and TensorFlow load when
the first frame is searched.

Boxes are x, y, width, height in pixels of the source frame, as floats, and may run over the frame's edge.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from . import video

TIGHT, REFERENCE = "tight", "reference"  # framings
ROWS, SIZE = 10, 256

TIGHT_SIDE = 0.8  # side of the tight square / height of MTCNN's box
TIGHT_DROP = 0.1  # the square's centre lies so much of the height below the box's centre
REFERENCE_MARGIN = 40  # source pixels on each side
CENTRAL_SHARE = 0.65  # of a crop's short side, where no face is found in it again

MAX_SHIFT = 1.0  # faces of two frames are one person within so many face sides,
MAX_SHIFT_ALONE = 3.0  # or so many where each is the only face of its frame,
MAX_GROWTH = 2.0  # and unless one is larger than the other by more than this factor
HELD_FRAMES = 2  # before a track's first and after its last detection, the nearest box holds for so many frames
SURE = 0.95  # a face seen in one frame only counts from this confidence on
MIN_WEIGHT = 0.2  # a track of less than this share of the main person's weight is dropped: MTCNN takes some clothes for faces

PNET_CELL = 12  # px, side of P-Net's window
PYRAMID_START, PYRAMID_FACTOR = 20, 0.709  # the package's pyramid: smallest face in px, and the step between levels
PNET_THRESHOLD, PNET_NMS, PYRAMID_NMS = 0.6, 0.5, 0.7  # the package's defaults


@dataclass(eq=False)
class Detection:
    """A face in a frame.

    ``box`` float (4,) x, y, width, height; ``confidence`` in [0, 1]; ``landmarks`` float (5, 2) in source pixels: the
    eye, then the other, nose, one corner of the mouth, the other, from left to right in the picture.
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
class Track:
    """One person: ``detections`` by frame index; ``id`` counts from 0, the main person."""

    id: int
    detections: dict[int, Detection] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """How often, how large and how surely the face was seen: sum over frames of its side × (2 confidence - 1)."""
        return sum(face.side * (2 * face.confidence - 1) for face in self.detections.values())

    def box_at(self, frame: int) -> tuple[np.ndarray, str] | None:
        """The face's box in a frame and its source, ``detected`` or ``interpolated``; None where it is unknown.

        Between two detections the box moves on a straight line; beyond the first and the last it holds for
        ``HELD_FRAMES`` frames.
        """
        if frame in self.detections:
            return self.detections[frame].box, "detected"
        known = sorted(self.detections)
        if not known or not known[0] - HELD_FRAMES <= frame <= known[-1] + HELD_FRAMES:
            return None
        boxes = np.stack([self.detections[index].box for index in known])
        return np.array([np.interp(frame, known, values) for values in boxes.T]), "interpolated"


@dataclass(eq=False)
class FaceCrops:
    """The crops of one person, row by row in time.

    ``images`` uint8 RGB (rows, 256, 256, 3); ``boxes`` float (rows, 4), where each was cut, in source pixels;
    ``sources``: ``detected``, ``interpolated`` (cut where the face must be) or ``fallback`` (a part of the picture);
    ``frame_indices`` int (rows,), positions in the list of frames; ``track``: the person's id, -1 for no face at all.
    """

    images: np.ndarray
    boxes: np.ndarray
    sources: list[str]
    frame_indices: np.ndarray
    track: int


@dataclass(eq=False)
class Stages:
    """What each stage of MTCNN keeps of one picture; boxes (n, 5): x, y, width, height in pixels, confidence."""

    pyramid: list[tuple[float, np.ndarray]]  # scale and picture (uint8 RGB) of each level
    candidates: list[np.ndarray]  # P-Net's windows, level by level
    proposals: np.ndarray  # those that non-maximum suppression leaves
    refined: np.ndarray  # after R-Net
    faces: list[Detection]  # after O-Net


class FaceFinder:
    """Finds faces with MTCNN on frames made smaller; the networks load at the first call, once.

    Args:
        long_side: a frame with a longer side is shrunk to it, in pixels; None searches every frame as it is.
        smallest: pyramid levels that only serve faces below this share of the long side are left out; 0 keeps all.
        batch: so many frames of one size go through the networks together.
        device: TensorFlow's name of the device.
    """

    def __init__(self, long_side: int | None = 640, smallest: float = 1 / 25, batch: int = 5, device: str = "CPU:0"):
        self.long_side = long_side
        self.smallest = smallest
        self.batch = batch
        self.device = device

    def __call__(self, frames: Iterable[np.ndarray]) -> list[list[Detection]]:
        """The faces of each frame, surest first.

        Args:
            frames: uint8 RGB pictures (H, W, 3), of any sizes.

        Raises:
            ValueError: something else among the frames.
        """
        small = [self._shrink(frame) for frame in frames]
        found: list[list[Detection]] = [[] for _ in small]
        for shape in dict.fromkeys(picture.shape for picture, _ in small):
            alike = [index for index, (picture, _) in enumerate(small) if picture.shape == shape]
            for start in range(0, len(alike), self.batch):
                chunk = alike[start : start + self.batch]
                rows = self._search(np.stack([small[index][0] for index in chunk])).faces
                for place, index in enumerate(chunk):
                    found[index] = _detections(rows[rows[:, 0] == place], small[index][1])
        return found

    def stages(self, frame: np.ndarray) -> Stages:
        """Run MTCNN on one uint8 RGB picture (H, W, 3) and return what each stage found, in source pixels."""
        from mtcnn.utils.images import scale_images

        picture, ratio = self._shrink(frame)
        found = self._search(picture[None])
        return Stages(
            pyramid=[(scale, scale_images(picture, scale).numpy().astype(np.uint8)) for scale in found.scales],
            candidates=[_boxes(rows, ratio) for rows in found.candidates],
            proposals=_boxes(found.proposals, ratio),
            refined=_boxes(found.refined, ratio),
            faces=_detections(found.faces, ratio),
        )

    @cached_property
    def _stages(self) -> list:
        """The package's three stages, their networks compiled: called layer by layer, MTCNN mostly waits for Python."""
        import keras
        import tensorflow as tf

        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(f"mtcnn needs Keras on TensorFlow, found the backend {keras.backend.backend()!r}: "
                               "unset KERAS_BACKEND where faces are extracted")
        from mtcnn import MTCNN

        stages = MTCNN(device=self.device).stages
        for stage, side in zip(stages, (None, 24, 48), strict=True):
            pictures = tf.TensorSpec((None, side, side, 3), tf.float32)
            stage._model = tf.function(stage.model.__call__, input_signature=[pictures])
        return stages

    def _shrink(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frame as it is searched, and source pixels per pixel of it in x and y."""
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"frame: expected a uint8 RGB picture (H, W, 3), found {found}")
        height, width = frame.shape[:2]
        if self.long_side is None or max(height, width) <= self.long_side:
            return frame, np.ones(2)
        scale = self.long_side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.array([width / size[0], height / size[1]])

    def _scales(self, height: int, width: int) -> np.ndarray:
        """Scales of the package's pyramid, without the levels that only serve faces below the smallest wanted."""
        from mtcnn.utils.images import build_scale_pyramid

        if min(height, width) < PYRAMID_START:
            return np.empty(0)
        scales = build_scale_pyramid(width, height, PYRAMID_START, PYRAMID_FACTOR)
        return scales[scales * self.smallest * max(height, width) <= PNET_CELL]

    def _search(self, pictures: np.ndarray) -> "_Search":
        """The three stages on uint8 pictures (n, H, W, 3) of one size; the package's steps on our pyramid."""
        import tensorflow as tf
        from mtcnn.utils import bboxes, images

        propose, refine, conclude = self._stages
        scales = self._scales(*pictures.shape[1:3])
        with tf.device(self.device):
            tensor = images.normalize_images(tf.cast(pictures, tf.float32))
            candidates = []
            for scale in scales:
                offsets, scores = propose.model(images.scale_images(tensor, scale))
                rows = bboxes.generate_bounding_box(offsets, scores, PNET_THRESHOLD)
                candidates.append(bboxes.upscale_bboxes(rows, np.full(len(pictures), scale)))
            kept = [bboxes.smart_nms_from_bboxes(rows, PNET_NMS, initial_sort=False) for rows in candidates]
            kept = bboxes.smart_nms_from_bboxes(np.concatenate([np.empty((0, 6)), *kept]), PYRAMID_NMS)
            proposals = bboxes.resize_to_square(kept)
            refined = refine(images_normalized=tensor, bboxes_batch=proposals) if len(proposals) else proposals
            faces = conclude(images_normalized=tensor, bboxes_batch=refined) if len(refined) else np.empty((0, 16))
        return _Search(scales, candidates, proposals, refined, faces)


class _Search(NamedTuple):
    """As ``Stages``, of several pictures, in the package's rows: picture, x1, y1, x2, y2, confidence, landmarks."""

    scales: np.ndarray
    candidates: list[np.ndarray]
    proposals: np.ndarray
    refined: np.ndarray
    faces: np.ndarray


def _detections(rows: np.ndarray, ratio: np.ndarray) -> list[Detection]:
    """O-Net's rows (n, 16) of one picture in source pixels, surest first."""
    rows = rows[np.argsort(-rows[:, 5], kind="stable")]
    boxes = _boxes(rows, ratio)
    landmarks = rows[:, 6:].reshape(-1, 2, 5).transpose(0, 2, 1) * ratio
    return [Detection(box[:4], float(box[4]), points) for box, points in zip(boxes, landmarks, strict=True)]


def _boxes(rows: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """The package's rows as (n, 5): x, y, width, height in source pixels, confidence."""
    return np.column_stack([rows[:, 1:3] * ratio, (rows[:, 3:5] - rows[:, 1:3]) * ratio, rows[:, 5]])


def link_tracks(detections: Sequence[Sequence[Detection]]) -> list[Track]:
    """Link the faces of a clip's frames so that one track is one person, the main person first.

    Frame by frame, faces are assigned to the persons known so far by the smallest sum of shifts (Kuhn 1955). A shift is
    the distance from where the person was last seen, in face sides, however many frames ago. Frames lie about a second
    apart, so that boxes of one person need not overlap; but a head mostly stays within its own size, while two heads
    stand at least that far apart (``MAX_SHIFT``). A person alone in the picture may walk (``MAX_SHIFT_ALONE``).

    Persons are ordered by ``Track.weight``. Those seen once without certainty, and those of little weight beside the
    main person, are left out as spurious.

    Args:
        detections: for each frame its faces, as ``FaceFinder`` returns them.
    """
    tracks: list[Track] = []
    for frame, faces in enumerate(detections):
        shifts = np.array([[_shift(track, frame, face, detections) for face in faces] for track in tracks])
        pairs = _assign(shifts.reshape(len(tracks), len(faces)))
        for row, column in pairs:
            tracks[row].detections[frame] = faces[column]
        known = {column for _, column in pairs}
        tracks += [Track(-1, {frame: face}) for column, face in enumerate(faces) if column not in known]
    tracks = sorted((track for track in tracks if _is_sure(track, len(detections))), key=lambda track: -track.weight)
    kept = [track for track in tracks if track.weight >= MIN_WEIGHT * tracks[0].weight]
    return [Track(number, track.detections) for number, track in enumerate(kept)]


def _is_sure(track: Track, frames: int) -> bool:
    """Seen twice, or once with certainty, or in the only frame there is."""
    return len(track.detections) >= min(2, frames) or max(f.confidence for f in track.detections.values()) >= SURE


def _shift(track: Track, frame: int, face: Detection, detections: Sequence[Sequence[Detection]]) -> float:
    """Distance from where a person was last seen to a face, in face sides; infinite where they cannot be the same."""
    last = max(track.detections)
    seen = track.detections[last]
    alone = len(detections[last]) == len(detections[frame]) == 1
    shift = float(np.linalg.norm(face.centre - seen.centre)) / np.sqrt(face.side * seen.side)
    growth = max(face.side, seen.side) / min(face.side, seen.side)
    return shift if growth <= MAX_GROWTH and shift <= (MAX_SHIFT_ALONE if alone else MAX_SHIFT) else np.inf


def _assign(costs: np.ndarray) -> list[tuple[int, int]]:
    """As many pairs (row, column) of finite cost as possible, at the smallest sum of costs."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(np.minimum(costs, 1e6))
    return [(row, column) for row, column in zip(rows, columns, strict=True) if np.isfinite(costs[row, column])]


def tight_box(box: np.ndarray) -> np.ndarray:
    """The framing of the DFDC training faces: a square, its side and its centre from MTCNN's box."""
    x, y, width, height = box
    side = TIGHT_SIDE * height
    return np.array([x + (width - side) / 2, y + (0.5 + TIGHT_DROP) * height - side / 2, side, side])


def reference_box(box: np.ndarray) -> np.ndarray:
    """The framing of the reference study: MTCNN's box and 40 px on each side, x and y clipped at 0, size kept."""
    x, y, width, height = box
    margin = REFERENCE_MARGIN
    return np.array([max(x - margin, 0), max(y - margin, 0), width + 2 * margin, height + 2 * margin])


FRAMINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {TIGHT: tight_box, REFERENCE: reference_box}


def fallback_box(height: int, width: int) -> np.ndarray:
    """The part of a picture that stands for a face where none is found (the study's figure 2): x, y, width, height.

    Of a landscape picture 300 px are left out on the left, on the right and at the bottom; of a portrait or square
    picture 150 px at the sides and 600 px at the bottom. These are pixels of 1080p, scaled by short side / 1080.
    """
    scale = min(height, width) / 1080
    side, bottom = (300, 300) if width > height else (150, 600)
    return np.array([side * scale, 0.0, width - 2 * side * scale, height - bottom * scale])


def cut(image: np.ndarray, box: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Cut a box (x, y, width, height) out of a picture and resize it to (size, size, 3).

    Where the box runs over the picture's edge, the border pixels are repeated, so that a square stays undistorted.
    Shrinking averages areas, enlarging is cubic.
    """
    x, y, width, height = np.round(box).astype(int)
    rows = np.clip(np.arange(y, y + max(height, 1)), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(x, x + max(width, 1)), 0, image.shape[1] - 1)
    shrinks = len(rows) * len(columns) >= size * size
    return cv2.resize(image[rows[:, None], columns], (size, size),
                      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def extract_faces(
    frames: Sequence[np.ndarray], finder: FaceFinder, framing: str = TIGHT, rows: int = ROWS, max_tracks: int = 4
) -> list[FaceCrops]:
    """The crops of each person of a clip, the main person first; without a face, one list of fallback crops.

    Args:
        frames: uint8 RGB pictures (H, W, 3) in time order, at least one. All are searched; ``rows`` of them, evenly
            spread, are cut, and where there are fewer they repeat.
        finder: the detector.
        framing: ``tight`` or ``reference``.
        max_tracks: at most so many persons.

    Returns:
        1 to ``max_tracks`` results of ``rows`` images each.

    Raises:
        ValueError: no frames, or an unknown framing.
    """
    if framing not in FRAMINGS:
        raise ValueError(f"framing: expected one of {list(FRAMINGS)}, found {framing!r}")
    if len(frames) == 0:
        raise ValueError("frames: expected at least one picture, found none")
    tracks = link_tracks(finder(frames))[:max_tracks] or [Track(-1)]
    indices = _spread(len(frames), rows)
    return [_cut_track(track, frames, indices, FRAMINGS[framing]) for track in tracks]


def _cut_track(
    track: Track, frames: Sequence[np.ndarray], indices: np.ndarray, framing: Callable[[np.ndarray], np.ndarray]
) -> FaceCrops:
    """One person in the frames at ``indices``."""
    places = [track.box_at(index) for index in indices]
    boxes = np.stack([framing(place[0]) if place else fallback_box(*frames[index].shape[:2])
                      for index, place in zip(indices, places, strict=True)])
    images = np.stack([cut(frames[index], box) for index, box in zip(indices, boxes, strict=True)])
    return FaceCrops(images, boxes, [place[1] if place else "fallback" for place in places], indices, track.id)


def reference_faces(
    path: str | Path, finder: FaceFinder, rows: int = ROWS, max_failures: int = 20, colour: str = "BGR"
) -> FaceCrops:
    """Face extraction as the reference study did it (its figure 2), from the first frames of a clip.

    Three frames are skipped before each frame tried, and the first face that MTCNN returns is cut with 40 px on each
    side. Where it returns none, the next frames are tried one by one. Failures are counted over the whole clip; beyond
    ``max_failures`` each one falls back at once to a part of the picture. It stops at ``rows`` images; a clip that ends
    before (where the study failed) has its images repeated.

    The study searched frames in full: ``FaceFinder(long_side=None, smallest=0)``.

    Args:
        max_failures: 20 in the study's code, 70 in its figure.
        colour: ``BGR`` shows MTCNN the channels in OpenCV's order, as the study did; ``RGB`` as MTCNN expects them.
            The crops are RGB in any case.

    Raises:
        UnreadableClip: no frame decodes.
        ValueError: an unknown colour order.
    """
    if colour not in ("BGR", "RGB"):
        raise ValueError(f"colour: expected 'BGR' or 'RGB', found {colour!r}")
    kept: list[tuple[int, np.ndarray, Detection | None]] = []
    failures, skip, index, frame = 0, 3, -1, None
    for index, _, frame in video.iter_frames(path):
        if skip:
            skip -= 1
            continue
        faces = finder([frame if colour == "RGB" else np.ascontiguousarray(frame[..., ::-1])])[0]
        failures += not faces
        if faces or failures > max_failures:
            kept.append((index, frame, faces[0] if faces else None))
            skip = 3
        if len(kept) == rows:
            break
    if frame is None:
        raise video.UnreadableClip(path, "no frame decodes")
    kept = kept or [(index, frame, None)]
    kept = [kept[row] for row in _spread(len(kept), rows)]
    boxes = np.stack([reference_box(face.box) if face else fallback_box(*image.shape[:2]) for _, image, face in kept])
    images = np.stack([cut(image, box) for (_, image, _), box in zip(kept, boxes, strict=True)])
    sources = ["detected" if face else "fallback" for *_, face in kept]
    indices = np.array([index for index, *_ in kept])
    return FaceCrops(images, boxes, sources, indices, track=0 if "detected" in sources else -1)


def tight_from_crops(crops: np.ndarray, finder: FaceFinder, size: int = SIZE) -> np.ndarray:
    """Cut crops of any framing to the tight one: around the face found again in each, else the central part.

    Args:
        crops: uint8 RGB (N, H, W, 3).
        finder: the detector; the crop's surest face counts.

    Returns:
        uint8 RGB (N, size, size, 3).
    """
    return np.stack([cut(crop, _tight_in_crop(crop, faces), size)
                     for crop, faces in zip(crops, finder(crops), strict=True)])


def _tight_in_crop(crop: np.ndarray, faces: list[Detection]) -> np.ndarray:
    """The tight box of the largest face of a crop, or its central part."""
    if faces:
        return tight_box(max(faces, key=lambda face: face.side).box)
    height, width = crop.shape[:2]
    side = CENTRAL_SHARE * min(height, width)
    return np.array([(width - side) / 2, (height - side) / 2, side, side])


def _spread(found: int, rows: int) -> np.ndarray:
    """``rows`` positions in a list of ``found``, evenly spread; repeated where there are fewer."""
    return np.linspace(0, found - 1, rows).round().astype(int)
