"""Turn a clip into network inputs: the crops of each person and the voice."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from .face import detection, framing
from .media import isolation, sound, video

FRAMES = 10  # frames read from a clip
READING = 3  # raise it if clips yield different frames or crops: older caches and journals become invalid
LYING = {90: cv2.ROTATE_90_CLOCKWISE, 270: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180}
TRIED = 3  # frames that are searched in each rotation if no upright face is found
DECIMALS = 2  # of boxes, in pixels: the last bits depend on MTCNN's number of threads


@dataclass(eq=False)
class Extract:
    """The extracted data of one clip.

    ``people``: the crops of each person, the main one first; without a face, one list of fallback crops;
    empty if the picture cannot be read. ``times_s`` float64 (frames,): the time of each frame. ``samples``
    float32 (T,) in [-1, 1] at ``sample_rate`` Hz, None without a sound track. ``warnings``: each names the
    file. ``asked``: the requested number of frames.
    """

    people: list[framing.FaceCrops]
    times_s: np.ndarray
    samples: np.ndarray | None
    sample_rate: int
    warnings: list[str]
    asked: int = FRAMES


def extract(path: str | Path, finder: detection.FaceFinder, frames: int = FRAMES,
            sample_rate: int = sound.SAMPLE_RATE) -> Extract:
    """Extract the faces of a clip and, in parallel, its sound.

    Args:
        path: a video file; parts that cannot be read become warnings.
    """
    path = Path(path)
    with ThreadPoolExecutor(max_workers=1) as beside:
        sound = beside.submit(listen, path, sample_rate)
        clip, warnings = look(path, frames)
        people = framing.extract_faces(clip.images, finder) if clip else []
        if clip and people[0].track < 0 and (turned := upright(path, clip, finder)):
            people, warnings = framing.extract_faces(turned.images, finder), turned.warnings
        samples, heard = sound.result()
    times_s = clip.times_s if clip else np.zeros(0)
    people = [replace(person, boxes=person.boxes.round(DECIMALS)) for person in people]
    return Extract(people, times_s, samples, sample_rate, warnings + heard, frames)


def look(path: Path, frames: int) -> tuple[video.Frames | None, list[str]]:
    """The frames of a clip, or None if its picture cannot be read, and warnings."""
    try:
        clip = isolation.read_frames(path, frames)
    except video.UnreadableClip as error:
        return None, [f"{error}; the picture was not analysed"]
    return clip, clip.warnings


def upright(path: Path, clip: video.Frames, finder: detection.FaceFinder) -> video.Frames | None:
    """Rotate a clip without upright faces until most of three frames have one; None if no rotation helps."""
    tried = video.evenly_spread(len(clip.images), TRIED)
    for turn, code in LYING.items():
        found = finder([cv2.rotate(clip.images[index], code) for index in tried])
        if sum(any(face.confidence >= framing.SURE for face in faces) for faces in found) > len(tried) / 2:
            warning = f"{path.name}: the picture was not upright and was rotated by {turn}°"
            return replace(clip, images=[cv2.rotate(image, code) for image in clip.images],
                           warnings=[*clip.warnings, warning])
    return None


def listen(path: Path, sample_rate: int) -> tuple[np.ndarray | None, list[str]]:
    """The voice of a clip, float32 (T,), or None if it is missing or cannot be read, and warnings."""
    try:
        samples = sound.read_voice(path, sample_rate)
    except video.UnreadableClip as error:
        return None, [f"{error}; the voice was not analysed"]
    missing = [f"{path.name}: no sound track, the voice was not analysed"] if samples is None else []
    return samples, missing
