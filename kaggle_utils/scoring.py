"""Score a folder in this process, in several or on a cluster; from a cache of extracts or from the clips."""

import math
import pkgutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from . import disk, extraction, extracts, spread
from .datasets.dfdc import clips_to_score
from .face import framing
from .submission import Ask, score_clips

Detector = Any  # a detector.Detector; that room stands above this one
STRIP = 128  # px, side of a crop in the picture of a clip's crops
_networks = threading.Lock()  # a cluster's worker may have several threads


Weights = tuple[str, tuple, str]  # module:function and arguments that load the detector, and its fingerprint


class Task(NamedTuple):
    """One clip for a worker: with what to score it, and its place in the cache."""

    ask: Ask
    weights: Weights
    place: extracts.Place | None


def score_folder(detector: Detector, folder: str | Path, output_csv: str | Path, hours: float | None,
                 progress: bool, cache: str | Path | None, team: spread.Team) -> pd.DataFrame:
    """The work of :meth:`detector.Detector.predict_folder`."""
    output_csv = Path(output_csv)
    clips = clips_to_score(Path(folder).absolute())
    kept = extracts.Cache(cache, sample_rate=detector.voice_rate) if cache else None
    places = {clip.filename: kept.place(clip.filename, clip.path) for clip in clips.itertuples()
              if kept and clip.path is not None}
    strips = output_csv.with_name(output_csv.name + ".faces")
    strips.mkdir(parents=True, exist_ok=True)
    disk.sweep(strips)

    def run(asks: Iterator[Ask]) -> Iterator[tuple[Ask, dict | Exception]]:
        if team.is_here:
            outcomes = _one_ahead(asks, detector, places)
        else:
            if detector.source is None:
                raise ValueError("jobs, backend: only networks that Detector.load loaded can be spread")
            weights = (*detector.source, detector.fingerprint)
            tasks = (Task(ask, weights, places.get(ask.filename)) for ask in asks)
            outcomes = ((task.ask, outcome) for task, outcome in team.run(_score_task, tasks))
        for ask, outcome in outcomes:
            if not isinstance(outcome, Exception):
                _save_strip(strips, ask.filename, outcome.pop("strip", None), outcome["warnings"])
            yield ask, outcome

    def unscored(name: str, reason: str) -> dict:
        warning = f"{name}: {reason}, the score is the prior"
        return detector.prior_verdict(warning).to_dict()

    fingerprint = (f"{detector.fingerprint} {type(detector.fuse).__name__} prior {detector.prior} "
                   f"reading {extraction.READING}")
    with team:
        return score_clips(clips, run, output_csv, unscored, fingerprint, hours, progress,
                           lambda name, _: name in places and places[name].made)


def _one_ahead(asks: Iterator[Ask], detector: Detector, places: dict[str, extracts.Place]
               ) -> Iterator[tuple[Ask, dict | Exception]]:
    """Score clip after clip in this process; a thread extracts the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: list[tuple[Ask, Future]] = []
        try:
            for ask in asks:
                coming.append((ask, thread.submit(_extract, ask, detector, places.get(ask.filename))))
                if len(coming) > 1:
                    yield _finished(*coming.pop(0), detector)
            for ask, extracted in coming:
                yield _finished(ask, extracted, detector)
        finally:
            thread.shutdown(cancel_futures=True)


def _finished(ask: Ask, extracted: Future, detector: Detector) -> tuple[Ask, dict | Exception]:
    try:
        return ask, _scored(ask, extracted.result(), detector)
    except Exception as error:
        return ask, error


def _score_task(task: Task) -> dict:
    """Score a clip in a worker, whose networks load at its first clip."""
    detector = spread.once(_load, *task.weights)
    extracted = _extract(task.ask, detector, task.place)
    with _networks:
        return _scored(task.ask, extracted, detector)


def _load(function: str, arguments: tuple, fingerprint: str) -> Detector:
    from .kaggle import paths

    paths.prepare()  # before TensorFlow is imported: it is silent then
    detector = pkgutil.resolve_name(function)(*arguments)
    if detector.fingerprint != fingerprint:
        raise ValueError(f"{arguments[0]}: this worker has other weights than the one that asks")
    return detector


Extracted = tuple[extraction.Extract | None, float]  # None: the clip can have no file; seconds of work


def _extract(ask: Ask, detector: Detector, place: extracts.Place | None) -> Extracted:
    if ask.path is None:
        return None, 0.0
    began = time.monotonic()
    extract = extracts.fetch(ask.path, detector.finder, ask.frames, detector.voice_rate, place)
    return extract, time.monotonic() - began


def _scored(ask: Ask, extracted: Extracted, detector: Detector) -> dict:
    """A clip's journal entry, and ``strip``, the picture of its crops as JPEG bytes."""
    extract, extract_s = extracted
    if extract is None or ask.path is None:
        return detector.prior_verdict(f"{ask.filename}: expected a plain file name").to_dict()
    began = time.monotonic()
    verdict, people = detector.examine_extract(ask.path, extract)
    row, strip = verdict.to_dict(), _strip(verdict, people)
    seconds = round(extract_s + time.monotonic() - began, 3)
    return row | {"read": extract.asked, "seconds": seconds, "strip": strip}


def _strip(verdict: Any, people: list[framing.FaceCrops]) -> bytes | None:
    """The crops of the most suspicious person side by side as JPEG; None without crops."""
    if not people:
        return None
    suspicion = [-1.0 if math.isnan(track["probability"]) else track["probability"]
                 for track in verdict.tracks]
    crops = people[int(np.argmax(suspicion))].images
    strip = np.concatenate([cv2.resize(crop, (STRIP, STRIP), interpolation=cv2.INTER_AREA) for crop in crops],
                           axis=1)
    return cv2.imencode(".jpg", strip[..., ::-1])[1].tobytes()


def _save_strip(folder: Path, name: str, strip: bytes | None, warnings: list[str]) -> None:
    """Save the picture of a clip's crops, or remove an earlier one; a disk error becomes a warning."""
    path = disk.fitting(folder / f"{name}.jpg")
    try:
        if strip is None:
            path.unlink(missing_ok=True)
        else:
            disk.replace(path, strip)
    except OSError as error:
        warnings.append(f"{name}: the image of its crops was not saved: {error.strerror}")
