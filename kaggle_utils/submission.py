"""Score a whole folder into ``submission.csv``: always complete, resumable, on time; and check the file."""

import csv
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from . import disk
from .datasets.dfdc import file_stamp

HEADER = ["filename", "label"]
FRAME_LADDER = (10, 6, 3)  # frames read per clip; the time guard steps down
DECIMALS = 5
OUT_OF_TIME = "not scored in the time budget"
NUMBER = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+\.")  # float() also takes 0_1
FAILURES = 3  # if this many first clips all fail, the fault is not theirs: raise the error
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
    if not isinstance(row, dict) or ("filename" in row and not _is_probability(str(row.get("probability")))):
        return {}
    return row


class TimeGuard:
    """Chooses how many frames to read per clip to finish all clips within a time budget.

    It measures the seconds per clip on the current rung of the ladder. If the remaining clips would not fit,
    it steps down. It steps up if they would fit with more frames, even if time grew in proportion to them.
    The first clip on a rung, and the clip read ahead on the previous rung, do not count. When not even one
    more clip fits, it is ``exhausted``.
    """

    def __init__(self, hours: float | None, clips_left: int, clock: Callable[[], float] = time.monotonic):
        self.clock, self.left = clock, clips_left
        self.deadline = None if hours is None else clock() + hours * 3600 * MARGIN
        self.rung, self.uncounted, self.last = 0, 1, 0.0
        self.seconds: list[float] = []

    @property
    def frames(self) -> int:
        """Number of frames to read from the next clip."""
        return FRAME_LADDER[self.rung]

    @property
    def exhausted(self) -> bool:
        """True if the next clip would end after the deadline."""
        if self.deadline is None:
            return False
        return self.clock() + max(self.seconds[-10:], default=self.last) > self.deadline

    def finished(self, seconds: float) -> None:
        """Count one clip that took ``seconds``, and step down or up the ladder if need be."""
        self.left, self.last = self.left - 1, seconds
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
            self.rung, self.seconds, self.uncounted = self.rung + 1, [], 2
        elif self.rung and needed_s * up < left_s:
            self.rung, self.seconds, self.uncounted = self.rung - 1, [], 2


def score_clips(clips: pd.DataFrame, predict: Callable[[str, Path | None, int, Path | None], dict],
                output_csv: str | Path, unscored: Callable[[str, str], dict], fingerprint: str,
                hours: float | None = None, progress: bool = True) -> pd.DataFrame:
    """Write ``filename,label`` for every clip, even after failures; returns the table with journal entries.

    Every row starts at the prior. Each finished clip replaces its row (by an atomic rename) and adds a line
    to the journal ``<output>.journal``. After an interruption, call again: the run resumes. It also rescores
    clips that failed and clips whose file has changed. Without ``hours``, it rescores clips of which fewer
    frames were read for lack of time. A failure affects only its own clip.

    Args:
        clips: as returned by :func:`kaggle_utils.datasets.dfdc.clips_to_score`.
        predict: ``(filename, path, frames, following) -> dict`` with ``probability``; all entries go into the
            journal. ``following`` is the path of the next clip, or None. The entry ``read`` is the number of
            frames requested, if it differs from ``frames``, as for a clip read ahead.
        unscored: ``(filename, reason) -> dict`` with ``probability``: the row of an unscored clip, the prior.
        fingerprint: identifies the models and settings of a journal.

    Raises:
        BlockingIOError: another run writes to ``output_csv``.
    """
    output_csv = Path(output_csv)
    output_csv.parent.mkdir(parents=True, exist_ok=True)
    with disk.locked(output_csv):
        disk.sweep(output_csv.parent)
        return _score_clips(clips, predict, output_csv, unscored, fingerprint, hours, progress)


def _score_clips(clips: pd.DataFrame, predict: Callable, output_csv: Path, unscored: Callable,
                 fingerprint: str, hours: float | None, progress: bool) -> pd.DataFrame:
    journal = Journal(output_csv.with_name(output_csv.name + ".journal"), fingerprint)
    stamps = {clip.filename: file_stamp(clip.path) for clip in clips.itertuples()}
    journal.finished = {name: row for name, row in journal.finished.items()
                        if row.get("stamp") == stamps.get(name)}
    hurried = {name for name, row in journal.finished.items() if row.get("read", 0) < FRAME_LADDER[0]}
    kept = set(journal.finished) - (hurried if hours is None else set())
    waiting = clips[~clips["filename"].isin(kept)]
    guard = TimeGuard(hours, len(waiting))
    rows = {name: journal.finished.get(name) or unscored(name, OUT_OF_TIME) for name in clips["filename"]}
    _write(output_csv, rows)
    bar = tqdm(waiting.itertuples(), total=len(waiting), desc="clips", unit="clip", disable=not progress)
    failures = 0
    for done, (clip, following) in enumerate(zip(bar, [*waiting["path"].iloc[1:], None], strict=False)):
        if guard.exhausted:
            tqdm.write(f"time budget of {hours} h used up: {len(waiting) - done} clips keep the prior")
            break
        started = time.monotonic()
        try:
            rows[clip.filename] = predict(clip.filename, clip.path, guard.frames, following)
        except Exception as error:
            failures += 1
            if failures == done + 1 == FAILURES:
                raise
            rows[clip.filename] = unscored(clip.filename, f"{type(error).__name__}: {error}")
            tqdm.write(f"{clip.filename} keeps the prior: {type(error).__name__}: {error}")
        else:
            journal.add({"filename": clip.filename, "stamp": stamps[clip.filename], "read": guard.frames,
                         **rows[clip.filename]})
        guard.finished(time.monotonic() - started)
        _write(output_csv, rows)
    return _table(clips, rows)


def _table(clips: pd.DataFrame, rows: dict[str, dict]) -> pd.DataFrame:
    verdicts = pd.DataFrame(rows[name] for name in clips["filename"])
    verdicts = verdicts.drop(columns=["filename", "stamp", "read"], errors="ignore")
    table = clips.rename(columns={"label": "truth"}).reset_index(drop=True).join(verdicts)
    return table.assign(label=table["probability"].round(DECIMALS))


def _write(output_csv: Path, rows: dict[str, dict]) -> None:
    lines = [",".join(HEADER)]
    for name, row in rows.items():
        quoted = '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\n\r') else name
        lines.append(f"{quoted},{row['probability']:.{DECIMALS}f}")
    disk.replace(output_csv, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


# --- the check ----------------------------------------------------------------------------------------------
def problems_of(submission: str | Path, expected: Iterable[str] | None = None) -> list[str]:
    """Faults for which Kaggle would reject a submission: one line each, with the first affected rows.

    Args:
        expected: names of the required clips, each once; None: names are not checked against a data set.

    Raises:
        FileNotFoundError: there is no such file.
    """
    csv.field_size_limit(2**27)  # a field longer than that is no name
    with open(submission, encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header != HEADER:
        return [f"wrong header: expected {','.join(HEADER)!r}, found {','.join(header)!r}"]
    lines = dict(enumerate(rows, start=2))  # line numbers, if no name holds a line break
    names = [row[0] for row in rows if len(row) == 2]
    labels = {number: row[1] for number, row in lines.items() if len(row) == 2}
    known = names if expected is None else list(expected)
    found = {
        "rows that do not have two fields": [f"row {number}: {row}" for number, row in lines.items()
                                             if len(row) != 2],
        "labels that are not numbers in [0, 1]": [f"row {number}: {label!r}" for number, label
                                                  in labels.items() if not _is_probability(label)],
        "duplicate rows": [name for name, count in Counter(names).items() if count > 1],
        "missing rows": sorted(set(known) - set(names)),
        "extra rows": sorted(set(names) - set(known)),
    }
    return [f"{len(places)} {kind}: {', '.join(places[:3])}{', …' if len(places) > 3 else ''}"
            for kind, places in found.items() if places] or ([] if rows else ["no rows"])


def _is_probability(label: str) -> bool:
    return bool(NUMBER.fullmatch(label)) and 0 <= float(label) <= 1
