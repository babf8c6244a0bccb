"""The one home of measured figures: ``models/results.json``. README, cards and notebooks quote it; a test compares."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from .kaggle.paths import models_folder

FIELDS = ("name", "value", "low", "high", "data", "split", "command", "seed", "date")


def results_file(folder: str | Path | None = None) -> Path:
    """``results.json`` of a folder of weights, ``models/`` unless given."""
    return Path(folder or models_folder()) / "results.json"


def result(name: str, value: float, interval: tuple[float, float] | None = None, *, data: str, split: str, command: str,
           seed: int | None = None) -> dict:
    """One measured figure.

    Args:
        name: slash-separated, such as ``face/dfdc test/AUC``; a later figure of this name replaces it.
        value, interval: the figure and its 95 % interval.
        data, split: what it was measured on. command: what measured it. seed: of the run.
    """
    low, high = interval or (None, None)
    numbers = [None if number is None else round(float(number), 4) for number in (value, low, high)]
    return dict(zip(FIELDS, [name, *numbers, data, split, command, seed, f"{datetime.now(UTC):%Y-%m-%d}"], strict=True))


def save_results(entries: Iterable[dict], folder: str | Path | None = None) -> Path:
    """Add figures to the file, sorted by name; each replaces the former one of its name."""
    path = results_file(folder)
    known = {entry["name"]: entry for entry in (json.loads(path.read_text("utf-8")) if path.is_file() else [])}
    known |= {entry["name"]: {field: entry[field] for field in FIELDS} for entry in entries}
    rows = ",\n".join(json.dumps(known[name], ensure_ascii=False) for name in sorted(known))
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    return path


def read_results(prefix: str = "", folder: str | Path | None = None) -> pd.DataFrame:
    """The figures whose names start with ``prefix``, indexed by name; columns as ``FIELDS``."""
    entries = json.loads(results_file(folder).read_text("utf-8"))
    table = pd.DataFrame(entries, columns=list(FIELDS)).set_index("name")
    return table[table.index.str.startswith(prefix)]


def quote(name: str, folder: str | Path | None = None, digits: int = 3) -> str:
    """A figure as text, such as ``0.956 (0.948–0.963)``.

    Raises:
        KeyError: no figure of that name.
    """
    row = read_results(folder=folder).loc[name]
    interval = "" if pd.isna(row["low"]) else f" ({row['low']:.{digits}f}–{row['high']:.{digits}f})"
    return f"{row['value']:.{digits}f}{interval}"
