"""Faces of a clip: found by MTCNN on small frames, tracked from frame to frame, cut to one framing.

The detector is MTCNN (Zhang et al. 2016) in the Keras package ``mtcnn``: P-Net proposes windows over an image pyramid,
R-Net refines them, O-Net gives the final box, its confidence and five landmarks. The package and TensorFlow load when
the first frame is searched.

Boxes are x, y, width, height in pixels of the source frame, as floats, and may run over the frame's edge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from ..media import video
from .detection import Detection, FaceFinder

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
    indices = _evenly_spread(len(frames), rows)
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
    kept = [kept[row] for row in _evenly_spread(len(kept), rows)]
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


def _evenly_spread(found: int, rows: int) -> np.ndarray:
    """``rows`` positions in a list of ``found``, evenly spread; repeated where there are fewer."""
    return np.linspace(0, found - 1, rows).round().astype(int)
