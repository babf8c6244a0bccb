"""Fine-tune the shipped face networks on wide data on a CPU, and average the result with what they were.

    KERAS_BACKEND=torch python -m recipes.face.wide DATA face --steps 114

The data are those of ``training.read_sources`` for the run ``wide_inception``. Batch normalisation stays
frozen and is folded into the convolutions, which run in bfloat16 (``plain``); the stem is not trained. A run
saves its state every few minutes and resumes from it. A long run forgets some of DFDC: then take a share of
the way (:func:`networks.between`; Wortsman et al. 2022), chosen on validation rows.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import REAL
from kaggle_utils.kaggle import paths

from .data import Faces
from .networks import between
from .pairs import FacePairs
from .plain import PlainNetwork
from .training import RUNS, read_sources
from .twins import DESIGNS, SIDES, train_autoencoder

TRAINED_FROM = {"face": "max_pooling2d_1", "face_efficientnet": "add_1"}  # the layers before stay as they are
PEAKS = {"face": 4e-5, "face_efficientnet": 6e-5}  # learning rates; three times as much destroys
SMOOTHING, WARM_UP, SAVED_EVERY = 0.02, 15, 240  # of labels; steps; seconds
TWIN_DESIGNS = ("nearest_4", "quantised_4")  # coarser ones need a GPU, or they teach that blur is fake


def fine_tune(
    network: PlainNetwork,
    pairs: FacePairs,
    state: str | Path,
    steps: int,
    peak: float = 4e-5,
    batch: int = 32,
) -> list[float]:
    """Train the unfrozen weights of ``network`` and return the loss of each step.

    Args:
        state: a file, written every few minutes and at the end; a run with the same file resumes from it.
        steps: of training in all, with those before an interruption.
        peak: learning rate after the warm-up; it then falls to 0 along a cosine. batch: crops a step, even.
    """
    trained = [weight for weight in network.weights.values() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, peak, betas=(0.9, 0.99), weight_decay=0.0)
    losses: list[float] = []
    state = Path(state)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        network.weights.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    def save() -> None:
        partial = state.with_suffix(".partial")
        done = {"weights": network.weights.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**done, "losses": losses}, partial)
        partial.replace(state)

    network.train()
    kept = time.monotonic()
    for step in range(len(losses), steps):
        rate = peak * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        crops, labels = pairs.batch(step, batch // 2)
        targets = torch.from_numpy(labels * (1 - 2 * SMOOTHING) + SMOOTHING)
        logits = network(torch.from_numpy(crops.astype(np.float32)))[:, 0]
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        losses.append(loss.item())
        if time.monotonic() - kept > SAVED_EVERY:
            save()
            kept = time.monotonic()
    save()
    network.eval()
    return losses


def rebuilder(network, side: int):
    """The autoencoder ``network`` as a function of one crop, at ``side`` pixels, the colours kept."""

    def rebuild(crop: np.ndarray) -> np.ndarray:
        given = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        with torch.no_grad():
            rebuilt = network(torch.from_numpy(given[None]), training=False).float().numpy()[0]
        coarse = cv2.resize(given - rebuilt, (side // 8, side // 8), interpolation=cv2.INTER_AREA)
        image = np.clip(rebuilt + cv2.resize(coarse, (side, side)), 0, 255).astype(np.uint8)
        return cv2.resize(image, crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)

    return rebuild


def by_source(faces: Faces) -> dict[str, Faces]:
    """The faces of each source."""
    return {str(name): faces.take(np.flatnonzero(faces.sources == name)) for name in np.unique(faces.sources)}


def run_wide(
    name: str,
    data: str | Path,
    output: str | Path,
    steps: int,
    share: float = 1.0,
    folds: tuple[int, ...] = (),
    start: str | Path | None = None,
    seed: int = 0,
) -> Path:
    """Fine-tune a shipped network and write ``NAME.keras``, ``share`` of the way, into ``output``.

    Args:
        name: ``face`` or ``face_efficientnet``. folds: of ``web_faces``, held out with their people.
        start: the network to begin with; None: the shipped one, whose correction knows all folds.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    network = storage.load_network(start or paths.models_folder() / f"{name}.keras")
    faces = read_sources(replace(RUNS["wide_inception"], folds=folds), data)
    sources = by_source(faces)
    table = sources["dfdc"].table
    reals = np.flatnonzero((table["split"] == "train") & (table["label"] == REAL))
    crops = sources["dfdc"].crops[reals[:4000]]
    rebuild = [
        rebuilder(train_autoencoder(DESIGNS[design], crops, steps=300, batch=16, seed=seed), side)
        for design in TWIN_DESIGNS
        for side in SIDES[1:]
    ]
    plain, before = PlainNetwork(network), network.get_weights()
    plain.freeze_before(TRAINED_FROM[name])
    pairs = FacePairs(sources, seed, rebuild=rebuild)
    fine_tune(plain, pairs, output / f"{name}.state", steps, PEAKS[name])
    plain.write_back()
    network.set_weights(between(before, network.get_weights(), share))
    storage.save_network(network, output / f"{name}.keras", "float16")
    return output / f"{name}.keras"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of research data, with face_sets")
    parser.add_argument("name", choices=sorted(TRAINED_FROM))
    parser.add_argument("--steps", type=int, default=114, help="of 32 crops")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--folds", type=int, nargs="*", default=())
    parser.add_argument("--start", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("work/wide"))
    options = parser.parse_args()
    print(
        run_wide(
            options.name,
            options.data,
            options.output,
            options.steps,
            options.share,
            tuple(options.folds),
            options.start,
        )
    )


if __name__ == "__main__":
    main()
