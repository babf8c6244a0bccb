"""A folder of clips on one page, the most suspicious first; the same order as JSON and as CSV.

Each clip has a page of its own and a record, from which an interrupted run resumes. What could not be judged
stands in groups of its own: no one should take it for clean.
"""

import base64
import csv
import hashlib
import io
import json
import time
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from . import __version__, disk, pictures, report
from .datasets.dfdc import clips_to_score, file_stamp
from .detector import Detector, checked_digests
from .extraction import READING
from .face.quality import MARK
from .kaggle.paths import models_folder
from .spread import Team, once

FACES, SIDE, QUALITY = 5, 72, 80  # pictures in a row, their side in px, of their JPEGs
EVERY_S = 30.0  # the page is written this often while clips are analysed
GROUPS = JUDGED, IN_PART, NOT_JUDGED = "judged", "judged in part", "not judged"
COLUMNS = ["file", "group", "word", "probability", "face", "voice", "people", "duration_s", "quality",
           "warnings", "page", "sha256"]


def write_overview(folder: str | Path, output: str | Path, models: Path | None = None, prior: float = 0.5,
                   jobs: int = 1, backend: str = "loky", scheduler: str | None = None,
                   progress: bool = True) -> list[dict]:
    """Write ``index.html``, ``index.json``, ``index.csv`` and ``clips/`` with a page for each clip.

    Call it again after an interruption: finished clips are kept, unless the clip, the weights or the prior
    have changed. A clip that fails gets a row that says why.

    Args:
        folder: clips, or a DFDC root; ``datasets.dfdc.clips_to_score`` lists them.
        output: a folder, created if missing.
        models, prior: as in :meth:`Detector.load`.
        jobs, backend, scheduler: as in :class:`spread.Team`; each worker loads the networks once.

    Returns:
        The rows in the order of the page: what :func:`report.record` returns, ``group``, ``people``, ``page``
        (a path in ``output``) and ``faces`` (data URLs).

    Raises:
        FileNotFoundError: no clips. BlockingIOError: another run writes to ``output``.
    """
    clips, output = clips_to_score(Path(folder).resolve()), Path(output)
    (output / "clips").mkdir(parents=True, exist_ok=True)
    digests = checked_digests(Path(models) if models else models_folder())
    with disk.locked(output / "index.html"):
        disk.sweep(output)
        disk.sweep(output / "clips")
        about = f"{' '.join(digests.values())} {prior} {READING} {__version__}"
        keys = {row.filename: _key(row.path, about) for row in clips.itertuples()}
        rows = {name: _kept(output, name, key) or _unjudged(name, "Not analysed yet.")
                for name, key in keys.items()}
        waiting = [(row.filename, row.path) for row in clips.itertuples() if "key" not in rows[row.filename]]
        work, written = partial(_judge, output.resolve(), models, prior, keys), 0.0
        with Team(jobs, backend, scheduler) as team, tqdm(total=len(waiting), desc="clips", unit="clip",
                                                          disable=not progress) as bar:
            for (name, _), outcome in team.run(work, waiting):
                failed = isinstance(outcome, Exception)
                rows[name] = _unjudged(name, f"{type(outcome).__name__}: {outcome}") if failed else outcome
                if time.monotonic() - written > EVERY_S:
                    _write(output, rows, prior)
                    written = time.monotonic()
                bar.update()
        return _write(output, rows, prior)


# --- one clip -----------------------------------------------------------------------------------------------
def _judge(output: Path, models: Path | None, prior: float, keys: dict, clip: tuple) -> dict:
    """Write the page and the record of one clip, in any process, and return its row."""
    name, path = clip
    if path is None:
        return _unjudged(name, "Its name is not a plain file name.")
    found = report.study(path, once(Detector.load, models, prior))
    page = _page(output, name)
    disk.replace(page, report.page(found))
    row = {"key": keys[name], **report.record(found), "file": name, "people": len(found.people),
           "page": f"clips/{page.name}", "faces": _faces(found)}
    row["group"] = _group(row)
    if row["group"] == NOT_JUDGED:
        row["probability"] = None  # the prior, which says nothing about the clip
    disk.replace(page.with_suffix(".json"), json.dumps(row))
    return row


def _page(output: Path, name: str) -> Path:
    return disk.fitting(output / "clips" / name, ".html")


def _faces(found: report.Study) -> list[str]:
    """Small pictures, evenly spread, of the person from whom the clip's score comes."""
    person = next((person for person in found.people if person.decides), None)
    if person is None:
        return []
    seen = [frame for frame in found.kept if person.scores[frame] == person.scores[frame]]
    return [pictures.jpeg(pictures.thumb(person.crops[seen[len(seen) * part // FACES]], SIDE), QUALITY)
            for part in range(min(FACES, len(seen)))]


def _group(row: dict) -> str:
    """Whether a clip was judged. A likely fake counts as judged even if a part of it was not."""
    if row["face"] is None and row["voice"] is None:
        return NOT_JUDGED
    whole = row["face"] is not None and row["voice"] is not None
    whole = whole and not any(MARK in note or " frames decode" in note for note in row["warnings"])
    return JUDGED if whole or row["word"] == report.ZONES[0].name else IN_PART


def _unjudged(name: str, reason: str) -> dict:
    """The row of a clip without a verdict."""
    return {"file": name, "group": NOT_JUDGED, "word": report.UNKNOWN.name, "probability": None, "face": None,
            "voice": None, "people": 0, "duration_s": None, "quality": "", "warnings": [reason], "page": "",
            "sha256": "", "faces": []}


def _key(path: Path | None, about: str) -> str:
    """Identifies what a record was made from: the clip's size and mtime, weights, prior and version."""
    return hashlib.sha256(f"{file_stamp(path)} {about}".encode()).hexdigest()


def _kept(output: Path, name: str, key: str) -> dict | None:
    """The finished row of a clip from an earlier run; None if there is none or it is out of date."""
    try:
        row = json.loads(_page(output, name).with_suffix(".json").read_text(encoding="utf-8"))
        return row if row["key"] == key and (output / row["page"]).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the page -----------------------------------------------------------------------------------------------
def _write(output: Path, rows: dict[str, dict], prior: float) -> list[dict]:
    ordered = in_order(list(rows.values()))
    shown = [{name: value for name, value in row.items() if name not in ("key", "faces")} for row in ordered]
    disk.replace(output / "index.json", json.dumps({"prior": prior, "clips": shown}, indent=1))
    disk.replace(output / "index.csv", _table(ordered))
    disk.replace(output / "index.html", overview_page(ordered, prior))
    return ordered


def in_order(rows: list[dict]) -> list[dict]:
    """Rows by group, the most suspicious first; without a probability by name."""
    return sorted(rows, key=lambda row: (GROUPS.index(row["group"]), row["group"] == NOT_JUDGED
                                         or -row["probability"], row["file"]))


def _table(rows: list[dict]) -> str:
    """The rows as CSV; a name that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in rows:
        cells = [" ".join(row[name]) if name == "warnings" else row[name] for name in COLUMNS]
        table.writerow([f"'{cell}" if str(cell).startswith(("=", "+", "-", "@", "\t", "\r")) else cell
                        for cell in cells])
    return text.getvalue()


def overview_page(rows: list[dict], prior: float) -> str:
    """The page as HTML, self-contained; its script, which only filters, is named by its digest."""
    from markupsafe import Markup

    script = (Path(__file__).parent / "overview.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = [(name, [row for row in rows if row["group"] == name]) for name in GROUPS]
    words = {zone.name: zone for zone in (*report.ZONES, report.UNKNOWN)}
    return report.rendered("overview.html.jinja", rows=rows, groups=groups, words=words, prior=prior,
                           script=Markup(script), digest=digest)
