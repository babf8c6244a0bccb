"""Train the face networks from a pool of augmented crops that is made once on the GPU and shared by all runs.

    KERAS_BACKEND=jax python -m recipes.face.pool DATA --start FOLDER -o work/pool --minutes 20

DATA is the folder of research data with ``face_sets``; FOLDER holds ``face.keras`` and
``face_efficientnet.keras`` of before they knew ``web_faces``. Augmentation, self-blending and the teachers'
opinions are computed once. A run draws its crops from the pool without those of the folds that it holds out,
so that a network is trained as fast as the GPU can. Batch normalisation keeps its statistics; its offsets are
trained. Needs JAX. What does not fit into the minutes is left out, the most valuable runs come first.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pandas as pd
from keras import ops

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.metrics import auc, log_loss, sigmoid
from recipes.loop import fast_policy

from .augment import FaceAugment
from .data import Faces, check_kept_aside, keep_aside
from .feeding import BLENDED, LABELLED, TWIN, FaceBatches
from .networks import RESIDUAL_FILTER, between
from .training import RUNS, read_sources, training_rows
from .twins import DESIGNS, make_twins, train_autoencoder

RUN = "wide_pool"  # of training.RUNS
NETWORKS = {"inception": "face", "efficientnet": "face_efficientnet"}  # start files
PEAKS = {"inception": 1.2e-4, "efficientnet": 2e-4}  # learning rates
TWIN_DESIGNS = ("nearest_8", "transposed_8", "shuffle_8", "nearest_4")
TWIN_STEPS, TWIN_WAIT = 700, 170  # steps; seconds
SMOOTHING, WARM_UP, DECAY, CLIP, AVERAGE = 0.02, 200, 1e-2, 5.0, 0.998
WEB_FOLDS, GROUPED = ((0,), (1,), (2,), (3,), (4,)), ((0, 3), (1, 4), (2,))
SHARES = (0.5, 0.75, 1.0)  # of the way from the start to the end, whose logits are kept


@dataclass(frozen=True)
class Sizes:
    """How large a pool and its runs are: ``chunks`` arrays of ``chunk`` crops, batches of ``batch`` crops."""

    chunk: int = 8192
    chunks: int = 40
    made: int = 256  # crops that are augmented at once
    batch: int = 96
    scored: int = 128
    timed: int = 40  # steps that measure the speed
    least: int = 120_000  # crops in a run; below it, the folds are held out in three groups
    most: int = 640_000
    row: int = 50_000
    threads: int = 16
    twins: int = TWIN_STEPS
    designs: int = len(TWIN_DESIGNS)
    judged: int | None = None  # crops of each set, every so many; None: all


SMALL = Sizes(24, 2, 12, 8, 8, 1, 24, 24, 16, 2, 3, 1, 8)


def say(*words) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


# --- the pool -----------------------------------------------------------------------------------------------
@dataclass
class Pool:
    """Augmented crops in pairs of a real and a fake: even places are real, odd ones fake.

    ``chunks``: uint8 arrays (n, S, S, 3) on the device. By crop: ``rows`` of the faces that it came from,
    ``kinds`` (``feeding``), ``targets`` (the label, moved towards the teachers where they are heard) and
    ``labels`` (soft, as drawn); each (N,).
    """

    chunks: list = field(default_factory=list)
    rows: np.ndarray | None = None
    kinds: np.ndarray | None = None
    targets: np.ndarray | None = None
    labels: np.ndarray | None = None

    @property
    def chunk(self) -> int:
        return self.chunks[0].shape[0]


class _Prepared(keras.layers.Layer):
    """Inputs of ``FaceAugment`` -> augmented pixels, uint8, and the mean logit of the teachers (n,)."""

    def __init__(self, augment: FaceAugment, teachers: Sequence[keras.Model], **options):
        super().__init__(dtype="float32", **options)
        self.augment, self.teachers = augment, list(teachers)

    def call(self, inputs):
        pixels = ops.clip(ops.round(self.augment(inputs, training=True)), 0, 255)
        opinions = [
            ops.cast(teacher(pixels, training=False)["logit"], "float32")[:, 0] for teacher in self.teachers
        ]
        opinion = sum(opinions) / len(opinions) if opinions else ops.zeros_like(pixels[:, 0, 0, 0])
        return ops.cast(pixels, "uint8"), opinion


def pool_maker(settings, teachers: Sequence[keras.Model], made: int) -> tuple[Callable, list]:
    """The compiled step of :func:`make_pool` and its state: (state, inputs) -> (pixels, logits, state)."""
    side = settings.crop_size
    shapes = {
        "crop": ((side, side, 3), "uint8"),
        "mask": ((side, side, 1), "uint8"),
        "points": ((81, 2), "float32"),
        "label": ((1,), "float32"),
        "width": ((1,), "float32"),
        "taught": ((1,), "float32"),
    }
    augment = FaceAugment(settings.size, seed=settings.seed, **(settings.augment or {}))
    layer = _Prepared(augment, teachers)
    given = {name: keras.Input(shape, dtype=dtype, name=name) for name, (shape, dtype) in shapes.items()}
    model = keras.Model(given, layer(given))
    trained = [variable.value for variable in model.trainable_variables]

    def step(trained, state, inputs):
        (pixels, logits), state = model.stateless_call(trained, state, inputs, training=True)
        return pixels, logits, state

    compiled = jax.jit(step)
    state = [variable.value for variable in model.non_trainable_variables]
    return lambda state, inputs: compiled(trained, state, inputs), state


def make_pool(
    faces: Faces,
    settings,
    teachers: Sequence[keras.Model],
    sizes: Sizes,
    twins: Mapping[int, Sequence[np.ndarray]] | None = None,
    seconds: float = 1e9,
) -> Pool:
    """Draw, augment and judge up to ``sizes.chunks`` chunks of pairs; at least two, within ``seconds``."""
    began = time.monotonic()
    total = sizes.chunk * sizes.chunks
    settings = replace(
        settings, batch_size=sizes.made, pairs=total // 2, twins=settings.twins if twins else 0.0
    )
    batches = FaceBatches(faces, training_rows(faces, settings), settings, workers=1)
    batches.twins = twins or {}
    batches.epoch = 0  # drawn again: where a row has no twin, it is self-blended
    step, state = pool_maker(settings, teachers, sizes.made)
    pool, labels, logits, taught = Pool(), [], [], []
    per_chunk, ahead = sizes.chunk // sizes.made, 3 * sizes.threads
    with ThreadPoolExecutor(sizes.threads) as threads:
        waiting = [
            threads.submit(batches.__getitem__, index) for index in range(min(ahead, batches.num_batches))
        ]
        made = []
        for index in range(batches.num_batches):
            inputs, soft = waiting[index].result()
            waiting[index] = None
            if index + ahead < batches.num_batches:
                waiting.append(threads.submit(batches.__getitem__, index + ahead))
            pixels, opinion, state = step(state, inputs)
            made.append(pixels)
            labels.append(soft[:, 0])
            taught.append(inputs["taught"][:, 0])
            logits.append(opinion)
            if len(made) == per_chunk:
                pool.chunks.append(jnp.concatenate(made))
                pool.chunks[-1].block_until_ready()
                made, spent = [], time.monotonic() - began
                done = len(pool.chunks)
                if done in (1, 2) or done % 8 == 0:
                    say(f"pool: {done} chunks of {sizes.chunk}, {spent:.0f} s")
                if done >= 2 and spent + spent / done > seconds:
                    break
        for future in waiting:
            if future is not None:
                future.cancel()
    count = len(pool.chunks) * sizes.chunk
    pool.labels = np.concatenate(labels)[:count]
    opinions = sigmoid(np.concatenate([np.asarray(opinion) for opinion in logits])[:count])
    weight = settings.taught * np.concatenate(taught)[:count] * (len(teachers) > 0)
    pool.targets = ((1 - weight) * pool.labels + weight * opinions).astype(np.float32)
    pool.rows, pool.kinds = batches._rows[:count], batches._kinds[:count]
    return pool


# --- twins, each design in a process of its own -------------------------------------------------------------
def twin_worker(design: str, number: int, count: int, file: Path, steps: int) -> None:
    """Train a design on the reals in ``file`` and write twins of two in ``count`` parts of them beside it."""
    crops = np.load(file, mmap_mode="r")
    learnt = np.load(file.with_suffix(".learnt.npy"))
    network = train_autoencoder(
        DESIGNS[design], crops[learnt], steps=steps, seed=number, policy=fast_policy(), workers=4
    )
    say(f"twins: {design} trained")
    part = np.random.default_rng(0).permutation(len(crops)) % count
    rows = np.flatnonzero((part == number) | (part == (number + 1) % count))
    twins = make_twins(np.asarray(crops[rows]), [network], seed=number, batch=32, threads=4)
    np.save(file.with_name(f"{design}.rows.npy"), rows)
    np.save(file.with_name(f"{design}.part.npy"), twins)
    file.with_name(f"{design}.part.npy").rename(file.with_name(f"{design}.npy"))
    say(f"twins: {design} made {len(rows)}")


def begin_twins(faces: Faces, rows: np.ndarray, folder: Path, sizes: Sizes) -> tuple[list, np.ndarray]:
    """Start a process for each design; they learn from reals of all sources but ``web``."""
    reals = rows[faces.table["label"].to_numpy()[rows] == REAL]
    file = folder / "reals.npy"
    np.save(file, faces.crops[reals])
    np.save(file.with_suffix(".learnt.npy"), np.flatnonzero(faces.sources[reals] != "web"))
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.07"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "recipes.face.pool",
                str(folder),
                "--twin",
                design,
                str(number),
                str(sizes.designs),
                str(sizes.twins),
            ],
            env=environment,
        )
        for number, design in enumerate(TWIN_DESIGNS[: sizes.designs])
    ]
    return processes, reals


def collect_twins(processes: list, reals: np.ndarray, folder: Path, seconds: float) -> dict[int, list]:
    """The twins of each real row that has some: a design may have failed or taken too long."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    twins: dict[int, list] = {int(row): [] for row in reals}
    for design in TWIN_DESIGNS:
        if (folder / f"{design}.npy").is_file():
            crops = np.load(folder / f"{design}.npy", mmap_mode="r")
            for place, row in enumerate(np.load(folder / f"{design}.rows.npy")):
                twins[int(reals[row])].append(crops[place])
    some = {row: made for row, made in twins.items() if made}
    say(f"twins: {len(some)} of {len(twins)} rows have some")
    return some


# --- a network in training ----------------------------------------------------------------------------------
def plain_pixels(chunk, places, flips):
    """Rows ``places`` of a chunk, some mirrored; float32 (n, S, S, 3)."""
    pixels = jnp.take(chunk, places, axis=0)
    return jnp.where(flips[:, None, None, None], pixels[:, :, ::-1], pixels).astype(jnp.float32)


def residual_pixels(chunk, places, flips):
    """As :func:`plain_pixels`, four times the high-pass residual of each channel about mid-grey."""
    return residual(plain_pixels(chunk, places, flips))


def residual(pixels):
    kernel = jnp.repeat(jnp.asarray(RESIDUAL_FILTER)[:, :, None, None], 3, axis=3)
    found = jax.lax.conv_general_dilated(
        pixels, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    return jnp.clip(4 * found + 127.5, 0, 255)


def patch_pixels(chunk, places, flips):
    """As :func:`plain_pixels`, one quarter of each crop."""
    return quarters(plain_pixels(chunk, places, flips), places % 4)


def quarters(pixels, corners):
    """The quarter at ``corners`` (N,), 0 to 3, of each of ``pixels`` (N, S, S, 3), enlarged to the whole."""
    side = pixels.shape[1] // 2

    def one(image, corner):
        return jax.lax.dynamic_slice(image, (corner // 2 * side, corner % 2 * side, 0), (side, side, 3))

    return jax.image.resize(jax.vmap(one)(pixels, corners), pixels.shape, "bilinear")


class Trainer:
    """A network's training step and its scorer, compiled in the background.

    The state of a run is a dict of lists of arrays: ``weights``, ``first``, ``second`` (AdamW), ``average``.
    """

    def __init__(self, file: Path, sizes: Sizes, threads: ThreadPoolExecutor, size: int):
        policy = fast_policy()
        self.sizes = sizes
        self.scorer = storage.load_network(file)
        network = storage.load_network(file, policy) if policy != "float32" else self.scorer
        self.start = [np.asarray(variable.value, np.float32) for variable in network.trainable_variables]
        self.still = [variable.value for variable in network.non_trainable_variables]
        self.exact = [variable.value for variable in self.scorer.non_trainable_variables]
        decayed = [float(value.ndim > 1) for value in self.start]

        def loss_of(weights, still, pixels, target):
            outputs, _ = network.stateless_call(weights, still, pixels, training=False)
            logit = outputs["logit"][:, 0].astype(jnp.float32)
            return jnp.mean(jax.nn.softplus(logit) - target * logit)

        def step(state, still, pixels, target, rate, count):
            loss, slopes = jax.value_and_grad(loss_of)(state["weights"], still, pixels, target)
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(slope)) for slope in slopes))
            scale = jnp.minimum(1.0, CLIP / (norm + 1e-6))
            new = {"weights": [], "first": [], "second": [], "average": []}
            kept = jnp.minimum(AVERAGE, (count + 1) / (count + 10))
            for weight, slope, one, two, average, decay in zip(
                state["weights"],
                slopes,
                state["first"],
                state["second"],
                state["average"],
                decayed,
                strict=True,
            ):
                one = 0.9 * one + 0.1 * slope * scale
                two = 0.99 * two + 0.01 * jnp.square(slope * scale)
                moved = (one / (1 - 0.9 ** (count + 1))) / (jnp.sqrt(two / (1 - 0.99 ** (count + 1))) + 1e-8)
                weight = weight - rate * (moved + DECAY * decay * weight)
                new["weights"].append(weight)
                new["first"].append(one)
                new["second"].append(two)
                new["average"].append(kept * average + (1 - kept) * weight)
            return new, loss

        def score(weights, still, pixels):
            outputs, _ = self.scorer.stateless_call(weights, still, pixels, training=False)
            return outputs["logit"][:, 0]

        like = [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in self.start]
        state = {name: like for name in ("weights", "first", "second", "average")}
        number, batch = jax.ShapeDtypeStruct((), jnp.float32), sizes.batch
        pixels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
        target = jax.ShapeDtypeStruct((batch,), jnp.float32)
        seen = jax.ShapeDtypeStruct((sizes.scored, size, size, 3), jnp.float32)
        stepped = jax.jit(step, donate_argnums=0).lower(state, self.still, pixels, target, number, number)
        scored = jax.jit(score).lower(like, self.exact, seen)
        self._step, self._score = threads.submit(stepped.compile), threads.submit(scored.compile)
        self.size = size
        self._enlarged = jax.jit(
            lambda x: jax.image.resize(x.astype(jnp.float32), (*x.shape[:1], size, size, 3), "bilinear")
        )

    def begin(self, weights: Sequence[np.ndarray] | None = None) -> dict:
        weights = self.start if weights is None else weights
        return {
            "weights": [jnp.array(value) for value in weights],
            "first": [jnp.zeros_like(value) for value in weights],
            "second": [jnp.zeros_like(value) for value in weights],
            "average": [jnp.array(value) for value in weights],
        }

    def step(self, state: dict, pixels, target: np.ndarray, rate: float, count: int) -> tuple:
        numbers = jnp.asarray(rate, jnp.float32), jnp.asarray(count, jnp.float32)
        return self._step.result()(state, self.still, pixels, jnp.asarray(target, jnp.float32), *numbers)

    def logits(self, weights: Sequence, crops: np.ndarray, mirrored: bool, change: Callable | None = None):
        """Logit of each crop uint8 (N, S, S, 3) of any size, float32 (N,)."""
        found, batch, score = [], self.sizes.scored, self._score.result()
        for start in range(0, len(crops), batch):
            part = crops[start : start + batch][:, :, :: -1 if mirrored else 1]
            padded = np.zeros((batch, *crops.shape[1:]), np.uint8)
            padded[: len(part)] = part
            pixels = self._enlarged(padded)
            found.append(score(weights, self.exact, pixels if change is None else change(pixels)))
        return np.concatenate([np.asarray(part) for part in found])[: len(crops)]

    def save(self, weights: Sequence[np.ndarray], file: Path) -> None:
        for variable, value in zip(self.scorer.trainable_variables, weights, strict=True):
            variable.assign(np.asarray(value, np.float32))
        storage.save_network(self.scorer, file, "float16")


class Draw:
    """Batches of places in the chunks of a pool, half real and half fake; sources as often as in the pool.

    Args:
        allowed: bool by crop of the pool. seed: of the order.
    """

    def __init__(self, pool: Pool, sources: np.ndarray, allowed: np.ndarray, batch: int, seed: int):
        self.pool, self.allowed, self.batch = pool, allowed, batch
        self.random = np.random.default_rng(seed)
        self.sources = sources[pool.rows]
        self.parity = np.arange(len(pool.rows)) % 2
        names = np.unique(self.sources)
        self.shares = [
            {name: float(np.mean(self.sources[self.parity == label] == name)) for name in names}
            for label in (REAL, FAKE)
        ]

    def __iter__(self):
        """Endlessly: number of a chunk, places in it int32 (batch,), places in the pool (batch,)."""
        size, half = self.pool.chunk, self.batch // 2
        while True:
            for number in self.random.permutation(len(self.pool.chunks)):
                drawn = [self._class(number * size, size, label) for label in (REAL, FAKE)]
                for start in range(0, size // 2 - half + 1, half):
                    places = np.concatenate([part[start : start + half] for part in drawn])
                    yield number, (places - number * size).astype(np.int32), places

    def _class(self, start: int, size: int, label: int) -> np.ndarray:
        window = np.arange(start, start + size)
        window = window[(self.parity[window] == label) & self.allowed[window]]
        wanted, drawn = size // 2, []
        for source, share in self.shares[label].items():
            rows = window[self.sources[window] == source]
            count = round(share * wanted)
            while len(rows) and count > 0:
                drawn.append(self.random.permutation(rows)[:count])
                count -= len(drawn[-1])
        drawn = np.concatenate(drawn)
        more = self.random.choice(window, max(wanted - len(drawn), 0))
        return self.random.permutation(np.concatenate([drawn, more]))[:wanted]


def train(
    trainer: Trainer,
    pool: Pool,
    draw: Draw,
    steps: int,
    peak: float,
    pixels_of: Callable,
    targets: np.ndarray | None = None,
) -> list:
    """Train from the start and return the averaged weights, on the device."""
    state, random, losses = trainer.begin(), np.random.default_rng(steps), []
    targets = pool.targets if targets is None else targets
    began, batches, warm = time.monotonic(), iter(draw), min(WARM_UP, max(steps // 10, 1))
    told = max(steps // 6, 1)
    for count in range(steps):
        number, places, rows = next(batches)
        flips = random.random(len(places)) < 0.5
        pixels = pixels_of(pool.chunks[number], jnp.asarray(places), jnp.asarray(flips))
        target = targets[rows] * (1 - 2 * SMOOTHING) + SMOOTHING
        rate = peak * min((count + 1) / warm, 0.5 * (1 + math.cos(math.pi * count / steps)))
        state, loss = trainer.step(state, pixels, target, rate, count)
        losses.append(loss)
        if (count + 1) % told == 0 or count + 1 == steps:
            recent = np.mean([float(value) for value in losses[-told:]])
            spent = time.monotonic() - began
            speed = (count + 1) * trainer.sizes.batch / spent
            say(f"  step {count + 1}/{steps} loss {recent:.4f} {speed:.0f} crops/s")
            if not np.isfinite(recent):
                raise FloatingPointError("the loss is not finite")
    return state["average"]


# --- evaluation ---------------------------------------------------------------------------------------------
def judged_sets(faces: Faces, data: Path) -> dict[str, tuple[pd.DataFrame, np.ndarray]]:
    """Tables and crops that networks are judged on: DFDC 45–47 and 48–49, web, portraits, whole clips."""
    from .data import CROP_SIZE, load_face_crops, read_face_table, split_by_part

    sets = {}
    table = split_by_part(read_face_table(data / "dfdc_faces"))
    for split in ("validation", "test"):
        rows = table[table["split"] == split].reset_index(drop=True)
        sets[split] = rows, load_face_crops(data / "dfdc_faces", rows, size=CROP_SIZE)
    for name, chosen in (
        ("web", faces.sources == "web"),
        ("portraits", (faces.table["split"] == "portraits").to_numpy()),
    ):
        rows = np.flatnonzero(chosen)
        sets[name] = faces.table.iloc[rows].reset_index(drop=True), faces.crops[rows]
    clips = data / "face_sets" / "clips"
    if (clips / "faces_0.csv").is_file():
        rows = pd.read_csv(clips / "faces_0.csv").assign(archive="faces_0.tar")
        sets["clips"] = rows, load_face_crops(clips, rows, size=faces.crops.shape[1])
    return sets


def judge(
    trainer: Trainer, weights: Sequence, sets: Mapping, change: Callable | None = None, flips=(False, True)
) -> dict:
    """Logits of each set, (N, 2): as it is and mirrored; (N, 1) with ``flips`` of one."""
    return {
        name: np.stack([trainer.logits(weights, crops, flip, change) for flip in flips], axis=1)
        for name, (_, crops) in sets.items()
    }


def summary(logits: Mapping[str, np.ndarray], sets: Mapping, folds: Sequence[int] = ()) -> str:
    """One line of figures, to read while the runs go on; what went wrong if they cannot be computed."""
    try:
        return _summary(logits, sets, folds)
    except Exception as error:
        return repr(error)


def _summary(logits: Mapping[str, np.ndarray], sets: Mapping, folds: Sequence[int]) -> str:
    words = []
    for name in ("validation", "test"):
        labels, chances = sets[name][0]["label"], sigmoid(logits[name][:, 0])
        words.append(f"{name} {auc(labels, chances):.4f}/{log_loss(labels, chances):.3f}")
    table = sets["web"][0].assign(logit=logits["web"][:, 0])
    table = table[table["fold"].isin(folds)] if len(folds) else table
    clips = table.groupby("clip").agg(label=("label", "first"), logit=("logit", "mean"))
    if clips["label"].nunique() == 2:
        words.append(f"web clips {auc(clips['label'], sigmoid(clips['logit'])):.4f}")
    table = sets["portraits"][0].assign(over=logits["portraits"][:, 0] > 0)
    words += [f"{name} {share:.2f}" for name, share in table.groupby("generator")["over"].mean().items()]
    if "clips" in sets:
        table = sets["clips"][0].assign(logit=logits["clips"][:, 0])
        table = table[table["track"] <= 0]
        clips = table.groupby(["set", "clip"]).agg(label=("label", "first"), logit=("logit", "mean"))
        for name, rows in clips.groupby("set"):
            words.append(f"{name} {auc(rows['label'], sigmoid(rows['logit'])):.2f}")
    return ", ".join(words)


def nuisances(crop: np.ndarray) -> list[float]:
    """Measures that should not tell the class: sharpness at three scales, block edges, colour, noise."""
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    found, image = [], grey
    for _ in range(3):
        found.append(float(np.log1p(cv2.Laplacian(image, cv2.CV_32F).var())))
        image = cv2.pyrDown(image)
    for step in (8, 9.142857):  # the grid of JPEG at 256 px, and of a crop of 224 px that was enlarged
        for axis in (0, 1):
            jumps = np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)
            at = np.round(np.arange(step, len(jumps), step)).astype(int) - 1
            found.append(float(jumps[at].mean() / (jumps.mean() + 1e-6)))
    found += [float(value) for value in crop.reshape(-1, 3).mean(0)]
    found += [float(value) for value in crop.reshape(-1, 3).std(0)]
    noise = grey - cv2.medianBlur(crop, 3)[..., 1].astype(np.float32)
    found += [float(np.median(np.abs(noise))), float(grey.min()), float(grey.max())]
    return found


# --- everything ---------------------------------------------------------------------------------------------
def run_pool(data: Path, start: Path, output: Path, minutes: float, sizes: Sizes, scratch: Path) -> None:
    """Make the pool and do as many of the runs as fit into ``minutes``."""
    began = time.monotonic()
    end = began + 60 * minutes

    def left() -> float:
        return end - time.monotonic()

    output.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)  # the threads are ours
    settings = RUNS[RUN]
    say(f"{minutes} minutes, devices {jax.devices()}, jax {jax.__version__}, keras {keras.__version__}")
    threads = ThreadPoolExecutor(6)
    loading = threads.submit(read_sources, settings, data)
    trainers = {
        name: Trainer(start / f"{file}.keras", sizes, threads, settings.size)
        for name, file in NETWORKS.items()
    }
    say("steps traced, compiling in the background")
    faces = loading.result()
    check_kept_aside(faces.table[faces.sources == "dfdc"])
    rows = training_rows(faces, settings)
    counts = faces.table.iloc[rows].assign(source=faces.sources[rows]).groupby(["source", "label"]).size()
    say(f"read {len(faces.table)} crops; training: {dict(counts)}")
    processes, reals = begin_twins(faces, rows, scratch, sizes)
    say("twins: started")
    sets = judged_sets(faces, data)
    if sizes.judged:
        few = {
            name: slice(None, None, max(len(crops) // sizes.judged, 1)) for name, (_, crops) in sets.items()
        }
        sets = {name: (rows[few[name]], crops[few[name]]) for name, (rows, crops) in sets.items()}
    for name, (table, _) in sets.items():
        table.to_csv(output / f"{name}.csv", index=False)
    say("sets: " + ", ".join(f"{name} {len(table)}" for name, (table, _) in sets.items()))
    for name, trainer in trainers.items():
        try:
            logits = judge(trainer, trainer.start, sets)
            np.savez_compressed(output / f"{name}_start.npz", **logits)
            say(f"{name} at the start: {summary(logits, sets)}")
        except Exception:
            say(f"{name} at the start:\n{traceback.format_exc()}")
    twins = collect_twins(processes, reals, scratch, min(TWIN_WAIT, 0.2 * left()))
    teachers = [storage.load_network(start / f"{file}.keras", fast_policy()) for file in NETWORKS.values()]
    limit = min(150, 0.16 * left())
    try:
        pool = make_pool(faces, settings, teachers, sizes, twins, limit)
    except Exception:
        say(f"pool:\n{traceback.format_exc()}\nagain without twins")
        pool = make_pool(faces, settings, teachers, sizes, None, limit)
    del teachers
    sources = faces.sources
    say(f"pool: {len(pool.rows)} crops, kinds {np.bincount(pool.kinds[1::2], minlength=3).tolist()}")
    look(pool, sources, output)
    for step in [trainer._step for trainer in trainers.values()]:
        step.exception()  # wait
    say("compiled")

    def allowed(folds: Sequence[int]) -> np.ndarray:
        split = keep_aside(faces, folds).table["split"].to_numpy()
        return (split == "train")[pool.rows]

    plain = jax.jit(plain_pixels)
    speeds = {}
    for name, trainer in trainers.items():
        try:
            speeds[name] = timed(
                trainer, pool, Draw(pool, sources, allowed(()), sizes.batch, 9), sizes, plain
            )
            say(f"{name}: {speeds[name]:.0f} crops/s")
        except Exception:
            say(f"{name}:\n{traceback.format_exc()}")
    each = {name: 1 / speed for name, speed in speeds.items()}
    groups = {name: WEB_FOLDS if name == "inception" else GROUPED for name in speeds}

    def affordable() -> int:
        """Crops of each run, with 6 s for its evaluation and 110 s for the rows at the end."""
        runs = {name: 1 + len(folds) for name, folds in groups.items()}
        free = left() - 6 * sum(runs.values()) - min(110, 0.12 * left())
        return int(free / sum(count * each[name] for name, count in runs.items()))

    crops = affordable()
    if crops < sizes.least:
        groups = dict.fromkeys(speeds, GROUPED)
        crops = affordable()
    crops = min(max(crops, sizes.row), sizes.most)
    say(f"plan: {crops} crops a run, folds {groups}, {left():.0f} s left")
    done, ends = [], {}
    plans = [(name, folds) for name in speeds for folds in ((), *groups[name])]
    for number, (name, folds) in enumerate(plans):
        label = name + "".join(f"_{fold}" for fold in folds)
        needed = crops * each[name] * 1.03 + 8
        if needed > left() and done:
            say(f"{label}: left out, {needed:.0f} s needed, {left():.0f} s left")
            continue
        try:
            say(f"{label}: {crops} crops")
            draw = Draw(pool, sources, allowed(folds), sizes.batch, 100 + 7 * number)
            average = train(trainers[name], pool, draw, crops // sizes.batch, PEAKS[name], plain)
            if not folds:
                ends[name] = [np.asarray(value) for value in average]
                trainers[name].save(ends[name], output / f"{name}.keras")
                say(f"{label}: weights written")
            values = {}
            for share in SHARES:
                flips = (False, True) if share == 1 else (False,)
                logits = judge(
                    trainers[name], between(trainers[name].start, average, share), sets, flips=flips
                )
                values |= {f"{part}_{share}": found.astype(np.float32) for part, found in logits.items()}
                say(f"{label} share {share}: {summary(logits, sets, folds)}")
            np.savez_compressed(output / f"{label}.npz", **values)
            done.append(label)
        except Exception:
            say(f"{label}:\n{traceback.format_exc()}")
    json_of = {"crops": crops, "groups": groups, "speeds": speeds, "pool": len(pool.rows), "done": done}
    (output / "plan.json").write_text(json.dumps(json_of))
    try:
        extra_rows(trainers, each, pool, sources, allowed, sets, output, sizes, left)
    except Exception:
        say(f"rows:\n{traceback.format_exc()}")
    name = "inception"
    fitting = int((left() - 20) / each.get(name, 1) * 0.95)
    if name in ends and fitting >= sizes.least:
        crops = min(crops, fitting)
        try:
            say(f"second: {crops} crops")
            draw = Draw(pool, sources, allowed(()), sizes.batch, 999)
            average = [
                np.asarray(x)
                for x in train(trainers[name], pool, draw, crops // sizes.batch, PEAKS[name], plain)
            ]
            both = [(one + two) / 2 for one, two in zip(average, ends[name], strict=True)]
            values = {}
            for part, weights in (("second", average), ("both", both)):
                logits = judge(trainers[name], [jnp.asarray(x) for x in weights], sets)
                values |= {f"{part}_{key}": found for key, found in logits.items()}
                say(f"{part}: {summary(logits, sets)}")
            trainers[name].save(both, output / "both.keras")
            np.savez_compressed(output / "inception_second.npz", **values)
        except Exception:
            say(f"second:\n{traceback.format_exc()}")
    say(f"finished, {left():.0f} s left")


def timed(trainer: Trainer, pool: Pool, draw: Draw, sizes: Sizes, pixels_of: Callable) -> float:
    """Crops a second of the training step, after a few steps to warm up."""
    state, began = trainer.begin(), 0.0
    for count, (number, places, rows) in zip(range(3 + sizes.timed), draw, strict=False):
        if count == 3:
            state["weights"][0].block_until_ready()
            began = time.monotonic()
        flips = jnp.zeros(len(places), bool)
        pixels = pixels_of(pool.chunks[number], jnp.asarray(places), flips)
        state, loss = trainer.step(state, pixels, pool.targets[rows], 1e-5, count)
    float(loss)
    return sizes.timed * sizes.batch / (time.monotonic() - began)


def look(pool: Pool, sources: np.ndarray, output: Path) -> None:
    """Keep a sheet of the first pairs and the nuisances of the first chunk."""
    crops = np.asarray(pool.chunks[0])
    shown = [cv2.resize(crop, (128, 128), interpolation=cv2.INTER_AREA) for crop in crops[:96]]
    shown += [np.zeros((128, 128, 3), np.uint8)] * (-len(shown) % 12)
    lines = [np.concatenate(shown[start : start + 12], axis=1) for start in range(0, len(shown), 12)]
    cv2.imwrite(str(output / "sheet.jpg"), np.concatenate(lines)[..., ::-1])
    with ThreadPoolExecutor(8) as threads:
        found = np.array(list(threads.map(nuisances, crops)), np.float32)
    count = len(crops)
    np.savez_compressed(
        output / "nuisances.npz",
        values=found,
        kinds=pool.kinds[:count],
        sources=sources[pool.rows[:count]].astype(str),
        rows=pool.rows[:count],
    )
    whole = {"rows": pool.rows, "kinds": pool.kinds, "targets": pool.targets, "labels": pool.labels}
    np.savez_compressed(output / "pool.npz", **whole)


def extra_rows(trainers, each, pool, sources, allowed, sets, output, sizes, left) -> None:
    """Short runs that leave one thing out or add one, with folds 0 and 3 held out."""
    name, folds = "inception", (0, 3)
    if name not in each:
        return
    trainer, base, kinds = trainers[name], allowed(folds), pool.kinds
    pair_kinds = np.repeat(kinds[1::2], 2)
    plain = jax.jit(plain_pixels)
    patches = [jax.jit(lambda x, at=corner: quarters(x, jnp.full(len(x), at))) for corner in range(4)]
    rows = {
        "baseline": (base, plain, None, [None]),
        "without twins": (base & (pair_kinds != TWIN), plain, None, [None]),
        "without self-blended": (base & (pair_kinds != BLENDED), plain, None, [None]),
        "without teachers": (base, plain, pool.labels, [None]),
        "labelled alone": (base & (pair_kinds == LABELLED), plain, None, [None]),
        "residual": (base, jax.jit(residual_pixels), None, [jax.jit(residual)]),
        "patches": (base, jax.jit(patch_pixels), None, patches),
    }
    steps = sizes.row // sizes.batch
    for label, (chosen, pixels_of, targets, changes) in rows.items():
        if left() < sizes.row * each[name] * 1.1 + 12 * len(changes):
            say(f"row {label}: left out")
            continue
        try:
            draw = Draw(pool, sources, chosen, sizes.batch, 55)
            average = train(trainer, pool, draw, steps, PEAKS[name], pixels_of, targets)
            parts = [judge(trainer, average, sets, change, (False,)) for change in changes]
            logits = {key: np.mean([part[key] for part in parts], axis=0) for key in parts[0]}
            np.savez_compressed(output / f"row_{label.replace(' ', '_')}.npz", **logits)
            say(f"row {label}: {summary(logits, sets, folds)}")
        except Exception:
            say(f"row {label}:\n{traceback.format_exc()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=Path, help="folder of the networks to start from")
    parser.add_argument("-o", "--output", type=Path, default=Path("work/pool"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--small", action="store_true", help="a rehearsal on a few crops")
    parser.add_argument("--twin", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.twin:
        design, number, count, steps = options.twin
        file = options.data / "reals.npy"
        twin_worker(design, int(number), int(count), file, int(steps))
        return
    with tempfile.TemporaryDirectory() as scratch:
        sizes = SMALL if options.small else Sizes()
        run_pool(options.data, options.start, options.output, options.minutes, sizes, Path(scratch))


if __name__ == "__main__":
    main()
