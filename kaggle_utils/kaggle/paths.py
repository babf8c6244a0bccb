"""Which machine is this, and where are its files? The only module that tells Kaggle from a laptop.

Folders are found by search, never by a fixed path: Kaggle has moved its mounts before
(``/kaggle/input/<slug>``, then ``/kaggle/input/competitions/<slug>`` and
``/kaggle/input/datasets/<owner>/<slug>``).
"""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

COMPETITION = "deepfake-detection-challenge"
KAGGLE_WORKING = Path("/kaggle/working")
MOUNTS = ("competitions/{slug}", "datasets/*/{slug}", "notebooks/*/{slug}", "models/*/{slug}/*/*/*", "{slug}")


def on_kaggle() -> bool:
    """True in a Kaggle kernel; ``KAGGLE_KERNEL_RUN_TYPE`` is Kaggle's own test."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def quick() -> bool:
    """True if ``DEEPFAKE_QUICK`` is set to anything but 0: notebooks then use small values."""
    return os.environ.get("DEEPFAKE_QUICK", "0") not in ("", "0")


def project_root() -> Path:
    """The folder that holds the ``kaggle_utils`` package: the clone, or the mounted data set."""
    return Path(__file__).resolve().parents[2]


def install_wheels() -> list[str]:
    """If mtcnn is missing, as on Kaggle, install the wheels beside the package; returns their names.

    Their dependencies are not installed: the image has them.
    """
    wheels = project_root() / "wheels"
    names = sorted({path.name.split("-")[0] for path in wheels.glob("*.whl")})
    if find_spec("mtcnn") is not None or not names:
        return []
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links",
               str(wheels), *names]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()
    return names


def prepare() -> None:
    """Prepare a notebook or a command: install missing wheels, and load TensorFlow quietly.

    While loading, TensorFlow prints to standard error before any setting can stop it; this is discarded.
    """
    install_wheels()
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow" or find_spec("tensorflow") is None:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        importlib.import_module("tensorflow").get_logger().setLevel("ERROR")  # no advice on retracing
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def input_root() -> Path:
    """The folder of a kernel's attached inputs: ``DEEPFAKE_INPUT`` if set, else ``/kaggle/input``."""
    return Path(os.environ.get("DEEPFAKE_INPUT") or "/kaggle/input")


def input_folder(slug: str) -> Path:
    """The mounted folder of the competition, data set, model or notebook output called ``slug``.

    Raises:
        FileNotFoundError: nothing of that name is attached; the message lists the attached inputs.
    """
    root = input_root()
    for mount in MOUNTS:
        for found in sorted(root.glob(mount.format(slug=slug))):
            return found
    attached = sorted(str(path.relative_to(root)) for depth in ("*", "*/*/*")
                      for path in root.glob(depth) if path.is_dir())
    raise FileNotFoundError(f"{slug} is not attached under {root}; found {attached}")


def kernel_title(notebook: str) -> str:
    """The title of a notebook's kernel: ``07_fusion_inference`` is "Deepfake 07 fusion inference"."""
    return f"Deepfake {notebook.replace('_', ' ')}"


def kernel_slug(notebook: str) -> str:
    """The name of a notebook's kernel in paths and links, as Kaggle derives it from the title."""
    return kernel_title(notebook).lower().replace(" ", "-")


def output_of(notebook: str, name: str) -> Path | None:
    """A file or folder in the output of another notebook's kernel; None if not attached or missing.

    Args:
        notebook: file name of the other notebook, without suffix.
        name: path in its working folder.
    """
    try:
        found = input_folder(kernel_slug(notebook)) / name
    except FileNotFoundError:
        return None
    return found if found.exists() else None


def working_folder() -> Path:
    """The folder for results, created if missing.

    ``DEEPFAKE_WORK`` if set, else ``/kaggle/working`` in a kernel and ``work/`` in the clone elsewhere.
    """
    folder = Path(os.environ.get("DEEPFAKE_WORK")
                  or (KAGGLE_WORKING if on_kaggle() else project_root() / "work"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def models_folder() -> Path:
    """The folder of trained networks, ``models/`` beside ``kaggle_utils``."""
    return project_root() / "models"


def research_data(name: str = "") -> Path | None:
    """A folder of the research data for training and checking, or None if it is not available.

    ``DEEPFAKE_DATA`` names the folder that holds ``dfdc_faces``, ``dfdc_clips`` and the other sets.
    """
    root = os.environ.get("DEEPFAKE_DATA")
    folder = Path(root) / name if root else None
    return folder if folder and folder.exists() else None
