"""DFDC's folder layout, the table of training faces, and splits that keep an original with its fakes."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from ..kaggle.paths import COMPETITION, input_folder, on_kaggle, project_root, working_folder


def data_folder() -> Path:
    """A data set in DFDC's layout, found in this order:

    the folder that ``DFDC_DATA`` names, the competition's mount on Kaggle, ``data/`` in the clone,
    and else the miniature data set, which is made on the spot in ``work/miniature``.
    """
    if named := os.environ.get("DFDC_DATA"):
        return Path(named)
    if on_kaggle():
        return input_folder(COMPETITION)
    if (data := project_root() / "data").is_dir():
        return data
    from .miniature import make_miniature

    return make_miniature(working_folder() / "miniature")

REAL, FAKE = 0, 1
VIDEO_SUFFIXES = frozenset([
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts",
])
TRAIN_FOLDERS = ("train_sample_videos", "dfdc_train_part_*", ".")


def is_inside(name: str) -> bool:
    """True when ``name`` is a plain file name, so that joining it to a folder cannot leave that folder."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and name != ".." and not set("\\\0") & set(name)


def read_metadata(path: Path) -> dict[str, dict]:
    """The entries of a ``metadata.json`` in DFDC's layout, by clip name.

    Raises:
        ValueError: not a JSON object of objects, or a name that would leave the folder.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON object of clips, found {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: expected a JSON object with one object for each clip")
    if outside := [name for name in entries if not is_inside(name)]:
        raise ValueError(f"{path}: expected plain file names, found {outside[:3]}")
    return entries


def read_dfdc(folder: str | Path) -> pd.DataFrame:
    """The labelled clips of a data set in DFDC's layout, one row each.

    Reads every ``metadata.json`` in ``folder``, ``train_sample_videos`` and ``dfdc_train_part_*``.

    Returns:
        Columns ``filename``, ``path``, ``label`` (``REAL``, ``FAKE`` or None), ``original`` (a fake's source
        or None), ``group`` (the original's name, also for the original itself) and ``part`` (folder name).

    Raises:
        FileNotFoundError: no ``metadata.json`` lies where the layout expects one.
    """
    folder = Path(folder)
    files = [file for pattern in TRAIN_FOLDERS for file in sorted(folder.glob(f"{pattern}/metadata.json"))]
    if not files:
        raise FileNotFoundError(f"{folder}: expected metadata.json there or in one of {TRAIN_FOLDERS[:2]}")
    rows = [
        {"filename": name, "path": file.parent / name, "label": entry.get("label"),
         "original": entry.get("original"), "group": entry.get("original") or name, "part": file.parent.name}
        for file in files
        for name, entry in read_metadata(file).items()
    ]
    return pd.DataFrame(rows)


def clips_to_score(folder: str | Path) -> pd.DataFrame:
    """The clips that a submission must name, in its order.

    ``folder`` is a DFDC root (``test_videos/`` in the order of ``sample_submission.csv``) or a flat folder of clips.
    Labels come from ``test_labels.csv`` or ``metadata.json`` where there is one. A clip that the sample submission
    names and the folder lacks keeps its row.

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
        names = pd.read_csv(sample, dtype=str)["filename"].tolist()
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
    """Size in bytes and time of the last change in ns of a file, by which a changed clip is known; None where there is none."""
    if path is None or not os.path.exists(path):  # not path.exists(), which raises on a name that is too long
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _known_labels(folder: Path, clips: Path) -> dict[str, float]:
    """Labels of the clips to score, where the data set gives them."""
    if (table := folder / "test_labels.csv").is_file():
        rows = pd.read_csv(table)
        return dict(zip(rows["filename"], rows["label"].astype(float), strict=True))
    if (metadata := clips / "metadata.json").is_file():
        codes = {"REAL": float(REAL), "FAKE": float(FAKE)}
        return {name: codes.get(entry.get("label"), np.nan) for name, entry in read_metadata(metadata).items()}
    return {}
