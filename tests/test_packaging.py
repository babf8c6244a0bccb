"""The package as pip sees it, and the command that it installs."""

import re
import subprocess
import sys
import tomllib

import kaggle_utils
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_dependencies_are_those_of_the_first_block_of_requirements():
    first = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n\n")[1]
    assert PROJECT["dependencies"] == [
        line for line in first.splitlines() if line and not line.startswith("#")
    ]


def test_one_version_everywhere():
    citation = re.search(
        r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE
    )[1]
    changes = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert {PROJECT["version"], citation, changes} == {kaggle_utils.__version__}
    done = subprocess.run(
        [sys.executable, "-m", "kaggle_utils", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split()[-1] == kaggle_utils.__version__ and not done.stderr
