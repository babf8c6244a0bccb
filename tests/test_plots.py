"""Every figure has a title, axes and units, and none stays open in pyplot."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from kaggle_utils import plots

RNG = np.random.default_rng(0)
SHARES = pd.DataFrame({"detected": [9, 0], "fallback": [1, 10]}, ["a.mp4", "b.mp4"])
PICTURES = RNG.integers(0, 256, (7, 32, 24, 3), np.uint8)
MEL = (np.sort(RNG.uniform(-80, 0, (20, 30)), axis=0), np.arange(30) * 0.016, np.geomspace(60, 7600, 20))
BORDERS = ["detected", "fallback", "REAL", "FAKE", "red", "detected", "FAKE"]


def frames():
    sources = ["detected", "interpolated", "fallback"] * 4
    return [
        {
            "time_s": i / 2,
            "track": i % 2,
            "box": [0, 0, 1, 1],
            "source": source,
            "probability": None if source == "fallback" else i / 12,
        }
        for i, source in enumerate(sources)
    ]


FIGURES = {
    "contact_sheet": lambda: plots.contact_sheet(PICTURES, list("abcdefg"), title="Faces", borders=BORDERS),
    "pair_strip": lambda: plots.pair_strip(PICTURES[:3], PICTURES[3:6], title="Pairs", difference=True),
    "boxes_on_images": lambda: plots.boxes_on_images(
        PICTURES[:2],
        [np.array([[2, 3, 10, 12]]), np.empty((0, 4))],
        landmarks=[np.ones((1, 5, 2)), np.empty((0, 5, 2))],
        title="Boxes",
    ),
    "shares": lambda: plots.shares(SHARES, "Shares"),
    "score_distribution": lambda: plots.score_distribution([0.1, 0.9, np.nan, 0.4], [0, 1, 1, np.nan]),
    "reliability": lambda: plots.reliability([0, 1, 1, 0], [0.2, 0.8, 1.0, 0.0]),
    "frame_scores": lambda: plots.frame_scores(frames(), clip_score=0.4),
    "training_curves": lambda: plots.training_curves(
        {"loss": [1, 0.5], "val_loss": [1, 0.7], "val_auc": [0.5, 0.8]}
    ),
    "spectrograms": lambda: plots.spectrograms([("REAL", *MEL), ("FAKE", *MEL)], "Log-mel"),
    "waveform": lambda: plots.waveform(RNG.integers(-3000, 3000, (800, 2), np.int16), 8000),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_complete_and_closed(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    "name",
    [
        "shares",
        "score_distribution",
        "reliability",
        "frame_scores",
        "training_curves",
        "spectrograms",
        "waveform",
    ],
)
def test_diagram_names_its_axes(name):
    figure = FIGURES[name]()
    assert any(axis.get_xlabel() for axis in figure.axes)
    assert any(axis.get_ylabel() for axis in figure.axes)


def test_contact_sheet_explains_its_colours():
    (legend,) = FIGURES["contact_sheet"]().legends
    assert [text.get_text() for text in legend.get_texts()] == ["REAL", "FAKE", "detected", "fallback"]


def test_contact_sheet_takes_pictures_of_several_sizes():
    figure = plots.contact_sheet([np.zeros((10, 20, 3), np.uint8), np.zeros((30, 10, 3), np.uint8)])
    assert len(figure.axes) == 2


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="no images"):
        plots.contact_sheet([])
    with pytest.raises(ValueError, match="7 pictures on the left and 2"):
        plots.pair_strip(PICTURES, PICTURES[:2])


def test_score_distribution_counts_missing_scores():
    assert "4 clips, 1 without a score" in FIGURES["score_distribution"]().get_suptitle()


def test_fallback_frames_stand_at_the_bottom():
    axis = FIGURES["frame_scores"]().axes[0]
    crosses = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert crosses and all(np.all(line.get_ydata() == 0) for line in crosses)
