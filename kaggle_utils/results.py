"""All measured results in one file, ``models/results.json``: README, model cards and notebooks quote it."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from . import disk
from .kaggle.paths import models_folder

FIELDS = ("name", "value", "low", "high", "data", "split", "command", "seed", "date")


def results_file(folder: str | Path | None = None) -> Path:
    """``results.json`` in a folder of weights, by default ``models/``."""
    return Path(folder or models_folder()) / "results.json"


def result(name: str, value: float, interval: tuple[float, float] | None = None, *, data: str, split: str,
           command: str, seed: int | None = None) -> dict:
    """One measured result; a later one of the same name replaces it.

    Args:
        name: slash-separated, such as ``face/dfdc test/AUC``.
        value, interval: the result and its 95 % interval.
        data, split, command, seed: what it was measured on, and how.
    """
    low, high = interval or (None, None)
    numbers = [None if number is None else round(float(number), 4) for number in (value, low, high)]
    return dict(zip(FIELDS, [name, *numbers, data, split, command, seed, f"{datetime.now(UTC):%Y-%m-%d}"],
                    strict=True))


def save_results(entries: Iterable[dict], folder: str | Path | None = None) -> Path:
    """Add results to the file, sorted by name; each replaces an earlier one of the same name."""
    path = results_file(folder)
    known = {entry["name"]: entry
             for entry in (json.loads(path.read_text("utf-8")) if path.is_file() else [])}
    known |= {entry["name"]: {field: entry[field] for field in FIELDS} for entry in entries}
    rows = ",\n".join(json.dumps(known[name], ensure_ascii=False) for name in sorted(known))
    disk.replace(path, f"[\n{rows}\n]\n")
    return path


def read_results(prefix: str = "", folder: str | Path | None = None) -> pd.DataFrame:
    """The results whose names start with ``prefix``, indexed by name; columns as in ``FIELDS``."""
    entries = json.loads(results_file(folder).read_text("utf-8"))
    table = pd.DataFrame(entries, columns=list(FIELDS)).set_index("name")
    return table[table.index.str.startswith(prefix)]


MARKED = re.compile(r"<!-- (?P<name>[^<>]+?)(?P<percent> %)? -->(?P<text>[^<>]*)<!-- / -->")


def fill(text: str, folder: str | Path | None = None) -> str:
    """Write the figures into a text that marks their places: ``<!-- NAME -->0.956 (0.948–0.963)<!-- / -->``.

    With `` %`` behind the name the figure appears as a percentage with one decimal. A figure over ten has one
    decimal, too.

    Raises:
        KeyError: a mark names no figure.
    """
    table = read_results(folder=folder)

    def written(match: re.Match) -> str:
        row = table.loc[match["name"]]
        scale, digits, unit = (100, 1, " %") if match["percent"] else (1, 3 if row["value"] < 10 else 1, "")
        numbers = [f"{scale * row[column]:.{digits}f}" for column in ("value", "low", "high")]
        interval = "" if pd.isna(row["low"]) else f" ({numbers[1]}–{numbers[2]})"
        return f"<!-- {match['name']}{match['percent'] or ''} -->{numbers[0]}{unit}{interval}<!-- / -->"

    return MARKED.sub(written, text)
