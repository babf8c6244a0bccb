"""A whole folder to ``submission.csv``: complete from the first second, resumed after a kill, in time; and its check."""

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from .datasets.dfdc import file_stamp

HEADER = ["filename", "label"]
FRAME_LADDER = (10, 6, 3)  # frames read of a clip; the time guard steps down
DECIMALS = 5
OUT_OF_TIME = "not scored in the time budget"
FAILURES = 3  # so many first clips may fail; if all of them do, the fault is not theirs and the error is raised
MARGIN = 0.95  # share of the time budget that is planned for


class Journal:
    """One JSON line for each finished clip, beside the CSV; a line cut off by a kill is dropped when it is read."""

    def __init__(self, path: Path, fingerprint: str):
        """
        Args:
            path: the journal file; made if missing.
            fingerprint: names the models and settings; a journal with another one is started anew.
        """
        self.path = path
        self.finished: dict[str, dict] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        if lines and _parse(lines[0]).get("fingerprint") == fingerprint:
            self.finished = {row["filename"]: row for row in map(_parse, lines[1:]) if "filename" in row}
        else:
            lines = [json.dumps({"fingerprint": fingerprint}).encode()]
        _replace(path, b"".join(line + b"\n" for line in lines))

    def add(self, row: dict) -> None:
        """Append one finished clip and flush it to the disk."""
        with _named(self.path), self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[row["filename"]] = row


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}  # a torn line: the clip is scored again
    return row if isinstance(row, dict) else {}


class TimeGuard:
    """Chooses how many frames to read so that all clips are done within a budget.

    Measures seconds a clip on the present rung of the ladder; when the clips left would not fit, it steps down, and
    when not even one more clip fits, it says stop.
    """

    def __init__(self, hours: float | None, clips_left: int, clock: Callable[[], float] = time.monotonic):
        self.clock, self.left = clock, clips_left
        self.deadline = None if hours is None else clock() + hours * 3600 * MARGIN
        self.rung, self.seconds = 0, []

    @property
    def frames(self) -> int:
        """Frames to read of the next clip."""
        return FRAME_LADDER[self.rung]

    @property
    def exhausted(self) -> bool:
        """True when the next clip would end after the deadline."""
        if self.deadline is None:
            return False
        return self.clock() + (max(self.seconds[-10:]) if self.seconds else 0.0) > self.deadline

    def finished(self, seconds: float) -> None:
        """Count one clip that took ``seconds``, and step down if the rest would not fit."""
        self.left -= 1
        self.seconds.append(seconds)
        if self.deadline is None or self.rung == len(FRAME_LADDER) - 1:
            return
        recent = self.seconds[-10:]
        if self.clock() + self.left * sum(recent) / len(recent) > self.deadline:
            self.rung, self.seconds = self.rung + 1, []


def score_clips(
    clips: pd.DataFrame,
    predict: Callable[[str, Path | None, int, Path | None], dict],
    output_csv: str | Path,
    unscored: Callable[[str, str], dict],
    fingerprint: str,
    hours: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Write ``filename,label`` for every clip, whatever happens.

    Every row is there from the start with the prior; each finished clip replaces its row, by an atomic rename, and
    adds a line to the journal ``<output>.journal``. Called again, it goes on where it was stopped; a clip whose file
    has changed since is scored again, and so is one whose scoring failed: a failure costs that clip alone.

    Args:
        clips: as :func:`kaggle_utils.dataset.clips_to_score` gives them.
        predict: ``(filename, path, frames, following) -> dict`` with ``probability``; all entries go into the journal.
            ``following`` is the path of the clip after this one, None where there is none.
        output_csv: the file to write.
        unscored: ``(filename, reason) -> dict`` with ``probability``, the row of a clip that is not scored: the prior.
        fingerprint: names the models and settings that produced a journal.
        hours: time budget, or None.
        progress: show a progress bar.

    Returns:
        the table that was written, with the journal's entries as further columns.
    """
    output_csv = Path(output_csv)
    output_csv.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output_csv.with_name(output_csv.name + ".journal"), fingerprint)
    stamps = {clip.filename: file_stamp(clip.path) for clip in clips.itertuples()}
    journal.finished = {name: row for name, row in journal.finished.items() if row.get("stamp") == stamps.get(name)}
    waiting = clips[~clips["filename"].isin(journal.finished)]
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
            journal.add({"filename": clip.filename, "stamp": stamps[clip.filename], **rows[clip.filename]})
        guard.finished(time.monotonic() - started)
        _write(output_csv, rows)
    return _table(clips, rows)


def _table(clips: pd.DataFrame, rows: dict[str, dict]) -> pd.DataFrame:
    verdicts = pd.DataFrame(rows[name] for name in clips["filename"]).drop(columns=["filename", "stamp"], errors="ignore")
    table = clips.rename(columns={"label": "truth"}).reset_index(drop=True).join(verdicts)
    return table.assign(label=table["probability"].round(DECIMALS))


def _write(output_csv: Path, rows: dict[str, dict]) -> None:
    lines = [",".join(HEADER)]
    for name, row in rows.items():
        quoted = '"' + name.replace('"', '""') + '"' if any(mark in name for mark in ',"\n\r') else name
        lines.append(f"{quoted},{row['probability']:.{DECIMALS}f}")
    _replace(output_csv, ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with _named(path):
        partial.write_bytes(content)
        os.replace(partial, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of the disk say which file was written: a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# --- the check ------------------------------------------------------------------------------------------------------
def problems_of(submission: str | Path, expected: Iterable[str] | None = None) -> list[str]:
    """What Kaggle would refuse in a submission; an empty list for a valid one.

    Args:
        submission: the CSV to check.
        expected: names of the clips that it must hold, each once; None: its names are not compared with a data set.

    Returns:
        one line for each kind of problem, with the first rows or names that have it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(submission, encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header != HEADER:
        return [f"wrong header: expected {','.join(HEADER)!r}, found {','.join(header)!r}"]
    lines = dict(enumerate(rows, start=2))  # as an editor numbers them where no name holds a line break
    names = [row[0] for row in rows if len(row) == 2]
    labels = {number: row[1] for number, row in lines.items() if len(row) == 2}
    known = names if expected is None else list(expected)
    found = {
        "rows that do not have two fields": [f"row {number}: {row}" for number, row in lines.items() if len(row) != 2],
        "labels that are no number in [0, 1]": [f"row {number}: {label!r}" for number, label in labels.items()
                                                if not _is_probability(label)],
        "duplicate rows": [name for name, count in Counter(names).items() if count > 1],
        "missing rows": sorted(set(known) - set(names)),
        "extra rows": sorted(set(names) - set(known)),
    }
    return [f"{len(places)} {kind}: {', '.join(places[:3])}{', …' if len(places) > 3 else ''}"
            for kind, places in found.items() if places] or ([] if rows else ["no rows"])


def _is_probability(label: str) -> bool:
    try:
        return 0 <= float(label) <= 1  # False for NaN
    except ValueError:
        return False
