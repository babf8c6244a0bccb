"""Where things lie: Kaggle's mount layouts, past and present, and the first cell of the notebooks in each of
them.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, small_wheels
from kaggle_utils.datasets import dfdc
from kaggle_utils.kaggle import paths, push

LAYOUTS = [
    "{slug}",
    "competitions/{slug}",
    "datasets/alice/{slug}",
    "notebooks/alice/{slug}",
    "models/alice/{slug}/keras/default/1",
]


@pytest.fixture
def attached(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPFAKE_INPUT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_folder_in_every_layout(attached, layout):
    folder = attached / layout.format(slug="clips-of-alice")
    folder.mkdir(parents=True)
    (attached / "datasets/bob/clips-of-bob").mkdir(parents=True)
    assert paths.input_folder("clips-of-alice") == folder
    with pytest.raises(FileNotFoundError, match="clips-of-carol is not attached.*datasets/bob/clips-of-bob"):
        paths.input_folder("clips-of-carol")


@pytest.mark.parametrize("layout", ["{slug}", "notebooks/alice/{slug}"])
def test_output_of_another_kernel(attached, layout):
    assert paths.output_of("04_face_inception", "training/face.keras") is None
    file = attached / layout.format(slug="deepfake-04-face-inception") / "training/face.keras"
    file.parent.mkdir(parents=True)
    file.touch()
    assert paths.output_of("04_face_inception", "training/face.keras") == file
    assert paths.output_of("04_face_inception", "face.keras") is None


def test_on_kaggle_the_competition_is_the_data(attached, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.delenv("DFDC_DATA")
    with pytest.raises(FileNotFoundError, match="deepfake-detection-challenge is not attached"):
        dfdc.data_folder()
    folder = attached / "competitions" / paths.COMPETITION
    folder.mkdir(parents=True)
    assert dfdc.data_folder() == folder
    monkeypatch.delenv("DEEPFAKE_QUICK")
    assert not paths.quick()


# -- the first cell, in a new environment that has Python and pip alone, like an image without mtcnn ---------


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_first_cell(python, folder, ending):
    cells = json.loads(push.notebooks()[push.SUBMISSION].read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    cell = "\n".join(code[:2])  # find the package, prepare
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PIP"))}
    (folder / "working").mkdir(exist_ok=True)
    return subprocess.run(
        [python, "-c", f"{cell}\n{ending}"],
        cwd=folder / "working",
        capture_output=True,
        text=True,
        env=env | {"DEEPFAKE_INPUT": str(folder / "input"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "datasets/alice/{slug}/project"])
def test_first_cell_finds_the_package(bare_python, layout, tmp_path):
    folder = tmp_path / "input" / layout.format(slug="deepfake")
    shutil.copytree(ROOT / "kaggle_utils", folder / "kaggle_utils")
    done = run_first_cell(bare_python, tmp_path, "print(paths.models_folder())")
    assert done.stdout.strip() == str(folder / "models"), done.stderr


def test_without_the_package_the_first_cell_stops_as_the_text_above_it_says(bare_python, tmp_path):
    (tmp_path / "input").mkdir()
    cells = json.loads(push.notebooks()[push.SUBMISSION].read_text())["cells"]
    assert "stops with `StopIteration`, attach" in "".join(cells[1]["source"])
    assert "StopIteration" in run_first_cell(bare_python, tmp_path, "").stderr


def test_first_cell_installs_the_wheels(bare_python, tmp_path):
    folder = tmp_path / "input" / "datasets/alice/deepfake/project"
    shutil.copytree(ROOT / "kaggle_utils", folder / "kaggle_utils")
    small_wheels(folder)
    done = run_first_cell(bare_python, tmp_path, "import mtcnn, lz4; print(paths.install_wheels())")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
