"""Figures: one home, quoted everywhere else."""

import json
import re

import pandas as pd
import pytest

from conftest import ROOT
from kaggle_utils import results

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*.md"))]
FIGURE = re.compile(r"(?<![\d.])[01]\.\d{3}(?!\d)")
CONSTANTS = {"0.693", "0.709"}  # ln 2, the cost of answering 0.5; the step of MTCNN's pyramid


@pytest.fixture
def folder(tmp_path):
    made = [
        results.result("face/AUC", 0.95649, (0.9481, 0.9632), data="d", split="s", command="c", seed=1),
        results.result("voice/EER", 0.1234, data="d", split="s", command="c"),
    ]
    results.save_results(made, tmp_path)
    return tmp_path


def test_a_later_figure_replaces_the_former_of_its_name(folder):
    results.save_results([results.result("voice/EER", 0.1, data="d", split="s", command="c")], folder)
    table = results.read_results(folder=folder)
    assert table["value"].to_dict() == {"face/AUC": 0.9565, "voice/EER": 0.1}
    assert (
        list(results.read_results("face/", folder).index) == ["face/AUC"]
        and table.loc["voice/EER", "seed"] != 1
    )


def test_marks_are_filled(folder):
    text = "AUC <!-- face/AUC -->?<!-- / -->, EER <!-- voice/EER % -->old<!-- / -->."
    filled = results.fill(text, folder)
    assert filled == (
        "AUC <!-- face/AUC -->0.957 (0.948–0.963)<!-- / -->, EER <!-- voice/EER % -->12.3 %<!-- / -->."
    )
    assert results.fill(filled, folder) == filled
    with pytest.raises(KeyError, match="nothing"):
        results.fill("<!-- nothing --><!-- / -->", folder)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_readme_and_cards_quote_the_figures_that_were_measured(path):
    text = path.read_text(encoding="utf-8")
    assert results.fill(text) == text, "run: python -m kaggle_utils results"
    typed = re.sub(r"```.*?```|`[^`]*`", "", results.MARKED.sub("", text), flags=re.DOTALL)
    assert not set(FIGURE.findall(typed)) - CONSTANTS, "a figure that is not in models/results.json"


def test_no_notebook_states_a_figure():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        prose = [
            "".join(cell["source"])
            for cell in json.loads(path.read_text())["cells"]
            if cell["cell_type"] == "markdown"
        ]
        assert not set(FIGURE.findall("\n".join(prose))) - CONSTANTS, path.name


def test_every_figure_says_where_it_comes_from():
    table = results.read_results()
    assert not table.index.has_duplicates and table[["data", "split", "command", "date"]].notna().all(
        axis=None
    )
    inside = table.dropna(subset=["low"])
    assert ((inside["low"] <= inside["value"]) & (inside["value"] <= inside["high"])).all()
    assert pd.to_datetime(table["date"]).notna().all()
