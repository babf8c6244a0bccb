"""Score a whole folder into ``submission.csv``: always complete, resumable, on time."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm.auto import tqdm

from . import disk
from .check import HEADER, is_probability
from .datasets.dfdc import file_stamp

FRAME_LADDER = (10, 6, 3)  # frames read per clip; the time guard steps down
DECIMALS = 5
OUT_OF_TIME = "not scored in the time budget"
FAILURES = 3  # if this many first clips all fail, the fault is not theirs: raise the error
WRITE_S = 1.0  # s between two writings of the CSV: with many clips, each takes a while
MARGIN = 0.95  # share of the time budget to plan for


class Journal:
    """One JSON line per finished clip, beside the CSV; a truncated last line is dropped on reading."""

    def __init__(self, path: Path, fingerprint: str):
        """
        Args:
            fingerprint: identifies the models and settings; a journal with another one is overwritten.
        """
        self.path = path
        self.finished: dict[str, dict] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        if lines and _parse(lines[0]).get("fingerprint") == fingerprint:
            self.finished = {row["filename"]: row for row in map(_parse, lines[1:]) if "filename" in row}
        else:
            lines = [json.dumps({"fingerprint": fingerprint}).encode()]
        disk.replace(path, b"".join(line + b"\n" for line in lines))

    def add(self, row: dict) -> None:
        """Append one finished clip and flush it to disk."""
        with disk.named(self.path), self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[row["filename"]] = row


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # a truncated line: the clip is rescored
    if not isinstance(row, dict) or ("filename" in row and not is_probability(str(row.get("probability")))):
        return {}
    return row


class TimeGuard:
    """Chooses how many frames to read per clip to finish all clips within a time budget.

    It measures the seconds per clip on the current rung of the ladder. If the remaining clips would not fit,
    it steps down. It steps up if they would fit with more frames, even if time grew in proportion to them.
    The first clips on a rung, and those begun on the previous rung, do not count. When not even one more clip
    fits, it is ``exhausted``. Clips whose extract is cached cost little and cannot cost less: they come first
    and are not counted.

    ``clips_left``: number of clips without an extract. ``begun``, ``ended``: how many clips; kept by the
    caller, from different threads.
    """

    def __init__(self, hours: float | None, clips_left: int, clock: Callable[[], float] = time.monotonic):
        self.clock, self.left = clock, clips_left
        self.deadline = None if hours is None else clock() + hours * 3600 * MARGIN
        self.rung, self.uncounted, self.last, self.begun, self.ended = 0, 1, 0.0, 0, 0
        self.seconds: list[float] = []

    @property
    def frames(self) -> int:
        """Number of frames to read from the next clip."""
        return FRAME_LADDER[self.rung]

    @property
    def flight(self) -> int:
        """Number of clips begun and not finished."""
        return self.begun - self.ended

    @property
    def exhausted(self) -> bool:
        """True if the next clip would end after the deadline."""
        if self.deadline is None:
            return False
        recent = self.seconds[-10:] or [self.last]
        wait_s = self.flight * sum(recent) / len(recent)  # for those begun before it
        return self.clock() + wait_s + max(recent) > self.deadline

    def finished(self, seconds: float, cached: bool = False) -> None:
        """Count one clip, ``seconds`` after the last one; step down or up the ladder if need be."""
        self.last = seconds
        if cached:
            return
        self.left -= 1
        if self.uncounted:
            self.uncounted -= 1
            return
        self.seconds.append(seconds)
        if self.deadline is None:
            return
        recent = self.seconds[-10:]
        needed_s, left_s = self.left * sum(recent) / len(recent), self.deadline - self.clock()
        up = FRAME_LADDER[max(self.rung - 1, 0)] / self.frames
        if needed_s > left_s and self.rung < len(FRAME_LADDER) - 1:
            self.rung, self.seconds, self.uncounted = self.rung + 1, [], 1 + max(1, self.flight)
        elif self.rung and needed_s * up < left_s:
            self.rung, self.seconds, self.uncounted = self.rung - 1, [], 1 + max(1, self.flight)


class Ask(NamedTuple):
    """A clip to score: its name in the CSV, its file (None: it can have none), frames to read."""

    filename: str
    path: Path | None
    frames: int


def score_clips(clips: pd.DataFrame, run: Callable[[Iterator[Ask]], Iterator[tuple[Ask, dict | Exception]]],
                output_csv: str | Path, unscored: Callable[[str, str], dict], fingerprint: str,
                hours: float | None = None, progress: bool = True,
                cached: Callable[[str, Path | None], bool] = lambda *_: False) -> pd.DataFrame:
    """Write ``filename,label`` for every clip, even after failures; returns the table with journal entries.

    Every row starts at the prior. Each finished clip adds a line to the journal ``<output>.journal``
    at once, and replaces its row within a second or so (by an atomic rename). After an interruption, call
    again: the run resumes. It also rescores clips that failed and clips whose file has changed. Without
    ``hours``, it rescores clips of which fewer frames were read for lack of time. A failure affects only its
    own clip.

    Args:
        clips: as returned by :func:`kaggle_utils.datasets.dfdc.clips_to_score`.
        run: yields each clip with its outcome, in any order: a dict with ``probability``, of which all
            entries go into the journal, or the exception that scoring raised. The entry ``read`` is the
            number of frames read, if it differs from those asked for. It asks for a clip when it begins it;
            the time guard chooses the frames then, or ends the run.
        unscored: ``(filename, reason) -> dict`` with ``probability``: the row of an unscored clip, the prior.
        fingerprint: identifies the models and settings of a journal.
        cached: ``(filename, path) -> bool``: whether the clip's extract is cached; such clips are scored
            first, so that the time guard knows how much time the others have.

    Raises:
        BlockingIOError: another run writes to ``output_csv``.
    """
    output_csv = Path(output_csv)
    output_csv.parent.mkdir(parents=True, exist_ok=True)
    with disk.locked(output_csv):
        disk.sweep(output_csv.parent)
        return _score_clips(clips, run, output_csv, unscored, fingerprint, hours, progress, cached)


def _score_clips(clips: pd.DataFrame, run: Callable, output_csv: Path, unscored: Callable, fingerprint: str,
                 hours: float | None, progress: bool, cached: Callable) -> pd.DataFrame:
    journal = Journal(output_csv.with_name(output_csv.name + ".journal"), fingerprint)
    stamps = {clip.filename: file_stamp(clip.path) for clip in clips.itertuples()}
    journal.finished = {name: row for name, row in journal.finished.items()
                        if row.get("stamp") == stamps.get(name)}
    hurried = {name for name, row in journal.finished.items() if row.get("read", 0) < FRAME_LADDER[0]}
    kept = set(journal.finished) - (hurried if hours is None else set())
    waiting = clips[~clips["filename"].isin(kept)]
    quick = {clip.filename for clip in waiting.itertuples() if cached(clip.filename, clip.path)}
    waiting = waiting.iloc[(~waiting["filename"].isin(quick)).argsort(kind="stable")]
    guard = TimeGuard(hours, len(waiting) - len(quick))
    rows = {name: journal.finished.get(name) or unscored(name, OUT_OF_TIME) for name in clips["filename"]}
    _write(output_csv, rows)

    def asks() -> Iterator[Ask]:
        for done, clip in enumerate(waiting.itertuples()):
            if guard.exhausted:
                tqdm.write(f"time budget of {hours} h used up: {len(waiting) - done} clips keep the prior")
                return
            guard.begun += 1
            yield Ask(clip.filename, clip.path, guard.frames)

    failures, last, written = 0, time.monotonic(), 0.0
    outcomes = tqdm(run(asks()), total=len(waiting), desc="clips", unit="clip", disable=not progress)
    for done, (ask, outcome) in enumerate(outcomes, start=1):
        name = ask.filename
        guard.ended += 1
        if isinstance(outcome, Exception):
            failures += 1
            if failures == done == FAILURES:
                raise outcome
            rows[name] = unscored(name, f"{type(outcome).__name__}: {outcome}")
            tqdm.write(disk.printable(f"{name} keeps the prior: {type(outcome).__name__}: {outcome}"))
        else:
            rows[name] = outcome
            journal.add({"filename": name, "stamp": stamps[name], "read": ask.frames, **outcome})
        last, before = time.monotonic(), last
        guard.finished(last - before, name in quick)
        if last - written > WRITE_S:
            _write(output_csv, rows)
            written = time.monotonic()
    _write(output_csv, rows)
    return _table(clips, rows)


def _table(clips: pd.DataFrame, rows: dict[str, dict]) -> pd.DataFrame:
    verdicts = pd.DataFrame(rows[name] for name in clips["filename"])
    verdicts = verdicts.drop(columns=["filename", "stamp"], errors="ignore")
    table = clips.rename(columns={"label": "truth"}).reset_index(drop=True).join(verdicts)
    return table.assign(label=table["probability"].round(DECIMALS))


def _write(output_csv: Path, rows: dict[str, dict]) -> None:
    lines = [",".join(HEADER)]
    for name, row in rows.items():
        quoted = '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\n\r') else name
        lines.append(f"{quoted},{row['probability']:.{DECIMALS}f}")
    disk.replace(output_csv, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
