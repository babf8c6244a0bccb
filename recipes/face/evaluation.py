"""Evaluate face networks: score crops, compute AUC and log loss with intervals, compare runs on equal rows.

The functions take the scores that ``training.train_face`` writes: the table of crops with the columns
``logit`` and ``logit_flipped``. Intervals resample whole originals.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.metrics import auc, bootstrap_interval, log_loss, sigmoid
from recipes.face.data import CROP_SIZE, Faces, is_unaltered, read_split

SOURCE_SIZES = (0, 185, 224, np.inf)  # limits of source_px: small, medium and large faces


def predict_logits(
    network: keras.Model, crops: np.ndarray, size: int, batch: int = 128, flip: bool = False
) -> np.ndarray:
    """Logit of each crop, float32 (N,).

    Args:
        network: takes pixels 0–255 (size, size, 3) and returns a dict with ``logit``.
        crops: uint8 (N, S, S, 3), resized to ``size`` (bilinear) if they differ.
        flip: score the mirror images instead.
    """
    logits = []
    for start in range(0, len(crops), batch):
        part = np.asarray(crops[start : start + batch])[:, :, :: -1 if flip else 1]
        if part.shape[1] != size:
            part = np.stack([cv2.resize(np.ascontiguousarray(crop), (size, size)) for crop in part])
        padded = np.zeros((batch, size, size, 3), np.float32)  # one shape: one compilation
        padded[: len(part)] = part
        outputs = network.predict_on_batch(padded)
        logits.append(np.asarray(outputs["logit"], np.float32)[: len(part), 0])
    return np.concatenate(logits)


def score_faces(network: keras.Model, faces: Faces, split: str, size: int, batch: int = 128) -> pd.DataFrame:
    """Score the crops of ``split``: their rows of the table with ``logit`` and ``logit_flipped``."""
    rows = faces.rows(split)
    columns = ("stem", "label", "group", "part", "source_px", "p99", "split")
    kept = [name for name in columns if name in faces.table]
    crops = faces.crops[rows]
    return faces.table.iloc[rows][kept].assign(
        logit=predict_logits(network, crops, size, batch),
        logit_flipped=predict_logits(network, crops, size, batch, flip=True),
    )


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T that minimises the log loss of sigmoid(logit / T) (Guo et al., ICML 2017)."""

    def loss(log_temperature: float) -> float:
        return log_loss(labels, sigmoid(logits / np.exp(log_temperature)))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def face_metrics(
    scores: pd.DataFrame, temperature: float = 1.0, column: str = "logit", interval: bool = False
) -> dict:
    """AUC, log loss and class-balanced log loss; with ``interval``, 95 % bootstrap intervals by original."""
    labels, probabilities = scores["label"].to_numpy(), sigmoid(scores[column] / temperature)
    metrics = {"auc": auc, "log_loss": log_loss, "balanced_log_loss": balanced_log_loss}
    result = {"crops": len(scores)}
    result |= {name: metric(labels, probabilities) for name, metric in metrics.items()}
    if interval:
        groups = scores["group"].to_numpy()
        for name, metric in metrics.items():
            low, high = bootstrap_interval(metric, labels, probabilities, groups)
            result[f"{name}_low"], result[f"{name}_high"] = low, high
    return result


def balanced_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean of the log losses of both classes, as on a balanced test set of the same crops."""
    return float(
        np.mean([log_loss(labels[labels == value], probabilities[labels == value]) for value in (REAL, FAKE)])
    )


def evaluate(
    scores: pd.DataFrame, temperature: float = 1.0, column: str = "logit", interval: bool = True
) -> pd.DataFrame:
    """Evaluate one run on all rows, without unaltered fakes, by size of the source face, and by part.

    Returns:
        One row per group of crops: ``crops``, ``auc``, ``log_loss`` and ``balanced_log_loss`` (after
        ``temperature``), and their intervals.
    """
    groups = {"all": scores, "without unaltered fakes": scores[~is_unaltered(scores)]}
    for low, high in pairwise(SOURCE_SIZES):
        within = (scores["source_px"] >= low) & (scores["source_px"] < high)
        groups[f"source {low}–{high} px"] = scores[within]
    groups |= {f"part {part}": rows for part, rows in scores.groupby("part")}
    both = {name: rows for name, rows in groups.items() if rows["label"].nunique() == 2}
    return pd.DataFrame(
        {
            name: face_metrics(rows, temperature, column, interval and rows["group"].nunique() > 1)
            for name, rows in both.items()
        }
    ).T


def evaluate_network(
    network: keras.Model, data: str | Path, split: str = "test", line: tuple[float, float] = (1.0, 0.0)
) -> dict[str, pd.DataFrame]:
    """Evaluate a saved face network on DFDC training faces of parts that it was not trained on.

    Args:
        network: a face branch with its ``logit``.
        data: holds ``dfdc_faces``.
        split: ``validation`` (parts 45–47) or ``test`` (48–49).
        line: scale and shift of the calibration.

    Returns:
        :func:`evaluate` for ``one pass`` and for ``mirror averaged``.
    """
    scores = score_faces(network, read_split(data, split), split, CROP_SIZE, batch=32)
    both = {"one pass": scores, "mirror averaged": flip_averaged(scores)}
    return {name: evaluate(one.assign(logit=line[0] * one["logit"] + line[1])) for name, one in both.items()}


def _jpeg(crop: np.ndarray, quality: int) -> np.ndarray:
    encoded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


def _coarser(crop: np.ndarray, factor: int) -> np.ndarray:
    side = crop.shape[0]
    small = cv2.resize(crop, (side // factor, side // factor), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)


QUALITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda crop: crop,
    "JPEG 50": lambda crop: _jpeg(crop, 50),
    "JPEG 30": lambda crop: _jpeg(crop, 30),
    "JPEG 15": lambda crop: _jpeg(crop, 15),
    "half the size": lambda crop: _coarser(crop, 2),
    "a quarter of the size": lambda crop: _coarser(crop, 4),
    "a third of the light": lambda crop: cv2.convertScaleAbs(crop, alpha=1 / 3),
}


def by_quality(
    network: keras.Model, data: str | Path, count: int = 600, line: tuple[float, float] = (1.0, 0.0)
) -> pd.DataFrame:
    """:func:`face_metrics` of a balanced sample of validation crops (parts 45–47), degraded in several ways.

    Args:
        network, data, line: as for :func:`evaluate_network`. count: number of crops.
    """
    faces, lines = read_split(data, "validation", count), {}
    for name, worse in QUALITIES.items():
        crops = np.stack([worse(crop) for crop in faces.crops])
        logits = predict_logits(network, crops, CROP_SIZE, batch=32)
        lines[name] = face_metrics(faces.table.assign(logit=line[0] * logits + line[1]), interval=True)
    return pd.DataFrame(lines).T


def flip_averaged(scores: pd.DataFrame) -> pd.DataFrame:
    """The same table with the logit averaged over the crop and its mirror image."""
    return scores.assign(logit=(scores["logit"] + scores["logit_flipped"]) / 2)


def pack_scores(folder: str | Path, path: str | Path, split: str = "validation") -> None:
    """Write the scores of all runs in ``folder`` as a table for :func:`read_scores`, two columns per run."""
    runs = {name: scores.set_index("stem") for name, scores in read_scores(folder, split).items()}
    shared = next(iter(runs.values())).drop(columns=["logit", "logit_flipped", "split"])
    columns = {
        f"{name}{suffix}": scores[f"logit{suffix}"].round(3)
        for name, scores in runs.items()
        for suffix in ("", "_flipped")
    }
    shared.assign(**columns).to_csv(path)


def read_scores(folder: str | Path, split: str = "validation") -> dict[str, pd.DataFrame]:
    """Read the saved scores of all runs, by name, from a folder (``RUN.SPLIT.csv``) or one table.

    The table is the one that :func:`pack_scores` writes.
    """
    if Path(folder).is_file():
        table = pd.read_csv(folder)
        names = [name.removesuffix("_flipped") for name in table if name.endswith("_flipped")]
        shared = table.drop(columns=[name + suffix for name in names for suffix in ("", "_flipped")])
        return {
            name: shared.assign(logit=table[name], logit_flipped=table[f"{name}_flipped"]) for name in names
        }
    files = sorted(Path(folder).glob(f"**/*.{split}.csv"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected scores of runs, RUN.{split}.csv")
    return {file.name.removesuffix(f".{split}.csv"): pd.read_csv(file) for file in files}


def compare(
    folder: str | Path, split: str = "validation", best: int = 3, interval: bool = True
) -> pd.DataFrame:
    """Compare the runs in ``folder`` on the rows that all of them scored: one row per run, best AUC first.

    One more row is the average of the ``best`` runs.

    Returns:
        ``crops``, ``auc``, ``log_loss`` and ``balanced_log_loss`` with intervals, ``temperature`` (fitted on
        these rows), ``calibrated`` (log loss at this temperature) and ``auc_flipped`` (with flip averaging).
    """
    runs = read_scores(folder, split)
    shared = sorted(set.intersection(*(set(scores["stem"]) for scores in runs.values())))
    runs = {name: scores.set_index("stem").loc[shared] for name, scores in runs.items()}
    order = sorted(runs, key=lambda name: -face_metrics(runs[name])["auc"])
    if len(order) > best > 1:
        members = [runs[name] for name in order[:best]]
        average = {
            name: np.mean([member[name] for member in members], axis=0) for name in ("logit", "logit_flipped")
        }
        runs[f"average of {', '.join(order[:best])}"] = members[0].assign(**average)
    lines = {}
    for name, scores in runs.items():
        temperature = fit_temperature(scores["label"].to_numpy(), scores["logit"].to_numpy())
        lines[name] = {
            **face_metrics(scores, interval=interval),
            "temperature": temperature,
            "calibrated": face_metrics(scores, temperature)["log_loss"],
            "auc_flipped": face_metrics(flip_averaged(scores))["auc"],
        }
    return pd.DataFrame(lines).T.sort_values("auc", ascending=False)
