"""Figures of the notebooks: contact sheets, spectrograms, scores, calibration, training curves.

Every function returns a finished ``matplotlib.figure.Figure`` with title, axes and units. It is already
closed in pyplot: as the last expression of a cell it is shown once, and ``figure.savefig(path)`` saves it.
matplotlib is imported on first use.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "REAL": "#2b7bba", "FAKE": "#d1495b", "no label": "#6c757d",
    "detected": "#2a9d5c", "interpolated": "#e9a227", "fallback": "#8a8a8a",
}
SOURCE_MARKERS = {"detected": "o", "interpolated": "^", "fallback": "x"}
LINE_STYLES = ("-", "--", ":", "-.")  # to tell curves apart without colour
LINE_COLOURS = ("#2b7bba", "#d1495b", "#2a9d5c", "#e9a227", "#7b5ea7", "#6c757d")
MEASURES = {"auc": "AUC", "eer": "EER", "accuracy": "accuracy"}  # in 0..1, with axis labels


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), title: str | None = None,
            **options) -> tuple["Figure", np.ndarray]:
    """A figure, closed in pyplot, and its axes (rows, columns); ``size`` in inches."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False,
                                   layout="constrained", **options)
    pyplot.close(figure)
    if title:
        figure.suptitle(title)
    return figure, axes


def _frame(axis: "Axes", colour: str | None, width: float = 4) -> None:
    """Remove the ticks of a picture and draw its border in ``colour`` (None: no border)."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=width)


def _legend_of_names(figure: "Figure", names: Sequence[str]) -> None:
    """Add a legend below the figure for the colours of ``COLOURS`` that ``names`` uses."""
    from matplotlib.patches import Patch

    used = [name for name in COLOURS if name in set(names)]
    if used:
        figure.legend(handles=[Patch(color=COLOURS[name], label=name) for name in used],
                      loc="outside lower center", ncols=len(used), frameon=False)


def contact_sheet(images: Sequence[np.ndarray], titles: Sequence[str] | None = None, columns: int = 5,
                  title: str | None = None, borders: Sequence[str] | None = None,
                  cell: float = 1.8) -> "Figure":
    """Pictures side by side, row by row.

    Args:
        images: uint8 RGB pictures (H, W, 3), of any sizes; (N, H, W, 3) too.
        borders: each picture's border: a name of ``COLOURS`` (listed in a legend) or a matplotlib colour.
    """
    if len(images) == 0:
        raise ValueError("contact_sheet: found no images, expected at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    ratio = float(np.median([image.shape[0] / image.shape[1] for image in images]))
    height = rows * (cell * ratio + 0.36 * (titles is not None)) + 0.5 * bool(title) + 0.3 * bool(borders)
    figure, axes = _figure(rows, columns, (columns * cell, height), title)
    for axis in axes.flat[len(images):]:
        axis.axis("off")
    for index, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image)
        _frame(axis, COLOURS.get(borders[index], borders[index]) if borders is not None else None)
        if titles is not None:
            axis.set_title(titles[index], fontsize=8, parse_math=False)  # a clip's name may hold a $
    if borders is not None:
        _legend_of_names(figure, borders)
    return figure


def pair_strip(left: Sequence[np.ndarray], right: Sequence[np.ndarray],
               names: tuple[str, str] = ("REAL", "FAKE"), titles: Sequence[str] | None = None,
               title: str | None = None, difference: bool = False, gain: float = 4,
               cell: float = 1.8) -> "Figure":
    """Each picture of ``left`` above its counterpart in ``right``: real and fake, or two framings.

    Args:
        left, right: two equally long lists of uint8 RGB pictures (H, W, 3); with ``difference``, both
            pictures of a pair have the same size.
        names: names of the two rows; names of ``COLOURS`` colour the borders.
        difference: add a row with the absolute difference in grey levels, multiplied by ``gain``.
    """
    if len(left) != len(right) or len(left) == 0:
        raise ValueError(f"pair_strip: found {len(left)} pictures on the left and {len(right)} on the "
                         "right, expected equally many and at least one")
    rows = {names[0]: left, names[1]: right}
    if difference:
        gaps = [np.abs(a.astype(np.float32) - b).mean(axis=-1) for a, b in zip(left, right, strict=True)]
        rows[f"difference × {gain:g}"] = [np.clip(gain * gap, 0, 255) for gap in gaps]
    ratio = float(np.median([image.shape[0] / image.shape[1] for image in left]))
    size = (max(3.0, len(left) * cell + 0.3), len(rows) * cell * ratio + 0.6)
    figure, axes = _figure(len(rows), len(left), size, title)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            _frame(axis, COLOURS.get(name), width=2.5)
        line[0].set_ylabel(name)
    for axis, text in zip(axes[0], titles or [], strict=False):
        axis.set_title(text, fontsize=8, parse_math=False)
    return figure


def boxes_on_images(images: Sequence[np.ndarray], boxes: Sequence[np.ndarray],
                    titles: Sequence[str] | None = None, landmarks: Sequence[np.ndarray] | None = None,
                    columns: int = 2, title: str | None = None, colour: str = "#00e676",
                    cell: float = 4.5) -> "Figure":
    """Pictures with rectangles and points drawn on them.

    Args:
        boxes: the boxes of each picture (n, 4): x, y, width, height in pixels.
        landmarks: the points of each picture (n, 5, 2) in pixels.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    figure = contact_sheet(images, titles, columns, title, cell=cell)
    for index, (axis, found) in enumerate(zip(figure.axes, boxes, strict=False)):
        found = np.reshape(found, (-1, 4))
        patches = [Rectangle((x, y), width, height) for x, y, width, height in found]
        axis.add_collection(PatchCollection(patches, facecolor="none", edgecolor=colour,
                                            linewidth=1.5 if len(found) < 30 else 0.5))
        if landmarks is not None:
            points = np.reshape(landmarks[index], (-1, 2))
            axis.plot(points[:, 0], points[:, 1], ".", color="#ffea00", markersize=5)
    return figure


def shares(table, title: str | None = None, xlabel: str = "share of crops (%)",
           ylabel: str = "clip") -> "Figure":
    """Stacked horizontal bars, one per row of ``table``.

    Args:
        table: DataFrame whose index names the bars (clips, methods) and whose columns (for instance detected,
            interpolated, fallback) hold counts; each row is scaled to 100 %.
    """
    percent = 100 * table.to_numpy(float) / table.to_numpy(float).sum(axis=1, keepdims=True).clip(min=1e-9)
    figure, axes = _figure(size=(8, 1.3 + 0.28 * len(table)), title=title)
    axis, left = axes[0, 0], np.zeros(len(table))
    for index, name in enumerate(table.columns):
        colour = COLOURS.get(name, LINE_COLOURS[index % len(LINE_COLOURS)])
        axis.barh([str(row) for row in table.index], percent[:, index], left=left, color=colour, label=name)
        left += percent[:, index]
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 100))
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)
    figure.legend(loc="outside lower center", ncols=table.shape[1], frameon=False)
    return figure


def score_distribution(probabilities: Sequence[float], labels: Sequence[int] | None = None,
                       title: str = "Distribution of the scores", bins: int = 20,
                       unit: str = "clips") -> "Figure":
    """Histogram of P(fake) by label, above a strip of the individual scores.

    Args:
        probabilities: (N,) in [0, 1]; NaN are left out and counted in the title.
        labels: (N,) 0 = REAL, 1 = FAKE; NaN or -1 if unknown; None if no label is known.
    """
    scores = np.asarray(probabilities, float)
    classes = np.full(len(scores), np.nan) if labels is None else np.asarray(labels, float)
    classes = np.nan_to_num(classes, nan=-1).astype(int)
    missing = int(np.isnan(scores).sum())
    note = f" ({len(scores)} {unit}{f', {missing} without a score' if missing else ''})"
    figure, axes = _figure(2, 1, (8, 4), title + note, sharex=True, height_ratios=[4, 1])
    (histogram,), (strip,) = axes
    groups = {name: scores[(classes == value) & ~np.isnan(scores)]
              for name, value in (("REAL", 0), ("FAKE", 1), ("no label", -1))}
    groups = {name: values for name, values in groups.items() if len(values)}
    histogram.hist(list(groups.values()), bins=np.linspace(0, 1, bins + 1), stacked=True, edgecolor="white",
                   color=[COLOURS[name] for name in groups],
                   label=[f"{n} ({len(v)})" for n, v in groups.items()])
    for level, (name, values) in enumerate(groups.items()):
        strip.plot(values, np.full(len(values), level), "|", color=COLOURS[name], markersize=12)
    histogram.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    histogram.set(ylabel=unit, xlim=(0, 1))
    histogram.yaxis.get_major_locator().set_params(integer=True)
    histogram.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    strip.set(xlabel="P(fake)", yticks=range(len(groups)), yticklabels=list(groups),
              ylim=(-0.6, len(groups) - 0.4))
    return figure


def reliability(labels: Sequence[int], probabilities: Sequence[float], bins: int = 10,
                title: str = "Reliability") -> "Figure":
    """Reliability diagram (Guo et al. 2017): the share of fakes in each score bin, and the bin counts.

    Args:
        labels: (N,) 0 = REAL, 1 = FAKE.
        probabilities: (N,) P(fake) in [0, 1].
    """
    predicted, observed, count = metrics.reliability(labels, probabilities, bins)
    figures = (f"ECE {metrics.expected_calibration_error(labels, probabilities, bins):.3f}, "
               f"log loss {metrics.log_loss(labels, probabilities):.3f}, {len(labels)} clips")
    figure, axes = _figure(2, 1, (5, 5.5), f"{title}: {figures}", sharex=True, height_ratios=[4, 1])
    (diagram,), (counts,) = axes
    diagram.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8, label="perfect")
    error = np.sqrt(observed * (1 - observed) / count)
    diagram.errorbar(predicted, observed, error, fmt="o-", color=COLOURS["REAL"], capsize=3,
                     label="measured ± 1 s.e.")
    diagram.set(ylabel="share of fakes", xlim=(0, 1), ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    centres = (np.minimum(np.floor(predicted * bins), bins - 1) + 0.5) / bins
    counts.bar(centres, count, width=0.9 / bins, color=COLOURS["no label"])
    counts.set(xlabel="P(fake)", ylabel="clips")
    return figure


def frame_scores(frames: Sequence[Mapping], title: str = "Score of each frame",
                 clip_score: float | None = None) -> "Figure":
    """P(fake) over time: one line per track, broken where there is no score, and one marker per source.

    Frames without a score are marked at the bottom.

    Args:
        frames: ``Verdict.frames``: dicts with time_s (s), track, source and probability (or None).
        clip_score: the clip's P(fake), drawn as a horizontal line.
    """
    figure, axes = _figure(size=(8, 3.5), title=title)
    axis = axes[0, 0]
    for number, track in enumerate(sorted({frame["track"] for frame in frames}, key=str)):
        own = sorted((frame for frame in frames if frame["track"] == track),
                     key=lambda frame: frame["time_s"])
        scores = [frame["probability"] if _is_number(frame["probability"]) else np.nan for frame in own]
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        axis.plot([frame["time_s"] for frame in own], scores, LINE_STYLES[number % len(LINE_STYLES)],
                  color=colour, linewidth=1, label=track if isinstance(track, str) else f"track {track}")
        for source, marker in SOURCE_MARKERS.items():
            points = [(frame["time_s"], frame["probability"] if _is_number(frame["probability"]) else 0)
                      for frame in own if frame["source"] == source]
            colour_of_points = colour if source != "fallback" else COLOURS["fallback"]
            axis.plot(*np.reshape(points, (-1, 2)).T, marker, color=colour_of_points)
    if clip_score is not None and _is_number(clip_score):
        axis.axhline(clip_score, color="black", linewidth=1, linestyle="--", label=f"clip {clip_score:.2f}")
    used = [source for source in SOURCE_MARKERS if any(frame["source"] == source for frame in frames)]
    for source in used:
        axis.plot([], [], SOURCE_MARKERS[source], color=COLOURS["no label"], label=source)
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="time (s)", ylabel="P(fake)", ylim=(-0.03, 1.03))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _is_number(value: float | None) -> bool:
    """Whether a score is known (not None, not NaN)."""
    return value is not None and not np.isnan(value)


def training_curves(history, title: str = "Training") -> "Figure":
    """The quantities of a training run over its epochs, with training and validation in one panel.

    Args:
        history: a Keras History, its ``history`` dict (validation names start with ``val_``), or a DataFrame.
    """
    values = getattr(history, "history", history)
    values = {name: np.asarray(values[name], float) for name in values if name not in ("epoch", "step")}
    names = [name for name in values if not name.startswith("val_")]
    names += [name[4:] for name in values if name.startswith("val_") and name[4:] not in values]
    columns, last = min(3, len(names)), max(map(len, values.values()))
    rows = -(-len(names) // columns)
    figure, axes = _figure(rows, columns, (max(5.0, 4.2 * columns), 3.2 * rows + 0.3), title)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for key, label, colour in ((name, "training", "REAL"), (f"val_{name}", "validation", "FAKE")):
            if key in values:
                epochs = np.arange(1, len(values[key]) + 1)
                axis.plot(epochs, values[key], "o-", markersize=3, color=COLOURS[colour], label=label)
        if name in MEASURES:
            axis.set_ylim(-0.03, 1.03)
        axis.set(xlabel="epoch", ylabel=MEASURES.get(name, name.replace("_", " ")), xlim=(0.5, last + 0.5))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=8)
    return figure


def spectrograms(items: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], title: str | None = None,
                 unit: str = "dB", columns: int = 2) -> "Figure":
    """Spectrograms side by side on one colour scale, for instance real and fake.

    Args:
        items: (name, spectrogram (frequencies, times) in ``unit``, times (s), frequencies (Hz)); the axis
            follows the mel scale if the frequencies are not evenly spaced (mel bands).
    """
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    figure, axes = _figure(rows, columns, (4.6 * columns + 0.8, 2.9 * rows + 0.4), title, sharex=True)
    high = max(float(np.max(item[1])) for item in items)
    low = max(min(float(np.min(item[1])) for item in items), high - 80)
    for axis in axes.flat[len(items):]:
        axis.axis("off")
    for axis, (name, levels, times, frequencies) in zip(axes.flat, items, strict=False):
        mesh = axis.pcolormesh(times, np.asarray(frequencies) / 1000, levels, vmin=low, vmax=high,
                               cmap="magma", shading="nearest", rasterized=True)
        if not np.allclose(np.diff(frequencies, 2), 0, atol=1e-3 * np.max(frequencies) / len(frequencies)):
            axis.set_yscale("function", functions=(_mel, _kilohertz))
            axis.set_yticks([tick for tick in (0.25, 0.5, 1, 2, 4, 8) if tick <= np.max(frequencies) / 1000])
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="time (s)", ylabel="frequency (kHz)", title=name)
        axis.label_outer(remove_inner_ticks=False)
    figure.colorbar(mesh, ax=axes, label="level (dB)" if unit == "dB" else unit)
    return figure


def _mel(kilohertz: np.ndarray) -> np.ndarray:
    """Mel scale (O'Shaughnessy 1987) of a frequency in kHz."""
    return 2595 * np.log10(1 + np.maximum(kilohertz, 0) / 0.7)


def _kilohertz(mel: np.ndarray) -> np.ndarray:
    """Inverse of ``_mel``."""
    return 0.7 * (10 ** (np.asarray(mel) / 2595) - 1)


def waveform(samples: np.ndarray, rate: float, title: str = "Waveform", colour: str = "REAL") -> "Figure":
    """A sound over time.

    Args:
        samples: (T,) or (T, channels), floats in [-1, 1] or integers (scaled by the type's largest value).
        rate: samples per second (Hz).
    """
    values = np.asarray(samples)
    values = values / np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else values
    values = values.reshape(len(values), -1)
    figure, axes = _figure(values.shape[1], 1, (8, 1.0 + 1.6 * values.shape[1]), title, sharex=True)
    for axis, channel in zip(axes[:, 0], values.T, strict=True):
        axis.plot(np.arange(len(channel)) / rate, channel, color=COLOURS[colour], linewidth=0.5)
        axis.set(ylabel="amplitude", ylim=(-1.05, 1.05), xlim=(0, len(channel) / rate))
    axes[-1, 0].set_xlabel("time (s)")
    return figure
