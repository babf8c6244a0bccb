"""README: short, its links lead somewhere, and its commands do what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from kaggle_utils.report import STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "models").rglob("*.md")),
]
SHELL = [
    line.partition("  #")[0].strip().removeprefix("$ ")
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if ".venv/bin/" in line
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, miniature):
    """A folder with ``clip.mp4``, as a reader of the README would have it."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(sorted((miniature / "test_videos").glob("*.mp4"))[0], folder / "clip.mp4")
    (folder / "folder/of/clips").mkdir(parents=True)
    shutil.copy(folder / "clip.mp4", folder / "folder/of/clips/a.mp4")
    return folder


def test_it_is_short():
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    places = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [place for place in places if "://" not in place and not (page.parent / place).exists()]
    assert not missing


@pytest.mark.parametrize("command", [line for line in SHELL if " report " in line or " predict " in line])
def test_commands_on_a_clip(folder, command):
    words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "folder/of/clips" in words:
        assert "</html>" in (folder / "report/index.html").read_text(encoding="utf-8")
        return
    stages = ["loading the networks", *STAGES[:-1]] if "report" in words else []
    assert done.stderr.splitlines() == stages, "no log lines reach the user"
    if "predict" in words:
        assert 0 <= json.loads(done.stdout)["probability"] <= 1
        assert not re.search(r"\.\d{5}", done.stdout), "numbers are rounded"
    else:
        assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")


def test_push_is_staged(folder):
    (command,) = [line for line in SHELL if line.endswith(" push")]
    words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(command)]
    done = subprocess.run(
        [*words, "--dry-run", "--no-data", "--build", folder / "build"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "nothing was sent" in done.stdout, done.stderr


def test_the_example_in_python(folder, detector, monkeypatch):
    monkeypatch.chdir(folder)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(
        example.replace("Detector.load()", "detector").replace("from kaggle_utils import Detector", ""),
        {"detector": detector},
        names,
    )
    assert 0 <= names["verdict"].probability <= 1


def test_make_has_the_targets_that_it_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
