"""Faces of a clip: found by MTCNN on small frames, tracked over time, cut to one framing.

The detector is MTCNN (Zhang et al. 2016) in the Keras package ``mtcnn``: P-Net proposes windows over an image
pyramid, R-Net refines them, O-Net gives the final box, its confidence and five landmarks. The package and
TensorFlow load when the first frame is searched.

Boxes are x, y, width, height in pixels of the source frame, as floats, and may extend beyond the frame.
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
TIGHT_DROP = 0.1  # offset of the square's centre below the box's centre, in box heights
REFERENCE_MARGIN = 40  # source pixels on each side
CENTRAL_SHARE = 0.65  # of a crop's short side, if no face is found in it

MAX_SHIFT = 1.0  # in face sides: faces of two frames closer than this are one person,
MAX_SHIFT_ALONE = 3.0  # or than this if each is the only face of its frame,
MAX_GROWTH = 2.0  # unless their sizes differ by more than this factor
HELD_FRAMES = 2  # hold the nearest box this long before a track's first and after its last detection
SURE = 0.95  # minimum confidence of a face detected in one frame only
MIN_WEIGHT = 0.2  # of the main person's; drops lighter tracks: MTCNN takes some clothes for faces


@dataclass(eq=False)
class Track:
    """One person: ``detections`` by frame index; ``id`` counts from 0, the main person."""

    id: int
    detections: dict[int, Detection] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """How often, large and confidently the face was detected: sum of side × (2 confidence - 1)."""
        return sum(face.side * (2 * face.confidence - 1) for face in self.detections.values())

    def box_at(self, frame: int) -> tuple[np.ndarray, str] | None:
        """The face's box in a frame and its source, ``detected`` or ``interpolated``; None if it is unknown.

        Boxes are interpolated linearly between detections, and held for ``HELD_FRAMES`` frames at both ends.
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
    """The crops of one person, one per row in time order.

    ``images`` uint8 RGB (rows, 256, 256, 3); ``boxes`` float (rows, 4): where each was cut, in source pixels;
    ``sources``: ``detected``, ``interpolated`` (cut at the estimated place) or ``fallback`` (a part of the
    picture); ``frame_indices`` int (rows,): positions in the list of frames; ``track``: person id or -1.
    """

    images: np.ndarray
    boxes: np.ndarray
    sources: list[str]
    frame_indices: np.ndarray
    track: int


def link_tracks(detections: Sequence[Sequence[Detection]]) -> list[Track]:
    """Link the faces of a clip's frames into one track per person, the main person first.

    Frame by frame, faces are assigned to the known persons with the smallest sum of shifts (Kuhn 1955). A
    shift is the distance from a person's last position, in face sides, however many frames ago. Frames are
    about a second apart, so one person's boxes need not overlap. But a head mostly stays within its own size,
    and two heads are at least that far apart (``MAX_SHIFT``). A lone person may walk (``MAX_SHIFT_ALONE``).

    Persons are sorted by ``Track.weight``. Those seen only once with low confidence, and those with a small
    weight compared to the main person, are dropped as spurious.

    Args:
        detections: the faces of each frame, as ``FaceFinder`` returns them.
    """
    tracks: list[Track] = []
    for frame, faces in enumerate(detections):
        shifts = np.array([[_shift(track, frame, face, detections) for face in faces] for track in tracks])
        pairs = _assign(shifts.reshape(len(tracks), len(faces)))
        for row, column in pairs:
            tracks[row].detections[frame] = faces[column]
        known = {column for _, column in pairs}
        tracks += [Track(-1, {frame: face}) for column, face in enumerate(faces) if column not in known]
    tracks = sorted((track for track in tracks if _is_sure(track, len(detections))),
                    key=lambda track: -track.weight)
    kept = [track for track in tracks if track.weight >= MIN_WEIGHT * tracks[0].weight]
    return [Track(number, track.detections) for number, track in enumerate(kept)]


def _is_sure(track: Track, frames: int) -> bool:
    """Detected twice, or once with high confidence, or in the only frame."""
    best = max(face.confidence for face in track.detections.values())
    return len(track.detections) >= min(2, frames) or best >= SURE


def _shift(track: Track, frame: int, face: Detection, detections: Sequence[Sequence[Detection]]) -> float:
    """Distance of a face from a person's last position, in face sides; infinite if they cannot match."""
    last = max(track.detections)
    seen = track.detections[last]
    alone = len(detections[last]) == len(detections[frame]) == 1
    shift = float(np.linalg.norm(face.centre - seen.centre)) / np.sqrt(face.side * seen.side)
    growth = max(face.side, seen.side) / min(face.side, seen.side)
    return shift if growth <= MAX_GROWTH and shift <= (MAX_SHIFT_ALONE if alone else MAX_SHIFT) else np.inf


def _assign(costs: np.ndarray) -> list[tuple[int, int]]:
    """As many pairs (row, column) of finite cost as possible, with the smallest sum of costs."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(np.minimum(costs, 1e6))
    pairs = zip(rows, columns, strict=True)
    return [(row, column) for row, column in pairs if np.isfinite(costs[row, column])]


def tight_box(box: np.ndarray) -> np.ndarray:
    """The framing of the DFDC training faces: a square, its side and its centre from MTCNN's box."""
    x, y, width, height = box
    side = TIGHT_SIDE * height
    return np.array([x + (width - side) / 2, y + (0.5 + TIGHT_DROP) * height - side / 2, side, side])


def reference_box(box: np.ndarray) -> np.ndarray:
    """The study's framing: MTCNN's box and 40 px on each side, x and y clipped at 0, size kept."""
    x, y, width, height = box
    margin = REFERENCE_MARGIN
    return np.array([max(x - margin, 0), max(y - margin, 0), width + 2 * margin, height + 2 * margin])

FRAMINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {TIGHT: tight_box, REFERENCE: reference_box}


def fallback_box(height: int, width: int) -> np.ndarray:
    """The part of a picture used if no face is found (the study's figure 2): x, y, width, height.

    A landscape picture loses 300 px on the left, on the right and at the bottom; a portrait or square one 150
    px on each side and 600 px at the bottom. These are pixels at 1080p, scaled by short side / 1080.
    """
    scale = min(height, width) / 1080
    side, bottom = (300, 300) if width > height else (150, 600)
    return np.array([side * scale, 0.0, width - 2 * side * scale, height - bottom * scale])


def cut(image: np.ndarray, box: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Cut a box (x, y, width, height) out of a picture and resize it to (size, size, 3).

    Beyond the picture's edge the border pixels are repeated. Shrinking averages areas, enlarging is cubic.
    """
    x, y, width, height = np.round(box).astype(int)
    rows = np.clip(np.arange(y, y + max(height, 1)), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(x, x + max(width, 1)), 0, image.shape[1] - 1)
    shrinks = len(rows) * len(columns) >= size * size
    return cv2.resize(image[rows[:, None], columns], (size, size),
                      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def extract_faces(frames: Sequence[np.ndarray], finder: FaceFinder, framing: str = TIGHT, rows: int = ROWS,
                  max_tracks: int = 4) -> list[FaceCrops]:
    """The crops of each person in a clip, the main person first; without a face, one list of fallback crops.

    Args:
        frames: uint8 RGB pictures (H, W, 3) in time order, at least one. All are searched; ``rows`` of them,
            evenly spread, are cut, repeated if there are fewer.
        framing: ``tight`` or ``reference``.
        max_tracks: maximum number of persons.

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


def _cut_track(track: Track, frames: Sequence[np.ndarray], indices: np.ndarray,
               framing: Callable[[np.ndarray], np.ndarray]) -> FaceCrops:
    """One person in the frames at ``indices``."""
    places = [track.box_at(index) for index in indices]
    boxes = np.stack([framing(place[0]) if place else fallback_box(*frames[index].shape[:2])
                      for index, place in zip(indices, places, strict=True)])
    images = np.stack([cut(frames[index], box) for index, box in zip(indices, boxes, strict=True)])
    return FaceCrops(images, boxes, [place[1] if place else "fallback" for place in places], indices,
                     track.id)


def reference_faces(path: str | Path, finder: FaceFinder, rows: int = ROWS, max_failures: int = 20,
                    colour: str = "BGR") -> FaceCrops:
    """Face extraction as in the reference study (its figure 2), from the first frames of a clip.

    Before each search three frames are skipped, and the first face that MTCNN returns is cut with 40 px on
    each side. If there is none, the next frames are tried one by one. Failures are counted over the whole
    clip; beyond ``max_failures``, each one falls back at once to a part of the picture. Extraction stops at
    ``rows`` images; the images of a shorter clip are repeated (the study's code failed there).

    The study searched frames at full size: ``FaceFinder(long_side=None, smallest=0)``.

    Args:
        max_failures: 20 in the study's code, 70 in its figure.
        colour: ``BGR`` passes MTCNN the channels in OpenCV's order, as the study did; ``RGB`` as MTCNN
            expects them. The crops are RGB in any case.

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
    boxes = np.stack([reference_box(face.box) if face else fallback_box(*image.shape[:2])
                      for _, image, face in kept])
    images = np.stack([cut(image, box) for (_, image, _), box in zip(kept, boxes, strict=True)])
    sources = ["detected" if face else "fallback" for *_, face in kept]
    indices = np.array([index for index, *_ in kept])
    return FaceCrops(images, boxes, sources, indices, track=0 if "detected" in sources else -1)


def tight_from_crops(crops: np.ndarray, finder: FaceFinder, size: int = SIZE) -> np.ndarray:
    """Recut crops of any framing to the tight one: around the face found in each, else the central part.

    Args:
        crops: uint8 RGB (N, H, W, 3).
        finder: the detector; the largest face of a crop is used.
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
    """``rows`` positions in a list of ``found``, evenly spread; repeated if there are fewer."""
    return np.linspace(0, found - 1, rows).round().astype(int)
