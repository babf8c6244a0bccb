"""Where am I, and where do things lie? The only room that knows Kaggle from a laptop.

Folders are found by search, never by a fixed path: Kaggle has moved its mounts before
(``/kaggle/input/<slug>``, then ``/kaggle/input/competitions/<slug>`` and ``/kaggle/input/datasets/<owner>/<slug>``).
"""

import os
from pathlib import Path

COMPETITION = "deepfake-detection-challenge"
KAGGLE_INPUT = Path("/kaggle/input")
KAGGLE_WORKING = Path("/kaggle/working")
MOUNTS = ("{slug}", "competitions/{slug}", "datasets/*/{slug}", "notebooks/*/{slug}")


def on_kaggle() -> bool:
    """True in a Kaggle kernel; ``KAGGLE_KERNEL_RUN_TYPE`` is the vendor's own test."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def quick() -> bool:
    """True when ``DEEPFAKE_QUICK`` is set to anything but 0: notebooks then take small values."""
    return os.environ.get("DEEPFAKE_QUICK", "0") not in ("", "0")


def project_root() -> Path:
    """The folder that holds the ``kaggle_utils`` package: the clone, or the mounted data set."""
    return Path(__file__).resolve().parents[1]


def input_folder(slug: str) -> Path:
    """The folder under which Kaggle mounts a competition, data set or notebook output called ``slug``.

    Raises:
        FileNotFoundError: nothing of that name is attached; the message lists what is.
    """
    for mount in MOUNTS:
        for found in sorted(KAGGLE_INPUT.glob(mount.format(slug=slug))):
            return found
    attached = sorted(path.name for path in KAGGLE_INPUT.glob("*"))
    raise FileNotFoundError(f"{slug} is not attached under {KAGGLE_INPUT}; found {attached}")


def working_folder() -> Path:
    """The folder where results go, made if missing.

    It is the one that ``DEEPFAKE_WORK`` names, else ``/kaggle/working`` in a kernel and ``work/`` in the clone elsewhere.
    """
    folder = Path(os.environ.get("DEEPFAKE_WORK") or (KAGGLE_WORKING if on_kaggle() else project_root() / "work"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_folder() -> Path:
    """A data set in DFDC's layout, found in this order:

    the folder that ``DFDC_DATA`` names, the competition's mount on Kaggle, ``data/`` in the clone,
    and else the miniature data set, which is made on the spot in ``work/miniature``.
    """
    if named := os.environ.get("DFDC_DATA"):
        return Path(named)
    if on_kaggle():
        return input_folder(COMPETITION)
    if (data := project_root() / "data").is_dir():
        return data
    from .miniature import make_miniature

    return make_miniature(working_folder() / "miniature")


def models_folder() -> Path:
    """The folder of trained networks, ``models/`` beside ``kaggle_utils``."""
    return project_root() / "models"


def research_data(name: str = "") -> Path | None:
    """A folder of the research data for training and checking, or None where it is not at hand.

    ``DEEPFAKE_DATA`` names the folder that holds ``dfdc_faces``, ``dfdc_clips`` and the other sets.
    """
    root = os.environ.get("DEEPFAKE_DATA")
    folder = Path(root) / name if root else None
    return folder if folder and folder.exists() else None
