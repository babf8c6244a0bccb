"""Draws chain.png, the README's figure, from a clip of the miniature data set: python docs/chain.py."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from kaggle_utils.datasets import dfdc  # noqa: E402
from kaggle_utils.face import detection, framing  # noqa: E402
from kaggle_utils.media import sound, video  # noqa: E402
from kaggle_utils.voice import signal as voice_signal  # noqa: E402

GREEN, INK = "#2a9d5c", "#333333"


def picture(figure, place, title):
    """Axes for a picture at ``place`` (left, bottom, width, height as shares of the figure)."""
    axis = figure.add_axes(place)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10, color=INK)
    return axis


def station(figure, x, y, text):
    """A rounded box with a text, its centre at (x, y) as shares of the figure."""
    figure.add_artist(
        FancyBboxPatch(
            (x - 0.06, y - 0.075),
            0.12,
            0.15,
            boxstyle="round,pad=0,rounding_size=0.02",
            facecolor="#e8f1fa",
            edgecolor=INK,
        )
    )
    figure.text(x, y, text, ha="center", va="center", fontsize=10, color=INK)


def arrow(figure, start, end):
    """An arrow between two points, shares of the figure."""
    figure.add_artist(
        FancyArrowPatch(
            start, end, transform=figure.transFigure, arrowstyle="-|>", mutation_scale=12, color=INK
        )
    )


def draw(path):
    """The chain for one clip, left to right: frames and sound, crops and spectrogram, networks, fusion,
    answer.
    """
    clip = video.read_frames(path)
    person = framing.extract_faces(clip.images, detection.FaceFinder())[0]
    levels, times, _ = voice_signal.log_mel(sound.read_voice(path), sound.SAMPLE_RATE)

    figure = plt.figure(figsize=(11, 3.4))
    frame = picture(figure, (0.01, 0.3, 0.25, 0.48), "clip.mp4, ten frames")
    frame.imshow(clip.images[0])
    x, y, width, height = person.boxes[0]
    frame.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=GREEN, linewidth=2))
    crops = picture(figure, (0.31, 0.5, 0.27, 0.4), "MTCNN: ten face crops, 256 × 256 × 3")
    crops.imshow(np.concatenate([np.concatenate(person.images[row : row + 5], axis=1) for row in (0, 5)]))
    audio = picture(figure, (0.31, 0.06, 0.27, 0.3), f"voice: {times[-1]:.0f} s at 16 kHz, as spectrogram")
    audio.imshow(levels, origin="lower", aspect="auto", cmap="magma")

    station(figure, 0.69, 0.7, "face network")
    station(figure, 0.69, 0.21, "voice network")
    station(figure, 0.83, 0.455, "fusion,\ncalibration")
    figure.text(0.96, 0.455, "P(fake)", ha="center", va="center", fontsize=13, weight="bold", color=INK)
    for start, end in (
        ((0.265, 0.6), (0.305, 0.68)),
        ((0.265, 0.45), (0.305, 0.24)),
        ((0.585, 0.7), (0.627, 0.7)),
        ((0.585, 0.21), (0.627, 0.21)),
        ((0.752, 0.67), (0.79, 0.535)),
        ((0.752, 0.24), (0.79, 0.375)),
        ((0.892, 0.455), (0.917, 0.455)),
    ):
        arrow(figure, start, end)
    figure.savefig(HERE / "chain.png", dpi=100)


if __name__ == "__main__":
    draw(dfdc.read_dfdc(dfdc.data_folder())["path"].iloc[0])
