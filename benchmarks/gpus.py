"""Crops a second in face training on one GPU and on several.

    KERAS_BACKEND=jax python benchmarks/gpus.py --data FOLDER --cache FILE.npy --devices 1 2

Compilation takes most of the time, once for each number of devices: where minutes are dear, call it with
``--devices 1`` and ``--devices 2`` apart.

The step is that of ``face_training`` (augmentation, network, AdamW with averaged weights). Each number of
devices is timed twice after compilation: with batches as training gathers them, and with one batch over and
over, which leaves the host nothing to do. ``busy`` is the share of the time in which kernels ran, from
``nvidia-smi``.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes import loop
from recipes.face import data as face_data
from recipes.face import landmarks
from recipes.face import training as face_training


class Repeated(keras.utils.PyDataset):
    """One batch over and over."""

    def __init__(self, batch: tuple, count: int):
        super().__init__()
        self.batch, self.count = batch, count

    @property
    def num_batches(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        return self.batch


def drawn_faces(count: int, size: int = 224) -> face_data.Faces:
    """Crops of noise with the mean landmarks, half of them FAKE: they cost a training step as much as faces
    do.
    """
    random = np.random.default_rng(0)
    names = [f"crop{number}" for number in range(count)]
    table = pd.DataFrame({"stem": names, "label": np.arange(count) % 2, "group": names, "split": "train"})
    crops = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return face_data.Faces(table, crops, np.repeat(landmarks.mean_landmarks(size)[None], count, axis=0))


@contextlib.contextmanager
def gpu_load(devices: int, readings: list[float]):
    """Fill ``readings`` with the load of the first ``devices`` GPUs in percent, five times a second, while
    the block runs.
    """
    command = [
        "nvidia-smi",
        f"--id={','.join(map(str, range(devices)))}",
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "--loop-ms=200",
    ]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        watcher.terminate()
        readings += [float(line) for line in watcher.communicate()[0].split()]


def measure(
    settings: face_training.FaceSettings, faces: face_data.Faces, devices: int, steps: int, workers: int
) -> dict:
    """Speed on so many devices: crops a second with ``training`` batches and with one ``repeated``."""
    began, readings = time.monotonic(), []
    policy = settings.policy or loop.fast_policy()
    with loop.data_parallel(settings.batch_size, devices) as used:
        if used != devices:
            raise ValueError(
                f"expected {devices} devices that divide batches of {settings.batch_size}, found {used}"
            )
        batches = face_training.FaceBatches(
            faces, face_training.training_rows(faces, settings), settings, workers
        )
        network = face_training.build_face_network(settings, policy)
        trainer, _ = face_training.make_trainer(network, settings, faces.crops.shape[1], steps, policy)
        repeated = Repeated(batches[0], steps)
        trainer.fit(repeated, steps_per_epoch=3, verbose=0)
        compiled = time.monotonic() - began
        seconds = {}
        for name, data in (("repeated", repeated), ("training", batches)):
            count = min(steps, data.num_batches)
            trainer.set_weights(trainer.get_weights())  # fit left weights and averages in the same buffers
            with (
                gpu_load(devices, readings)
                if name == "training" and shutil.which("nvidia-smi")
                else contextlib.nullcontext()
            ):
                started = time.monotonic()
                trainer.fit(data, steps_per_epoch=count, shuffle=False, verbose=0)
                seconds[name] = (time.monotonic() - started) / count
    return {
        "devices": devices,
        "batch": settings.batch_size,
        "compiled in s": round(compiled),
        **{f"crops/s {name}": round(settings.batch_size / value) for name, value in seconds.items()},
        "host keeps up": round(seconds["repeated"] / seconds["training"], 2),
        "busy": round(float(np.mean(readings)) / 100, 2) if readings else np.nan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds dfdc_faces (default: drawn crops)")
    parser.add_argument("--cache", type=Path, help="the .npy file of its decoded crops")
    parser.add_argument("--run", default="inception_many", help="name of a run: face_training.RUNS")
    parser.add_argument("--batch", type=int, default=128, help="crops in a batch, of all devices together")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--workers", type=int, default=8, help="threads that gather batches")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    faces = (
        face_data.read_faces(options.data / "dfdc_faces", options.cache)
        if options.data
        else drawn_faces(options.batch * options.steps)
    )
    settings = replace(face_training.RUNS[options.run], start=None, teachers=(), batch_size=options.batch)
    rows = []
    for devices in options.devices:
        rows.append(measure(settings, faces, devices, options.steps, options.workers))
        print(rows[-1], flush=True)
    speed = [row["crops/s training"] for row in rows]
    print(
        pd.DataFrame(rows).to_string(index=False),
        f"\n{speed[-1] / speed[0]:.2f} x with {options.devices[-1]} devices",
    )


if __name__ == "__main__":
    main()
