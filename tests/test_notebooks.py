"""The notebooks as they are committed: stripped, ordered, readable; and a package that is cheap to import."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_and_readable(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "strip the outputs"
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert max(len(cell["source"]) for cell in code) <= LONGEST_CELL
    assert "".join(cells[0]["source"]).startswith(f"# {path.stem[:2]} ")
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_captures_output_in_a_widget(path):
    """nbclient, which runs notebooks on Kaggle and in nbconvert, answers such a cell while it waits for its
    end, and then
    does not hear of it: without a time limit it waits for ever."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not [
        name
        for name in ("interact(", "interactive(", "interactive_output(", "Output(")
        if name in "".join(code)
    ]


def test_all_first_cells_are_the_same():
    cells = [json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS]
    code = [[cell["source"] for cell in some if cell["cell_type"] == "code"] for some in cells]
    assert len({"".join(some[0] + some[1]) for some in code}) == 1
    assert len(code[0][0]) <= 6


def test_training_imports_need_no_tensorflow():
    modules = ", ".join(
        name
        for name in (
            "recipes.face.training",
            "recipes.voice.training",
            "recipes.face.networks",
            "recipes.voice.networks",
            "recipes.fusion.networks",
            "recipes.face.augment",
            "recipes.face.data",
            "recipes.voice.data",
            "recipes.loop",
            "kaggle_utils.metrics",
            "kaggle_utils.datasets.dfdc",
            "kaggle_utils.face.framing",
            "kaggle_utils.media.video",
            "kaggle_utils.kaggle.paths",
        )
    )
    code = f"import sys, {modules}; print([n for n in ('tensorflow', 'mtcnn', 'moviepy', 'librosa') if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"},
    )
    assert found.stdout.strip() == "[]"
