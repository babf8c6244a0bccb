"""Check a submission as Kaggle would, within a moment: this room imports nothing but the standard library."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HEADER = ["filename", "label"]
NUMBER = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+\.")  # float() also takes 0_1


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
                                                  in labels.items() if not is_probability(label)],
        "duplicate rows": [name for name, count in Counter(names).items() if count > 1],
        "missing rows": sorted(set(known) - set(names)),
        "extra rows": sorted(set(names) - set(known)),
    }
    return [f"{len(places)} {kind}: {', '.join(places[:3])}{', …' if len(places) > 3 else ''}"
            for kind, places in found.items() if places] or ([] if rows else ["no rows"])


def is_probability(label: str) -> bool:
    """Whether a label is a number in [0, 1], as Kaggle reads it."""
    return bool(NUMBER.fullmatch(label)) and 0 <= float(label) <= 1
