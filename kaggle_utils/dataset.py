"""DFDC's folder layout, the table of training faces, and splits that keep an original with its fakes."""

import json
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

REAL, FAKE = 0, 1
VIDEO_SUFFIXES = frozenset([
    ".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts",
])
TRAIN_FOLDERS = ("train_sample_videos", "dfdc_train_part_*", ".")
VALIDATION_PARTS = range(45, 48)
TEST_PARTS = range(48, 50)
UNALTERED_P99 = 9.0  # grey levels: below it, the first frame of a fake shows its original's face
CROP_SIZE = 224


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


def read_face_table(folder: str | Path) -> pd.DataFrame:
    """The table of DFDC training faces (``faces_*.csv``), one row for each crop.

    Returns:
        Columns ``videoname``, ``stem``, ``label`` (0 REAL, 1 FAKE), ``original``, ``group`` (stem of the original,
        or of the clip itself), ``part``, ``source_px`` (side of the square in the source frame), ``archive``, and
        ``p99`` (99th percentile of the grey-level difference to the original's crop; NaN where unknown).
    """
    folder = Path(folder)
    tables = [
        pd.read_csv(file, dtype={"original": str}).assign(archive=file.with_suffix("").name + ".tar.xz")
        for file in sorted(folder.glob("faces_*.csv"))
    ]
    if not tables:
        raise FileNotFoundError(f"{folder}: expected faces_0.csv and its like")
    table = pd.concat(tables, ignore_index=True)
    differences = pd.read_csv(folder / "pair_difference.csv").set_index("videoname")["p99"]
    stem = table["videoname"].str.removesuffix(".mp4")
    return table.assign(
        stem=stem,
        label=(table["label"] == "FAKE").astype(int),
        group=table["original"].str.removesuffix(".mp4").fillna(stem),
        p99=table["videoname"].map(differences),
    )


def is_unaltered(table: pd.DataFrame) -> pd.Series:
    """True for rows that say FAKE and show a face without a visible change (bool, one for each row)."""
    return (table["label"] == FAKE) & (table["p99"] < UNALTERED_P99)


def split_by_part(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``split``: parts 45–47 ``validation``, 48–49 ``test``, the others ``train``.

    Raises:
        ValueError: an original and one of its fakes fall on two sides.
    """
    split = pd.Series("train", index=table.index)
    split[table["part"].isin(VALIDATION_PARTS)] = "validation"
    split[table["part"].isin(TEST_PARTS)] = "test"
    sides = split.groupby(table["group"]).nunique()
    if (torn := sides.index[sides > 1]).size:
        raise ValueError(f"expected each original on one side with its fakes, found {list(torn[:3])} on two")
    return table.assign(split=split)


def load_face_crops(folder: str | Path, table: pd.DataFrame, cache: str | Path | None = None) -> np.ndarray:
    """Read the crops that ``table`` names from their archives, in the table's order.

    Args:
        folder: holds ``faces_*.tar.xz``.
        table: rows of :func:`read_face_table`.
        cache: a ``.npy`` file; made at the first call, mapped into memory afterwards.

    Returns:
        uint8 RGB (N, 224, 224, 3).

    Raises:
        FileNotFoundError: crops that the table names are missing from the archives.
        ValueError: the cache was made for another table.
    """
    shape = (len(table), CROP_SIZE, CROP_SIZE, 3)
    if cache is not None and Path(cache).is_file():
        crops = np.load(cache, mmap_mode="r", allow_pickle=False)
        if crops.shape != shape:
            raise ValueError(f"{cache}: expected crops of shape {shape}, found {crops.shape}; delete the file")
        return crops
    crops = np.empty(shape, np.uint8)
    rows = {stem: row for row, stem in enumerate(table["stem"])}
    archives = [Path(folder) / name for name in sorted(table["archive"].unique())]
    with ThreadPoolExecutor(max_workers=len(archives)) as pool:
        found = set().union(*pool.map(lambda archive: _unpack(archive, rows, crops), archives))
    if missing := rows.keys() - found:
        raise FileNotFoundError(f"{folder}: {len(missing)} crops of the table are in no archive, {sorted(missing)[:3]}")
    if cache is not None:
        partial = Path(cache).with_suffix(".partial.npy")
        np.save(partial, crops)
        partial.replace(cache)
    return crops


def _unpack(archive: Path, rows: dict[str, int], crops: np.ndarray) -> set[str]:
    """Decode the JPEGs of one archive into their rows of ``crops``; returns the stems that were found."""
    found = set()
    with tarfile.open(archive) as members:
        for member in members:
            stem = Path(member.name).stem
            if member.isfile() and stem in rows:
                encoded = np.frombuffer(members.extractfile(member).read(), np.uint8)
                crops[rows[stem]] = cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
                found.add(stem)
    return found


def sample_balanced(labels: Iterable[int], count: int, seed: int = 0) -> np.ndarray:
    """Row numbers (int64, sorted) of a random sample with as many REAL as FAKE, ``count`` in all."""
    labels = np.asarray(list(labels))
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(np.flatnonzero(labels == value))[: count // 2] for value in (REAL, FAKE)]
    return np.sort(np.concatenate(halves))
