"""Turn a clip into network inputs, the crops of each person and the voice; cache whole folders of clips.

The cache holds one compressed file per clip, and an interrupted run resumes. joblib spreads the clips over
the processors of this machine or, with ``dask`` or ``ray``, over a cluster whose machines share the folders.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from . import disk
from .datasets.dfdc import clips_to_score, file_stamp
from .face import detection, framing
from .media import isolation, sound, video

FRAMES = 10  # frames read from a clip
READING = 2  # raise it if clips yield different frames or crops: older caches and journals become invalid
LYING = {90: cv2.ROTATE_90_CLOCKWISE, 270: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180}
TRIED = 3  # frames that are searched in each rotation if no upright face is found
BACKENDS = ("loky", "dask", "ray")
DECIMALS = 2  # of cached boxes, in pixels: the last bits depend on MTCNN's number of threads


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


class Ahead:
    """Extracts the next clip in a background thread while the current one is scored."""

    def __init__(self, extract: Callable[[Path, int], Extract]):
        self._extract, self._thread = extract, ThreadPoolExecutor(max_workers=1)
        self._coming: dict[Path, Future] = {}

    def __call__(self, path: Path, frames: int, following: Path | None = None) -> Extract:
        """Return a clip's extract, prefetched if it was the last ``following``; prefetch ``following``."""
        wanted = self._coming.pop(path, None) or self._thread.submit(self._extract, path, frames)
        self._coming = {following: self._thread.submit(self._extract, following, frames)} if following else {}
        return wanted.result()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)


# --- one file per clip --------------------------------------------------------------------------------------
def save_extract(path: str | Path, extracted: Extract, key: str = "") -> None:
    """Write an extract as a compressed ``.npz``, as :func:`disk.writing` does.

    The same extract gives the same bytes. ``key`` identifies its source clip and settings.
    """
    path, people = Path(path), extracted.people
    arrays: dict[str, Any] = {}
    for number, person in enumerate(people):
        arrays |= {f"images_{number}": person.images,
                   f"boxes_{number}": person.boxes.round(DECIMALS).astype(np.float32),
                   f"sources_{number}": np.array(person.sources), f"frames_{number}": person.frame_indices,
                   f"track_{number}": person.track}
    if extracted.samples is not None:
        arrays["samples"] = np.rint(extracted.samples * 32768).astype(np.int16)
    about = {"key": key, "people": len(people), "sample_rate": extracted.sample_rate,
             "warnings": extracted.warnings}
    with disk.writing(path) as file:
        np.savez_compressed(file, about=json.dumps(about), times_s=extracted.times_s, **arrays)


def load_extract(path: str | Path) -> Extract:
    """Read a file that :func:`save_extract` wrote; boxes are rounded to 0.01 pixels, the rest is exact."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        people = [framing.FaceCrops(file[f"images_{n}"], file[f"boxes_{n}"].astype(float),
                                    file[f"sources_{n}"].tolist(), file[f"frames_{n}"],
                                    int(file[f"track_{n}"]))
                  for n in range(about["people"])]
        samples = file["samples"] / np.float32(32768) if "samples" in file else None
        return Extract(people, file["times_s"], samples, about["sample_rate"], about["warnings"])


def _is_made(path: Path, key: str) -> bool:
    """Whether a cached file exists, is whole, and its key is ``key``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["about"]))["key"] == key
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return False


# --- folders ------------------------------------------------------------------------------------------------
def extract_folder(folder: str | Path, cache_folder: str | Path, jobs: int = 1, backend: str = "loky",
                   scheduler: str | None = None, frames: int = FRAMES, progress: bool = True) -> pd.DataFrame:
    """:func:`extract_clips` for every clip that ``datasets.dfdc.clips_to_score`` lists for a folder.

    Raises:
        FileNotFoundError: no clips. ValueError: an unknown backend.
    """
    clips = clips_to_score(Path(folder).resolve()).drop(columns="label")
    return extract_clips(clips, cache_folder, jobs, backend, scheduler, frames, progress)


def extract_clips(clips: pd.DataFrame, cache_folder: str | Path, jobs: int = 1, backend: str = "loky",
                  scheduler: str | None = None, frames: int = FRAMES, progress: bool = True) -> pd.DataFrame:
    """Fill ``cache_folder`` with one ``NAME.npz`` per clip, for :func:`load_extract`.

    A finished file is reused unless the clip or the number of frames has changed.

    Args:
        clips: columns ``filename`` and ``path``; rows without a path are skipped.
        jobs: number of processes; -1: one per processor. On a cluster, its workers count instead.
        backend: ``loky`` for processes on this machine, ``dask`` or ``ray`` for a cluster. All machines of
            the cluster must see both folders under the same paths and have this package installed.
        scheduler: address of the cluster's scheduler, such as ``tcp://10.0.0.5:8786``; None: a local one.

    Returns:
        ``clips`` with the columns ``cache`` (the file) and ``made`` (False if an earlier run made it).

    Raises:
        ValueError: an unknown backend.
    """
    cache_folder = Path(cache_folder).resolve()
    cache_folder.mkdir(parents=True, exist_ok=True)
    clips = clips[[path is not None for path in clips["path"]]].copy()
    disk.sweep(cache_folder)
    clips["cache"] = [disk.fitting(cache_folder / f"{name}.npz") for name in clips["filename"]]
    keys = {row.path: _key(row.path, frames) for row in clips.itertuples()}
    clips["made"] = [not _is_made(row.cache, keys[row.path]) for row in clips.itertuples()]
    waiting = clips[clips["made"]]
    with _parallel_backend(backend, scheduler):
        order = "list" if backend == "ray" else "generator_unordered"  # ray returns all results at the end
        work = joblib.Parallel(jobs, return_as=order, batch_size=1)
        done = work(joblib.delayed(_extract_to_file)(row.path, row.cache, keys[row.path], frames)
                    for row in waiting.itertuples())
        for _ in tqdm(done, total=len(waiting), desc="clips", unit="clip", disable=not progress):
            pass
    return clips


def _key(path: Path, frames: int) -> str:
    """Identifies the source of a cached file: size in bytes and mtime of the clip, and the settings."""
    stamp = " ".join(map(str, file_stamp(path) or ("missing",)))
    return f"{stamp} {frames} {READING}"


def _extract_to_file(path: Path, target: Path, key: str, frames: int) -> None:
    save_extract(target, extract(path, _finder(), frames), key)


@cache
def _finder() -> detection.FaceFinder:
    """One detector per process: its networks load once."""
    return detection.FaceFinder()


@contextmanager
def _parallel_backend(backend: str, scheduler: str | None) -> Iterator[None]:
    """Run joblib on ``backend``; the client of the scheduler is closed after the block."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "dask":
        from distributed import Client

        with Client(scheduler), joblib.parallel_config("dask"):
            yield
    elif backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        register_ray()
        with ray.init(scheduler), joblib.parallel_config("ray"):
            yield
    else:
        with joblib.parallel_config("loky"):
            yield
