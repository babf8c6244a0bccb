"""Cache the extracts of whole folders of clips: one compressed file per clip; an interrupted run resumes."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from . import disk, spread
from .datasets.dfdc import clips_to_score
from .extraction import DECIMALS, FRAMES, READING, Extract, extract
from .face import detection, framing
from .media import sound

LARGEST = 256 * 2**20  # bytes of an unpacked extract; four people and ten minutes of sound are 30 MB
RECORD = "extracts.json"  # says what the extracts of a cache folder were made with
ENDS = 2**14  # bytes at both ends of a clip that, with its size, tell it from others


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
        counts = extracted.samples * np.float32(32768)  # whole numbers, but for a mix of channels
        whole = np.array_equal(counts, np.rint(counts)) and counts.max(initial=0) < 32768
        arrays["samples"] = counts.astype(np.int16 if whole else np.float32)
    about = {"key": key, "people": len(people), "sample_rate": extracted.sample_rate,
             "warnings": extracted.warnings, "frames": extracted.asked}
    with disk.writing(path) as file:
        np.savez_compressed(file, about=json.dumps(about), times_s=extracted.times_s, **arrays)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A cached file for reading.

    Raises:
        ValueError: it unpacks to more than ``LARGEST`` bytes.
    """
    with np.load(path, allow_pickle=False) as file:
        size = sum(member.file_size for member in file.zip.infolist())
        if size > LARGEST:
            raise ValueError(f"{path}: unpacks to {size} bytes, expected at most {LARGEST}")
        yield file


def load_extract(path: str | Path) -> Extract:
    """Read a file that :func:`save_extract` wrote; it gives back what was extracted, exactly."""
    with _opened(path) as file:
        about = json.loads(str(file["about"]))
        people = [framing.FaceCrops(file[f"images_{n}"], file[f"boxes_{n}"].astype(float).round(DECIMALS),
                                    file[f"sources_{n}"].tolist(), file[f"frames_{n}"],
                                    int(file[f"track_{n}"]))
                  for n in range(about["people"])]
        samples = file["samples"] / np.float32(32768) if "samples" in file else None
        return Extract(people, file["times_s"], samples, about["sample_rate"], about["warnings"],
                       about.get("frames", FRAMES))


def made_with(frames: int = FRAMES, sample_rate: int = sound.SAMPLE_RATE) -> dict[str, str]:
    """What decides the content of an extract besides the clip, as readable entries."""
    import imageio_ffmpeg

    return {"framing": f"{framing.TIGHT} {framing.ROWS}x{framing.SIZE}", "frames": str(frames),
            "sample rate": str(sample_rate), "reading": str(READING), "opencv": cv2.__version__,
            "mtcnn": version("mtcnn"), "ffmpeg": imageio_ffmpeg.__version__}


class Cache:
    """A folder of extracts, ``NAME.npz`` for each clip, all made with the same settings and versions.

    The file ``extracts.json`` in it says which. A folder that cannot be written is read only.

    Args:
        folder: created if missing.
        frames, sample_rate: the settings wanted.

    Raises:
        ValueError: the folder's extracts were made with something else; one line says with what.
    """

    def __init__(self, folder: str | Path, frames: int = FRAMES, sample_rate: int = sound.SAMPLE_RATE):
        self.folder, self.frames = Path(folder).resolve(), frames
        self.record = made_with(frames, sample_rate)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writable = os.access(self.folder, os.W_OK)
        if (record := self.folder / RECORD).is_file():
            check_made_with(self.record, _parsed(record), self.folder)
        elif self.writable:
            disk.replace(record, json.dumps(self.record, indent=1) + "\n")
        if self.writable:
            disk.sweep(self.folder)

    def place(self, name: str, path: Path) -> "Place":
        """Where the extract of a clip is, or will be."""
        file, key = disk.fitting(self.folder / f"{name}.npz"), clip_key(path, self.frames)
        return Place(file, key, _is_made(file, key), self.writable, self.record)


class Place(NamedTuple):
    """A clip's file in a cache, the key that it must hold, and whether it is made and may be."""

    file: Path
    key: str
    made: bool
    writable: bool
    record: dict[str, str]


def check_made_with(wanted: dict[str, str], found: dict[str, str], where: Path | str) -> None:
    """Raises ValueError, in one line, where two records of what extracts were made with differ."""
    wrong = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"{where}: extracts made with "
                         f"{', '.join(f'{name} {found.get(name)}' for name in wrong)}; expected "
                         f"{', '.join(f'{name} {wanted.get(name)}' for name in wrong)}: use another folder")


def fetch(path: str | Path, finder: detection.FaceFinder, frames: int, sample_rate: int,
          place: Place | None) -> Extract:
    """A clip's extract from its place in a cache, or made now; kept there if the place asks for its frames.

    Raises:
        ValueError: this machine would make other extracts than those of the cache.
    """
    if place and place.made:
        try:
            return load_extract(place.file)
        except Exception as error:  # whatever a damaged or foreign file raises
            tqdm.write(f"{place.file} is made again: {type(error).__name__}: {error}", file=sys.stderr)
    extracted = extract(path, finder, frames, sample_rate)
    if place and place.writable and str(frames) == place.record["frames"]:
        check_made_with(place.record, made_with(frames, sample_rate), "this worker")
        save_extract(place.file, extracted, place.key)
    return extracted


def clip_key(path: Path, frames: int) -> str:
    """Identifies the source of a cached file: a clip's size and both its ends, and the number of frames.

    Unlike a time stamp, it is the same on every machine and in every copy.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            ends += file.read(ENDS)
    except OSError:
        return f"unreadable {frames} {READING}"
    return f"{size} {hashlib.sha256(ends).hexdigest()[:16]} {frames} {READING}"


def _parsed(record: Path) -> dict[str, str]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{record}: expected a JSON object that says what the extracts were made with")
    return found


def _is_made(path: Path, key: str) -> bool:
    """Whether a cached file exists, is whole, and its key is ``key``."""
    try:
        with _opened(path) as file:
            return json.loads(str(file["about"]))["key"] == key
    except Exception:  # whatever a damaged or foreign file raises
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
        jobs, backend, scheduler: as for :class:`spread.Team`.

    Returns:
        ``clips`` with the columns ``cache`` (the file), ``made`` (False if an earlier run made it) and
        ``failed`` (None, or why there is no file: the worker died at this clip).

    Raises:
        ValueError: an unknown backend, or a folder whose extracts were made with other settings or versions.
        OSError: the disk is full, a folder cannot be written, or the scheduler does not answer.
    """
    team, cache = spread.Team(jobs, backend, scheduler), Cache(cache_folder, frames)
    if not cache.writable:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache.folder))
    clips = clips[[path is not None for path in clips["path"]]].copy()
    places = {row.path: cache.place(row.filename, row.path) for row in clips.itertuples()}
    clips["cache"] = [places[path].file for path in clips["path"]]
    clips["made"] = [not places[path].made for path in clips["path"]]
    failed: dict[Path, str] = {}
    waiting = [(path, places[path], frames) for path in clips.loc[clips["made"], "path"]]
    with team:
        done = team.run(_extract_to_file, waiting)
        for (path, *_), outcome in tqdm(done, total=len(waiting), desc="clips", unit="clip",
                                        disable=not progress):
            if isinstance(outcome, spread.WorkerDied):
                failed[path] = str(outcome)
            elif outcome is not None:
                raise outcome
    clips["made"] &= ~clips["path"].isin(failed)
    return clips.assign(failed=[failed.get(path) for path in clips["path"]])


def _extract_to_file(task: tuple[Path, Place, int]) -> None:
    path, place, frames = task
    fetch(path, spread.once(detection.FaceFinder), frames, sound.SAMPLE_RATE, place)
