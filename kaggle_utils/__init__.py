"""From a video clip to a calibrated P(fake): the package that all notebooks share.

Data flows one way, and a lower module never imports a higher one::

    clip.mp4 ─ video (frames) ─ faces (crops 10×256×256×3) ─┐
             └ voice (samples, spectrograms) ───────────────┴─ networks ─ detector ─ submission.csv

Importing this package is cheap: TensorFlow, mtcnn, moviepy and librosa load on first use.
"""

from importlib import import_module

__version__ = "0.2.0"
__all__ = ["Detector", "Verdict"]


def __getattr__(name: str):
    """Load ``Detector`` and ``Verdict`` on first use (PEP 562): training needs no TensorFlow."""
    if name in __all__:
        return getattr(import_module(".detector", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
