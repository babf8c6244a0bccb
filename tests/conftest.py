"""Lets pytest and nbval run everything from one command: quick settings, the miniature data set, quiet logs."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(DEEPFAKE_QUICK="1", TF_CPP_MIN_LOG_LEVEL="3", MPLBACKEND="agg", TQDM_DISABLE="1", PYTHONHASHSEED="0")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items):
    """Give a busy machine time between two messages of a notebook's kernel (nbval's own limit is 5 s)."""
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 120


def pytest_sessionstart():
    """Make the miniature before any kernel starts, so that all notebooks and tests share one."""
    from kaggle_utils.miniature import make_miniature
    from kaggle_utils.platform import working_folder

    os.environ["DFDC_DATA"] = str(make_miniature(working_folder() / "miniature"))


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The miniature data set in DFDC's layout."""
    return Path(os.environ["DFDC_DATA"])


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Two real DFDC clips, where the research data is at hand."""
    from kaggle_utils.platform import research_data

    folder = research_data("dfdc_clips")
    if folder is None:
        pytest.skip("needs real clips: set DEEPFAKE_DATA to the folder that holds dfdc_clips")
    return folder
