"""Correct trained face networks for generators that they never met, and leave DFDC as it is.

A linear correction reads means and deviations of a network's grids (``blocks.with_statistics``). Logistic
regression fits it on web clips, portraits and real frames: the networks' mean logit is the offset, a ridge
keeps it small, and a penalty holds it at zero on DFDC. That takes minutes on a CPU, as the networks stay as
they are:
``python -m recipes train face correction``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import layers
from scipy.optimize import minimize

from kaggle_utils import storage
from kaggle_utils.metrics import sigmoid
from recipes import blocks
from recipes.face.augment import FaceAugment
from recipes.face.data import Faces

from .feeding import DFDC, LABELLED, FaceBatches
from .training import RUNS, read_sources, training_rows

INCEPTION_GRIDS = ("mixed0", "mixed2", "mixed4", "mixed7", "mixed8", "mixed10")
SHARE = 0.6  # of each network's correction in the mean logit
RIDGE, STILLNESS = {"face": 0.2, "face_efficientnet": 0.1}, {"face": 4.0, "face_efficientnet": 3.0}
LIMIT = 5.0  # deviations
REALS_OF = {"dfdc": 0.3, "web": 0.34, "stills": 0.2, "frames": 0.16}
FAKES_OF = {"dfdc": 0.35, "web": 0.45, "stills": 0.2}
SOURCE_WEIGHTS = {"web": 0.5, "stills": 0.25, "frames": 0.25}


def grids_of(network: keras.Model) -> tuple[str, ...]:
    """Names of the layers that are read: one grid for each stage of the network."""
    if network.name == "face_inception":
        return INCEPTION_GRIDS
    stages = {layer.output.shape[-1]: layer.name for layer in network.layers if isinstance(layer, layers.Add)}
    pooled = next(layer for layer in network.layers if isinstance(layer, layers.GlobalAveragePooling2D))
    return (*stages.values(), pooled.input._keras_history.operation.name)


def read_statistics(network: keras.Model) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from crops (N, S, S, 3) to raw statistics float32 (N, D) and the network's logits (N,)."""
    found = [
        blocks.GridStatistics(limit=np.inf)(network.get_layer(grid).output) for grid in grids_of(network)
    ]
    reader = keras.Model(network.input, [layers.Concatenate(name="read")(found), network.output["logit"]])

    def read(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        statistics, logits = reader.predict_on_batch(np.asarray(crops, np.float32))
        return np.array(statistics), np.array(logits)[:, 0]

    return read


def fit_correction(
    statistics: np.ndarray,
    labels: np.ndarray,
    offset: np.ndarray,
    weights: np.ndarray,
    still: np.ndarray,
    ridge: float,
    stillness: float,
    steps: int = 80,
) -> tuple[np.ndarray, float]:
    """Coefficients and bias that minimise the weighted log loss of offset + correction, with both penalties.

    Args:
        statistics: standardised float32 (N, D). labels, offset, weights: (N,). still: (M, D), where it shall
        be zero.
    """
    weights, count = weights / weights.sum(), len(still)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = point[:-1].astype(np.float32), np.float32(point[-1])
        logits, moved = offset + statistics @ slope + bias, still @ slope + bias
        value = (weights * (np.logaddexp(0, logits) - labels * logits)).sum()
        value += ridge / 2 * float(slope @ slope) + stillness / 2 * float(np.square(moved).mean())
        error = (weights * (sigmoid(logits) - labels)).astype(np.float32)
        pull = (stillness * moved / count).astype(np.float32)
        return value, np.r_[
            statistics.T @ error + ridge * slope + still.T @ pull, error.sum() + pull.sum()
        ].astype(float)

    point = minimize(
        loss, np.zeros(statistics.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": steps}
    ).x
    return point[:-1], float(point[-1])


def correct(
    members: dict[str, keras.Model], faces: Faces, rows: np.ndarray, settings, batches: int = 144
) -> dict[str, keras.Model]:
    """The members with their corrections, fitted on augmented crops of the training rows.

    Args:
        members: by name, ``face`` and ``face_efficientnet``. faces, rows: as for ``training.FaceBatches``.
        settings: ``training.FaceSettings``, of the batches and their augmentation.
    """
    settings = replace(settings, self_blended=0.0, twins=0.0, mixed=0.0, reals_of=REALS_OF, fakes_of=FAKES_OF)
    feed, readers = (
        FaceBatches(faces, rows, settings, workers=1),
        {name: read_statistics(net) for name, net in members.items()},
    )
    augment = FaceAugment(settings.size, seed=settings.seed, **(settings.augment or {}))
    seen: dict[str, list] = {name: [] for name in members}
    labels, drawn = [], []
    for index in range(min(batches, feed.num_batches)):
        inputs, targets = feed[index]
        pixels = np.array(augment(inputs, training=True))
        for name, read in readers.items():
            seen[name].append(read(pixels))
        labels.append(targets[:, 0])
        drawn.append(feed._rows[index * settings.batch_size : (index + 1) * settings.batch_size])
        assert (feed._kinds == LABELLED).all()
    labels, drawn = np.concatenate(labels), np.concatenate(drawn)
    table = pd.DataFrame({"source": feed.sources[drawn], "label": labels})
    offset = np.mean([np.concatenate([logits for _, logits in parts]) for parts in seen.values()], axis=0)
    dfdc = (table["source"] == DFDC).to_numpy()
    portraits = (table["source"] == "stills") & (table["label"] == 0)  # small and large weigh alike
    table["kind"] = np.where(portraits, faces.table["generator"].to_numpy()[drawn].astype(str), "")
    kinds = table.groupby(["source", "label"])["kind"].transform("nunique")
    size = table.groupby(["source", "label", "kind"])["label"].transform("size")
    weights = table["source"].map(SOURCE_WEIGHTS).fillna(0) / kinds / size
    corrected = {}
    for name, network in members.items():
        raw = np.concatenate([statistics for statistics, _ in seen[name]])
        mean, spread = raw.mean(0), raw.std(0) + 1e-3
        standard = np.clip((raw - mean) / spread, -LIMIT, LIMIT).astype(np.float32)
        slope, bias = fit_correction(
            standard[~dfdc],
            labels[~dfdc],
            offset[~dfdc],
            weights.to_numpy()[~dfdc],
            standard[dfdc],
            RIDGE.get(name, 0.1),
            STILLNESS.get(name, 3.0),
        )
        corrected[name] = _with_correction(
            network, mean, spread, len(members) * SHARE * slope, len(members) * SHARE * bias
        )
    return corrected


def _with_correction(
    network: keras.Model, mean: np.ndarray, spread: np.ndarray, slope: np.ndarray, bias: float
) -> keras.Model:
    grids, start = grids_of(network), 0
    corrected = blocks.with_statistics(network, grids)
    for grid in grids:
        layer = corrected.get_layer(f"statistics_{grid}")
        part = slice(start, start := start + layer.scale.shape[0])
        layer.scale.assign(1 / spread[part])
        layer.shift.assign(mean[part] / spread[part])
    corrected.get_layer("correction").set_weights(
        [slope[:, None].astype(np.float32), np.array([bias], np.float32)]
    )
    return corrected


def run_correction(name: str, data: str | Path, output: str | Path, minutes: float | None = None) -> None:
    """Correct the networks of the runs ``distilled_four`` and ``efficientnet_lite`` in ``output``.

    Writes ``face.keras`` and ``face_efficientnet.keras`` there. ``name`` and ``minutes`` are those of every
    run.
    """
    settings, output = (
        replace(RUNS["wide_inception"], name=name, pairs=6400, twins=0.0, teachers=(), seed=5),
        Path(output),
    )
    faces = read_sources(settings, data)
    starts = {"face": "distilled_four", "face_efficientnet": "efficientnet_lite"}
    members = {member: storage.load_network(output / f"{start}.keras") for member, start in starts.items()}
    for member, network in correct(members, faces, training_rows(faces, settings), settings).items():
        storage.save_network(network, output / f"{member}.keras", "float16")
