"""DFDC's folder layout, the table of training faces, and splits that keep an original with its fakes."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ..kaggle.paths import COMPETITION, input_folder, on_kaggle, project_root, working_folder

REAL, FAKE = 0, 1
pd.set_option("mode.string_storage", "python")  # Arrow's strings cannot hold names that are not UTF-8

def data_folder() -> Path:
    """Find a data set in DFDC's layout.

    In this order: the folder named by ``DFDC_DATA``, the competition's mount on Kaggle, ``data/`` in the
    clone, or else the miniature data set, which is made on the spot in ``work/miniature``.
    """
    if named := os.environ.get("DFDC_DATA"):
        return Path(named)
    if on_kaggle():
        return input_folder(COMPETITION)
    if (data := project_root() / "data").is_dir():
        return data
    from .miniature import make_miniature

    return make_miniature(working_folder() / "miniature")


VIDEO_SUFFIXES = frozenset([
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts",
])
TRAIN_FOLDERS = ("train_sample_videos", "dfdc_train_part_*", ".")


def is_inside(name: str) -> bool:
    """True if ``name`` is a plain file name that cannot lead out of a folder."""
    return (isinstance(name, str) and bool(name) and Path(name).name == name and name != ".."
            and not set("\\\0") & set(name))


def read_metadata(path: Path) -> dict[str, dict]:
    """The entries of a ``metadata.json`` in DFDC's layout, by clip name.

    Raises:
        ValueError: not a JSON object of objects, or a name that would leave the folder.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested too deeply
        raise ValueError(f"{path}: expected a JSON object of clips, found {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: expected a JSON object with one object for each clip")
    if outside := [name for name in entries if not is_inside(name)]:
        raise ValueError(f"{path}: expected plain file names, found {outside[:3]}")
    return entries


def read_dfdc(folder: str | Path) -> pd.DataFrame:
    """The labelled clips of a data set in DFDC's layout, one per row.

    Reads every ``metadata.json`` in ``folder``, ``train_sample_videos`` and ``dfdc_train_part_*``.

    Returns:
        Columns ``filename``, ``path``, ``label`` (``REAL``, ``FAKE`` or None), ``original`` (a fake's source
        or None), ``group`` (the original's name, also for the original itself) and ``part`` (folder name).

    Raises:
        FileNotFoundError: the layout's folders hold no ``metadata.json``.
    """
    folder = Path(folder)
    files = [file for pattern in TRAIN_FOLDERS for file in sorted(folder.glob(f"{pattern}/metadata.json"))]
    if not files:
        raise FileNotFoundError(f"{folder}: expected metadata.json there or in one of {TRAIN_FOLDERS[:2]}")
    rows = [
        {"filename": name, "path": file.parent / name, "label": entry.get("label"),
         "original": original, "group": original or name, "part": file.parent.name}
        for file in files
        for name, entry in read_metadata(file).items()
        for original in [entry.get("original") or None]
    ]
    return pd.DataFrame(rows)


def clips_to_score(folder: str | Path) -> pd.DataFrame:
    """The clips that a submission must list, in its order.

    ``folder`` is a DFDC root (``test_videos/`` in the order of ``sample_submission.csv``) or a flat folder of
    clips. Labels come from ``test_labels.csv`` or ``metadata.json`` if present. A clip that is in the sample
    submission but not in the folder keeps its row.

    Returns:
        Columns ``filename``, ``path`` and ``label`` (0.0 REAL, 1.0 FAKE, NaN unknown).

    Raises:
        FileNotFoundError: the folder is missing or holds no clip.
    """
    folder = Path(folder)
    clips = folder / "test_videos" if (folder / "test_videos").is_dir() else folder
    if not clips.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of clips")
    sample = folder / "sample_submission.csv"
    if clips != folder and sample.is_file():
        table = pd.read_csv(sample, dtype=str)
        if "filename" not in table:
            raise ValueError(f"{sample}: expected a column filename, found {list(table)[:5]}")
        names = table["filename"].dropna().tolist()
    else:
        names = sorted(path.name for path in clips.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    if not names:
        raise FileNotFoundError(f"{clips}: expected clips ({', '.join(sorted(VIDEO_SUFFIXES))}), found none")
    labels = _known_labels(folder, clips)
    return pd.DataFrame({
        "filename": names,
        "path": [clips / name if is_inside(name) else None for name in names],
        "label": [labels.get(name, np.nan) for name in names],
    })


def file_stamp(path: Path | None) -> list[int] | None:
    """A file's size in bytes and mtime in ns, to detect a changed clip; None if it is missing."""
    if path is None or not os.path.exists(path):  # path.exists() raises on an overlong name
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _known_labels(folder: Path, clips: Path) -> dict[str, float]:
    """Labels of the clips to score, if the data set provides them."""
    if (table := folder / "test_labels.csv").is_file():
        rows = pd.read_csv(table)
        if {"filename", "label"} <= set(rows):
            return dict(zip(rows["filename"], pd.to_numeric(rows["label"], errors="coerce"), strict=True))
        print(f"warning: {table} is ignored: expected the columns filename and label", file=sys.stderr)
    if (metadata := clips / "metadata.json").is_file():
        codes = {"REAL": float(REAL), "FAKE": float(FAKE)}
        try:
            entries = read_metadata(metadata)
        except ValueError as error:  # another program's file: it only supplies labels
            print(f"warning: labels are unknown: {error}", file=sys.stderr)
            return {}
        return {name: codes.get(str(entry.get("label")), np.nan) for name, entry in entries.items()}
    return {}
