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
from .likeness import Looks

TIGHT, REFERENCE = "tight", "reference"  # framings
ROWS, SIZE = 10, 256

TIGHT_SIDE = 0.8  # side of the tight square / height of MTCNN's box
TIGHT_DROP = 0.1  # offset of the square's centre below the box's centre, in box heights
REFERENCE_MARGIN = 40  # source pixels on each side
CENTRAL_SHARE = 0.65  # of a crop's short side, if no face is found in it

MAX_SHIFT = 1.0  # in face sides: faces of two frames closer than this are one person,
MAX_SHIFT_ALONE = 3.0  # or than this if each is the only face of its frame,
MAX_GROWTH = 2.0  # unless their sizes differ by more than this factor
HELD_FRAMES = 2  # estimate boxes this long before, after or between detections
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

    def near(self, frame: int) -> list[int]:
        """The detections, by frame, from which the place in another frame is estimated; none if unknown."""
        before = max((seen for seen in self.detections if seen < frame), default=None)
        after = min((seen for seen in self.detections if seen > frame), default=None)
        if before is not None and after is not None:
            return [before, after] if after - before - 1 <= HELD_FRAMES else []
        return [seen for seen in (before, after) if seen is not None and abs(seen - frame) <= HELD_FRAMES]

    def box_at(self, frame: int) -> tuple[np.ndarray, str] | None:
        """The face's box in a frame and its source, ``detected`` or ``interpolated``; None if it is unknown.

        Over at most ``HELD_FRAMES`` frames, boxes are interpolated linearly between detections, and held
        before the first and after the last.
        """
        if frame in self.detections:
            return self.detections[frame].box, "detected"
        if not (near := self.near(frame)):
            return None
        boxes = np.stack([self.detections[seen].box for seen in near])
        return np.array([np.interp(frame, near, values) for values in boxes.T]), "interpolated"


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


def link_tracks(detections: Sequence[Sequence[Detection]], looks: Looks | None = None) -> list[Track]:
    """Link the faces of a clip's frames into one track per person, the main person first.

    Frame by frame, faces are assigned to the known persons with the smallest sum of shifts (Kuhn 1955). A
    shift is the distance from a person's last position in the same scene, in face sides, however many frames
    ago. Frames are about a second apart, so one person's boxes need not overlap. But a head mostly stays
    within its own size, and two heads are at least that far apart (``MAX_SHIFT``). A lone person may walk
    (``MAX_SHIFT_ALONE``), but must look similar. After a cut to another scene, only the looks count.

    Persons are sorted by ``Track.weight``. Those seen only once with low confidence, and those with a small
    weight compared to the main person, are dropped as spurious.

    Args:
        detections: the faces of each frame, as ``FaceFinder`` returns them.
        looks: of the same frames; None: treat all frames as one scene and any two faces as similar.
    """
    tracks: list[Track] = []
    for frame, faces in enumerate(detections):
        known = _assign(tracks, frame, detections, looks)
        tracks += [Track(-1, {frame: face}) for number, face in enumerate(faces) if number not in known]
    tracks = sorted((track for track in tracks if _is_sure(track, len(detections))),
                    key=lambda track: -track.weight)
    kept = [track for track in tracks if track.weight >= MIN_WEIGHT * tracks[0].weight]
    return [Track(number, track.detections) for number, track in enumerate(kept)]


def _is_sure(track: Track, frames: int) -> bool:
    """Detected twice, or once with high confidence, or in the only frame."""
    best = max(face.confidence for face in track.detections.values())
    return len(track.detections) >= min(2, frames) or best >= SURE


def _assign(tracks: list[Track], frame: int, detections: Sequence[Sequence[Detection]],
            looks: Looks | None) -> set[int]:
    """Give a frame's faces to the tracks, as many as possible; returns the numbers of these faces."""
    from scipy.optimize import linear_sum_assignment

    faces = detections[frame]
    costs = np.array([[_shift(track, frame, face, detections, looks) for face in faces] for track in tracks])
    costs = costs.reshape(len(tracks), len(faces))
    assigned = zip(*linear_sum_assignment(np.minimum(costs, 1e6)), strict=True)
    pairs = [(row, number) for row, number in assigned if np.isfinite(costs[row, number])]
    for row, number in pairs:
        tracks[row].detections[frame] = faces[number]
    return {number for _, number in pairs}


def _shift(track: Track, frame: int, face: Detection, detections: Sequence[Sequence[Detection]],
           looks: Looks | None) -> float:
    """Distance of a face from a person's nearest position in time, in face sides; infinite if no match."""
    alone = [seen for seen in track.detections if len(detections[seen]) == len(detections[frame]) == 1]
    alike = looks is None or any(
        looks.same_head((frame, tight_box(face.box)), (seen, tight_box(track.detections[seen].box)))
        for seen in alone)
    nearest = min((seen for seen in track.detections if looks is None or looks.same_scene(frame, seen)),
                  key=lambda seen: abs(frame - seen), default=None)
    if nearest is None:
        return MAX_SHIFT_ALONE if alone and alike else np.inf
    seen = track.detections[nearest]
    shift = float(np.linalg.norm(face.centre - seen.centre)) / np.sqrt(face.side * seen.side)
    growth = max(face.side, seen.side) / min(face.side, seen.side)
    farthest = MAX_SHIFT if nearest not in alone else MAX_SHIFT_ALONE if alike else -1.0
    return shift if growth <= MAX_GROWTH and shift <= farthest else np.inf


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


def extract_faces(frames: Sequence[np.ndarray], finder: Callable[..., list[list[Detection]]],
                  framing: str = TIGHT, rows: int = ROWS, max_tracks: int = 4) -> list[FaceCrops]:
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
    found, looks = finder(frames), Looks(frames)
    tracks = link_tracks(found, looks)[:max_tracks] or [Track(-1)]
    indices = _evenly_spread(len(frames), rows)
    return [_cut_track(track, frames, found, looks, indices, FRAMINGS[framing]) for track in tracks]


def follow_faces(frames: Sequence[np.ndarray], finder: FaceFinder, kept: Sequence[int],
                 max_tracks: int = 4) -> tuple[list[FaceCrops], list[FaceCrops]]:
    """The people in the frames at ``kept``, as from :func:`extract_faces`, and the same people in all."""
    found, looks = finder(frames), Looks(frames)
    some = extract_faces([frames[index] for index in kept], lambda _: [found[index] for index in kept],
                         max_tracks=max_tracks)
    tracks = link_tracks([found[index] for index in kept], Looks([frames[index] for index in kept]))
    tracks = [Track(track.id, {kept[row]: face for row, face in track.detections.items()})
              for track in tracks[:max_tracks]] or [Track(-1)]
    for index in sorted(set(range(len(frames))) - set(kept)):
        _assign(tracks, index, found, looks)
    every = np.arange(len(frames))
    return some, [_cut_track(track, frames, found, looks, every, tight_box) for track in tracks]


def _cut_track(track: Track, frames: Sequence[np.ndarray], found: Sequence[Sequence[Detection]],
               looks: Looks, indices: np.ndarray, framing: Callable[[np.ndarray], np.ndarray]) -> FaceCrops:
    """One person in the frames at ``indices``."""
    places = [track.box_at(index) for index in indices]
    places = [place if place and _is_there(track, index, place[0], found[index], looks) else None
              for index, place in zip(indices, places, strict=True)]
    boxes = np.stack([framing(place[0]) if place else fallback_box(*frames[index].shape[:2])
                      for index, place in zip(indices, places, strict=True)])
    images = np.stack([cut(frames[index], box) for index, box in zip(indices, boxes, strict=True)])
    return FaceCrops(images, boxes, [place[1] if place else "fallback" for place in places], indices,
                     track.id)


def _is_there(track: Track, frame: int, box: np.ndarray, faces: Sequence[Detection], looks: Looks) -> bool:
    """Whether a track's face may be at an estimated box: the same scene and head, and nobody else's face."""
    if frame in track.detections:
        return True
    centre, side = box[:2] + box[2:] / 2, np.sqrt(box[2] * box[3])
    return (not any(np.linalg.norm(face.centre - centre) < side / 2 for face in faces)
            and all(looks.same_scene(frame, seen) and looks.same_head(
                (frame, tight_box(box)), (seen, tight_box(track.detections[seen].box)), turned=True)
                for seen in track.near(frame)))


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
