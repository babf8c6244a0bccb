"""The notebooks as Kaggle runs them: all is attached under a read-only folder in one of its layouts, no internet.

``make test`` runs notebook 07 from each layout; ``make test-mounts``, which sets ``DEEPFAKE_MOUNTS=all``, all
the others too.
"""

import inspect
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import conftest
from conftest import ROOT
from kaggle_utils import storage
from kaggle_utils.kaggle import paths
from kaggle_utils.kaggle import push as kaggle_push
from recipes import blocks
from recipes.face import networks as face_networks
from recipes.voice import networks as voice_networks

# Kaggle's two layouts, and within the later one other things than a data set that may hold the package: where a
# thing called {slug} holds the package, and where the competition lies
LAYOUTS = {
    "flat": ("{slug}", paths.COMPETITION),
    "by kind": ("datasets/alice/{slug}/project", f"competitions/{paths.COMPETITION}"),
}
HOLDERS = {
    "output of a kernel": ("notebooks/alice/{slug}", f"competitions/{paths.COMPETITION}"),
    "model": ("models/alice/{slug}/keras/default/1", f"competitions/{paths.COMPETITION}"),
}
CLIPS = 1  # to score

GUARD = '''
import sys

LOCAL = ("127.0.0.1", "::1", "localhost", "", None)

def refuse(event, arguments):
    """Let no socket leave this machine, as in a kernel without internet."""
    address = {"socket.connect": arguments[1:2], "socket.sendto": arguments[1:2], "socket.getaddrinfo": [arguments]}.get(event)
    address = address and address[0]
    if isinstance(address, tuple) and address[0] not in LOCAL:
        raise ConnectionRefusedError(f"{event} to {address[0]}: no internet here")

sys.addaudithook(refuse)
'''


@pytest.fixture(scope="module")
def small_models(tmp_path_factory) -> Path:
    """Small untrained networks, which load in no time."""
    folder = tmp_path_factory.mktemp("models")
    for name, branch in {
        "face": face_networks.mesoinception4(64),
        "voice": voice_networks.voice_inception(width=8),
    }.items():
        storage.save_network(blocks.with_head(branch), folder / f"{name}.keras")
    for name in ("detector.json", "results.json"):
        shutil.copy(ROOT / "models" / name, folder)
    return folder


def lay_out(folder: Path, layout: str, models: Path = ROOT / "models"):
    """Lay out a kernel's folders; returns a function that runs Python in its working folder."""
    package, competition = (
        folder / "input" / place.format(slug=kaggle_push.DATA_SLUG) for place in (LAYOUTS | HOLDERS)[layout]
    )
    for part in kaggle_push.PARTS:
        if part != "models":
            shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "models").symlink_to(models)
    attach_competition(competition)
    for name, content in {
        "guard/sitecustomize.py": GUARD,
        "working/conftest.py": inspect.getsource(conftest.pytest_collection_modifyitems),
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DEEPFAKE", "DFDC", "PYTHONPATH"))
    }
    env |= {
        "PYTHONPATH": str(folder / "guard"),
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "DEEPFAKE_INPUT": str(folder / "input"),
        "DEEPFAKE_WORK": str(folder / "working"),
    }
    return lambda *arguments, **changed: subprocess.run(
        [sys.executable, *arguments],
        cwd=folder / "working",
        env=env | changed,
        capture_output=True,
        text=True,
    )


def attach_competition(folder: Path) -> None:
    """The miniature as Kaggle shows the competition: clips to score have no labels."""
    miniature = Path(os.environ["DFDC_DATA"])
    (folder / "test_videos").mkdir(parents=True)
    (folder / "train_sample_videos").symlink_to(miniature / "train_sample_videos")
    rows = (miniature / "sample_submission.csv").read_text().splitlines()[: CLIPS + 1]
    (folder / "sample_submission.csv").write_text("\n".join(rows) + "\n")
    for row in rows[1:]:
        name = row.split(",")[0]
        shutil.copy(miniature / "test_videos" / name, folder / "test_videos")


def run_notebook(run, working: Path, name: str, change: tuple[str, str] = ("", ""), **changed) -> None:
    """Run one notebook through nbval in a kernel's working folder, a line of it changed as a user would."""
    source = kaggle_push.notebooks()[name].read_text(encoding="utf-8")
    assert change[0] in source
    (working / "__notebook__.ipynb").write_text(
        source.replace(*change) if all(change) else source, encoding="utf-8"
    )
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-cell-timeout=300",
        "__notebook__.ipynb",
        **changed,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def submit(folder: Path, layout: str, models: Path) -> list[str]:
    """Run the submission kernel in a layout; returns the lines of its CSV."""
    run_notebook(lay_out(folder, layout, models), folder / "working", kaggle_push.SUBMISSION)
    return (folder / "working" / "submission.csv").read_text().splitlines()


def submissions(layouts, folder: Path, models: Path) -> None:
    """The submission kernel scores every clip in each of the layouts."""
    with ThreadPoolExecutor(2) as pool:  # starting up keeps one core busy
        written = [
            pool.submit(submit, folder / layout.replace(" ", "_"), layout, models) for layout in layouts
        ]
    for header, *rows in (future.result() for future in written):
        assert header == "filename,label" and len(rows) == CLIPS
        assert all(0 < float(row.split(",")[1]) < 1 and not row.endswith(",0.50000") for row in rows)


def test_submission_from_every_layout(small_models, tmp_path):
    submissions(LAYOUTS, tmp_path, small_models)


every_notebook = pytest.mark.skipif(
    os.environ.get("DEEPFAKE_MOUNTS") != "all", reason="make test-mounts runs it"
)


@every_notebook
def test_submission_with_the_package_elsewhere(tmp_path):
    submissions(HOLDERS, tmp_path, ROOT / "models")


@every_notebook
@pytest.mark.parametrize("name", [name for name in kaggle_push.notebooks() if name != kaggle_push.SUBMISSION])
def test_notebook_from_mounts(name, tmp_path):
    run_notebook(lay_out(tmp_path, "by kind"), tmp_path / "working", name, DEEPFAKE_QUICK="1")


@every_notebook
def test_output_feeds_the_next_kernel(tmp_path):
    """04 and 05 -> 06 -> 07, where what 04 and 05 trained is as the shipped weights."""
    joining, scoring = tmp_path / "joining", tmp_path / "scoring"
    run = lay_out(joining, "by kind", models=tmp_path / "models")
    (tmp_path / "models").mkdir()
    for name in ("detector.json", "results.json"):
        shutil.copy(ROOT / "models" / name, tmp_path / "models")
    for name, branch in {"04_face_inception": "face", "05_voice_inception": "voice"}.items():
        output = joining / "input/notebooks/alice" / paths.kernel_slug(name) / "training"
        output.mkdir(parents=True)
        shutil.copy(ROOT / "models" / f"{branch}.keras", output)
    run_notebook(run, joining / "working", "06_fusion_training", DEEPFAKE_QUICK="1")

    run = lay_out(scoring, "by kind", models=tmp_path / "models")
    (scoring / "input/notebooks/alice").mkdir(parents=True)
    (joining / "working").rename(scoring / "input/notebooks/alice" / paths.kernel_slug("06_fusion_training"))
    run_notebook(
        run,
        scoring / "working",
        "07_fusion_inference",
        change=("MODELS = None", "MODELS = paths.output_of('06_fusion_training', 'fusion')"),
    )
    assert len((scoring / "working/submission.csv").read_text().splitlines()) == CLIPS + 1


def test_guard_refuses_the_internet(tmp_path):
    run = lay_out(tmp_path, "flat")
    for code in ("socket.create_connection(('192.0.2.1', 80))", "socket.getaddrinfo('www.kaggle.com', 443)"):
        done = run("-c", f"import socket; {code}")
        assert "no internet here" in done.stderr
    local = "server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname())"
    assert run("-c", f"import socket; {local}").returncode == 0
