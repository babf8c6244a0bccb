"""Train the face networks: data feed, schedule, averaged weights, checkpoints and resume, evaluation.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas and OpenCV. All augmentation runs in the
jitted step on the device (``augment.FaceAugment``); the host gathers crops and draws masks.

Start with :func:`train_face`; :func:`compare` reads the saved scores of any number of runs on the same rows.
"""

import json
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
from keras import ops
from scipy.optimize import minimize_scalar
from tqdm.auto import tqdm

from . import networks
from .augment import FaceAugment, face_mask, mean_landmarks
from .dataset import CROP_SIZE, FAKE, REAL, is_unaltered, load_face_crops, read_face_table, split_by_part
from .metrics import auc, bootstrap_interval, log_loss

HALF_FROM = 5_000_000  # parameters: smaller networks are stored in float32
LOCATED_GRID = "mixed7"
LANDMARK_PRESENCE = 0.5  # below it, the mean landmarks serve
FRAME_WIDTH = 1.3  # of the real frames of web video, in sides of the tight framing
IMAGENET = "imagenet"  # a run's start: the InceptionV3 weights beside the research data
SOURCE_SIZES = (0, 185, 224, np.inf)  # source_px: small, middle and large faces


@dataclass(frozen=True)
class FaceSettings:
    """What a training run of a face network depends on; the defaults are those of the shipped network.

    Attributes:
        name: of the run and its files.
        network, network_options: a function of ``networks`` and its arguments; gets a dense 1 as its head.
        start: file of InceptionV3 weights (``networks.load_inception_weights``) or of the same network (``.keras``), or
            None: from scratch.
        size: side of the network's input in pixels, a multiple of 16.
        epochs: one epoch sees every REAL once and as many fakes. batch_size: even.
        learning_rate: the peak, after a warm-up of half an epoch; a cosine takes it to 0.
        average: decay of the exponential moving average of the weights, which is what is kept; None: the last weights.
        self_blended: share of the fakes that are self-blended reals. mask_shapes: of ``augment.face_mask``.
        mixed: share of the other fakes that are mixed with their original, with the label mixed alike
            (weights from Beta(0.5, 0.5), third place of the Deepfake Detection Challenge).
        augment: arguments of ``augment.FaceAugment``; None: no augmentation at all.
        crops: train on this many crops, classes balanced; None: on all.
        cleaned: leave out the fakes whose face is unaltered.
        real_frames: add the real frames of web video, as themselves and self-blended.
        located: weight of a second task, to say where a face was blended (``Located``); 0: none.
        teachers: ``.keras`` files of face networks whose mean logit is a target (Hinton et al. 2015) on the same
            augmented crops. taught: weight of that target; the label has the rest.
        policy: dtype policy; None: :func:`fast_policy`.
    """

    name: str = "face_inception"
    network: str = "face_inception"
    network_options: dict = field(default_factory=dict)
    start: str | None = None
    size: int = 224
    epochs: int = 24
    batch_size: int = 64
    learning_rate: float = 4e-4
    weight_decay: float = 1e-2
    label_smoothing: float = 0.02
    average: float | None = 0.999
    self_blended: float = 0.4
    mask_shapes: tuple[str, ...] = ("hull", "hull", "hull", "hull_without_forehead")
    mixed: float = 0.0
    augment: dict | None = field(default_factory=dict)
    crops: int | None = None
    cleaned: bool = True
    real_frames: bool = False
    located: float = 0.0
    teachers: tuple[str, ...] = ()
    taught: float = 0.7
    seed: int = 0
    policy: str | None = None


@dataclass
class Faces:
    """A table of crops (columns ``stem``, ``label``, ``group``, ``split`` …), pixels and landmarks, row by row.

    ``crops`` uint8 RGB (N, S, S, 3); ``points`` float32 (N, 81, 2), pixels; ``widths`` float32 (N,), sides of the crops
    as multiples of the tight framing's (1 unless given).
    """

    table: pd.DataFrame
    crops: np.ndarray
    points: np.ndarray
    widths: np.ndarray | None = None

    def __post_init__(self):
        if self.widths is None:
            self.widths = np.ones(len(self.table), np.float32)

    def __add__(self, other: "Faces") -> "Faces":
        parts = (self, other)
        return Faces(pd.concat([part.table for part in parts], ignore_index=True),
                     *(np.concatenate([getattr(part, name) for part in parts]) for name in ("crops", "points", "widths")))

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.table["split"] == split)


def read_faces(folder: str | Path, cache: str | Path | None = None) -> Faces:
    """The DFDC training faces with their splits and landmarks; the mean landmarks where no face was present.

    Args:
        folder: holds ``faces_*.csv``, ``faces_*.tar.xz``, ``landmarks.npz`` and ``pair_difference.csv``.
        cache: a ``.npy`` file for the decoded crops (5.7 GB), made at the first call.
    """
    table = split_by_part(read_face_table(folder))
    with np.load(Path(folder) / "landmarks.npz", allow_pickle=False) as file:
        stems = [Path(str(name)).stem for name in file["name"]]
        points, presence = file["points"].astype(np.float32), file["presence"]
    points[presence < LANDMARK_PRESENCE] = mean_landmarks(CROP_SIZE)
    row = pd.Series(range(len(stems)), index=stems).reindex(table["stem"])
    if row.isna().any():
        raise ValueError(f"{folder}/landmarks.npz: expected landmarks of every crop, {row.isna().sum()} have none")
    return Faces(table, load_face_crops(folder, table, cache), points[row.to_numpy(int)])


def read_real_frames(folder: str | Path, size: int = CROP_SIZE, width: float = FRAME_WIDTH) -> Faces:
    """Real faces of web video for training, cut wider than the tight framing, so that a blend has room around the face.

    The square is that of the mean landmarks, fitted to the face's 68 points, ``width`` times as wide; what lies outside
    the picture repeats its border. The forehead's points are those of the fit.

    Args:
        folder: holds ``frames.tar.xz`` and ``landmarks.npz`` (68 points a frame); file names start with the person.
    """
    with np.load(Path(folder) / "landmarks.npz", allow_pickle=False) as file:
        known = {str(name): points for name, points in zip(file["name"], file["points"].astype(np.float32), strict=True)}
    mean, rows, crops, placed = mean_landmarks(size), [], [], []
    with tarfile.open(Path(folder) / "frames.tar.xz") as archive:
        for member in archive:
            stem = Path(member.name).stem
            if not member.isfile() or stem not in known:
                continue
            picture = cv2.imdecode(np.frombuffer(archive.extractfile(member).read(), np.uint8), cv2.IMREAD_COLOR)
            points = known[stem]
            scale = np.std(points, axis=0).mean() / np.std(mean[:68], axis=0).mean()
            corner = points.mean(0) - scale * mean[:68].mean(0) - scale * size * (width - 1) / 2
            zoom = 1 / (scale * width)
            matrix = np.array([[zoom, 0, -corner[0] * zoom], [0, zoom, -corner[1] * zoom]])
            crop = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            whole = np.concatenate([points, mean[68:] * scale + points.mean(0) - scale * mean[:68].mean(0)])
            crops.append(crop[..., ::-1])
            placed.append((whole - corner) * zoom)
            rows.append({"stem": stem, "label": REAL, "group": stem.rsplit("_", 1)[0], "part": -1,
                         "source_px": round(float(scale * size)), "p99": np.nan, "split": "train"})
    return Faces(pd.DataFrame(rows), np.stack(crops), np.stack(placed).astype(np.float32),
                 np.full(len(rows), width, np.float32))


def faces_of_clips(clips: pd.DataFrame, crops_per_clip: int = 4, size: int = CROP_SIZE) -> Faces:
    """Crops of the main person of labelled clips, in the tight framing, with the mean landmarks.

    Args:
        clips: rows of ``dataset.read_dfdc``; every fourth original, with its fakes, is for validation.
        crops_per_clip: evenly spread over the clip; crops without a detected face are left out.
        size: side of the crops in pixels.
    """
    from .faces import FaceFinder, extract_faces
    from .video import read_frames

    finder, rows, crops = FaceFinder(), [], []
    held_out = set(sorted(clips["group"].unique())[3::4])
    for clip in tqdm(clips.to_dict("records"), unit="clip"):
        person = extract_faces(read_frames(clip["path"], crops_per_clip).images, finder, rows=crops_per_clip)[0]
        for number, (image, source) in enumerate(zip(person.images, person.sources, strict=True)):
            if source == "detected":
                rows.append({
                    "stem": f"{Path(clip['filename']).stem}_{number}", "label": int(clip["label"] == "FAKE"),
                    "group": clip["group"], "part": clip["part"],
                    "source_px": int(person.boxes[number][2]), "p99": np.nan,
                    "split": "validation" if clip["group"] in held_out else "train",
                })
                crops.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    if not rows:
        raise ValueError(f"expected a face in some of {len(clips)} clips, found none")
    return Faces(pd.DataFrame(rows), np.stack(crops), np.repeat(mean_landmarks(size)[None], len(rows), axis=0))


# --- feeding --------------------------------------------------------------------------------------------------------
def aligned_original(faces: Faces, fake: int, real: int) -> np.ndarray:
    """The crop of row ``real`` moved onto the face of row ``fake`` by a similarity of their landmarks; uint8."""
    matrix, _ = cv2.estimateAffinePartial2D(faces.points[real], faces.points[fake])
    crop = faces.crops[real]
    if matrix is None:
        return crop
    return cv2.warpAffine(crop, matrix, crop.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


class FaceBatches(keras.utils.PyDataset):
    """Balanced batches for :class:`augment.FaceAugment`: half REAL, half fakes, drawn anew in each epoch.

    What a batch holds depends on the seed, the epoch and its number alone, so that a resumed run goes on as if
    nothing had happened. Set ``epoch`` before the epoch begins (``PlanEpochs`` does).
    """

    def __init__(self, faces: Faces, rows: np.ndarray, settings: FaceSettings, workers: int = 4):
        super().__init__(workers=workers, max_queue_size=4 * workers)
        labels = faces.table["label"].to_numpy()
        self.faces, self.settings = faces, settings
        self.reals, self.fakes = rows[labels[rows] == REAL], rows[labels[rows] == FAKE]
        if len(self.reals) < settings.batch_size // 2 or not len(self.fakes):
            raise ValueError(f"expected half a batch ({settings.batch_size // 2}) of REAL crops or more and some FAKE, "
                             f"found {len(self.reals)} and {len(self.fakes)}")
        place = {stem: row for row, stem in enumerate(faces.table["stem"])}
        original = np.array([place.get(group, -1) for group in faces.table["group"]])
        self.original = np.where(np.isin(original, rows), original, -1)  # none from another split
        self.epoch = 0

    @property
    def num_batches(self) -> int:
        return 2 * len(self.reals) // self.settings.batch_size

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, number: int):
        self._epoch = number
        random = np.random.default_rng([self.settings.seed, number])
        count = len(self.reals)
        made = round(count * self.settings.self_blended)
        fakes = np.concatenate([random.permutation(self.fakes) for _ in range(1 + count // len(self.fakes))])
        wide = self.faces.widths[self.reals] > 1  # they have no fakes: every one is blended, so that they tell nothing
        sources = np.concatenate([random.permutation(self.reals[wide]), random.permutation(self.reals[~wide])])
        fakes = np.concatenate([fakes[: count - made], sources[:made]])
        order = random.permutation(count)
        blended = np.arange(count)[order] >= count - made
        self._rows = np.stack([random.permutation(self.reals), fakes[order]], axis=1).ravel()
        self._blended = np.stack([np.zeros(count, bool), blended], axis=1).ravel()

    def __getitem__(self, index: int) -> tuple[dict, np.ndarray]:
        """Inputs of ``FaceAugment`` and soft labels float32 (batch_size, 1): 0 REAL, 1 FAKE."""
        batch = slice(index * self.settings.batch_size, (index + 1) * self.settings.batch_size)
        rows, blended = self._rows[batch], self._blended[batch]
        random = np.random.default_rng([self.settings.seed, self._epoch, index])
        crops, points = self.faces.crops[rows], self.faces.points[rows]
        labels = self.faces.table["label"].to_numpy(np.float32)[rows]
        masks = np.zeros((*crops.shape[:3], 1), np.uint8)
        for i in np.flatnonzero(blended):
            shape = self.settings.mask_shapes[random.integers(len(self.settings.mask_shapes))]
            masks[i, ..., 0] = face_mask(points[i], shape, crops.shape[1])
        for i in np.flatnonzero((labels == FAKE) & (random.random(len(rows)) < self.settings.mixed)):
            if (original := self.original[rows[i]]) >= 0:
                labels[i] = random.beta(0.5, 0.5)
                real = aligned_original(self.faces, rows[i], original)
                crops[i] = cv2.addWeighted(crops[i], float(labels[i]), real, 1 - float(labels[i]), 0)
        labels[blended] = FAKE
        labels = labels[:, None]
        widths = self.faces.widths[rows][:, None]
        return {"crop": crops, "mask": masks, "points": points, "label": labels, "width": widths}, labels


# --- the network in training ----------------------------------------------------------------------------------------
def fast_policy() -> str:
    """The dtype policy for this machine: bfloat16 or float16 compute on a GPU that is fast at it, else float32."""
    if keras.backend.backend() == "jax":
        import jax

        return "float32" if jax.default_backend() == "cpu" else "mixed_bfloat16"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        if gpus:
            newest = gpus[0].get("compute_capability", (0, 0))[0]
            return "mixed_bfloat16" if newest >= 8 else "mixed_float16"
    return "float32"


@contextmanager
def dtype_policy(policy: str):
    """Build the layers inside under ``policy``."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_face_network(settings: FaceSettings, policy: str = "float32") -> keras.Model:
    """The network of ``settings`` with its head: (size, size, 3) pixels 0–255 -> a dict with ``logit`` (1)."""
    options = {"input_size": settings.size, **settings.network_options}
    with dtype_policy(policy):
        return networks.with_head(getattr(networks, settings.network)(**options))


def load_start(network: keras.Model, path: str | Path) -> None:
    """Fill ``network`` from a file as ``FaceSettings.start`` names it."""
    if Path(path).suffix == ".keras":
        network.set_weights(networks.load_network(path).get_weights())
    else:
        networks.load_inception_weights(network, path)


class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a cosine to 0 at the planned end, a variable that a time limit may bring nearer."""

    def __init__(self, peak: float, warmup_steps: int, total_steps):
        super().__init__()
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warm = (step + 1) / self.warmup_steps
        total = ops.convert_to_tensor(self.total_steps)
        progress = ops.clip((step - self.warmup_steps) / ops.maximum(total - self.warmup_steps, 1.0), 0.0, 1.0)
        return self.peak * ops.minimum(warm, 0.5 * (1 + ops.cos(np.pi * progress)))

    def get_config(self):
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "total_steps": float(self.total_steps)}


class Located(keras.layers.Layer):
    """A second task for a grid on the way (n, h, w, channels): was this cell blended with an altered copy?

    Adds ``weight`` times the cross-entropy to the loss, for reals (nowhere) and the self-blended (their mask); where
    another fake was altered is not known. Returns its first argument, the logit.
    """

    def __init__(self, weight: float, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        self.cell = keras.layers.Conv2D(1, 1, dtype="float32")

    def build(self, logit_shape, grid_shape, blend_shape, label_shape):
        self.cell.build(grid_shape)

    def call(self, logit, grid, blend, label):
        answer = self.cell(ops.cast(grid, "float32"))
        target = ops.image.resize(blend, answer.shape[1:3], antialias=True)
        blended = ops.max(blend, axis=(1, 2, 3), keepdims=True) > 0.05
        known = ops.logical_or(blended, ops.reshape(label, (-1, 1, 1, 1)) < 0.01)
        loss = ops.relu(answer) - answer * target + ops.log1p(ops.exp(-ops.abs(answer)))
        self.add_loss(self.weight * ops.mean(loss * ops.cast(known, "float32")))
        return logit


class Taught(keras.layers.Layer):
    """Adds ``weight`` times the cross-entropy with the mean logit of ``teachers``, who see the same pixels.

    Returns its first argument, the logit.
    """

    def __init__(self, teachers: Sequence[keras.Model], weight: float, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.teachers = weight, list(teachers)
        for teacher in self.teachers:
            teacher.trainable = False

    def call(self, logit, pixels):
        opinions = [ops.cast(teacher(pixels, training=False)["logit"], "float32") for teacher in self.teachers]
        target = ops.stop_gradient(ops.sigmoid(sum(opinions) / len(opinions)))
        loss = ops.relu(logit) - logit * target + ops.log1p(ops.exp(-ops.abs(logit)))
        self.add_loss(self.weight * ops.mean(loss))
        return logit


def make_trainer(network: keras.Model, settings: FaceSettings, crop_size: int, steps: int,
                 policy: str = "float32") -> tuple:
    """Compile augmentation, ``network`` and its further tasks as one model.

    Returns:
        The model, which takes the inputs of ``FaceBatches``, and the optimizer's variable of planned steps.
    """
    inputs = {
        "crop": keras.Input((crop_size, crop_size, 3), dtype="uint8", name="crop"),
        "mask": keras.Input((crop_size, crop_size, 1), dtype="uint8", name="mask"),
        "points": keras.Input((81, 2), name="points"),
        "label": keras.Input((1,), name="label"),
        "width": keras.Input((1,), name="width"),
    }
    pixels = FaceAugment(settings.size, seed=settings.seed, enabled=settings.augment is not None,
                         with_masks=settings.located > 0, **(settings.augment or {}))(inputs)
    outputs = {"logit": network.output["logit"]}
    if settings.located:
        pixels, mask = pixels["pixels"], pixels["mask"]
        outputs["grid"] = network.get_layer(LOCATED_GRID).output
    seen = keras.Model(network.input, outputs)(pixels)
    logit = keras.layers.Activation("linear", dtype="float32")(seen["logit"])
    if settings.located:
        logit = Located(settings.located, dtype="float32")(logit, seen["grid"], mask, inputs["label"])
    if settings.teachers:
        teachers = [networks.load_network(path, policy) for path in settings.teachers]
        logit = Taught(teachers, settings.taught, dtype="float32")(logit, pixels)
    optimizer = keras.optimizers.AdamW(settings.learning_rate, weight_decay=settings.weight_decay,
                                       use_ema=settings.average is not None, ema_momentum=settings.average or 0.99)
    planned = optimizer.add_variable((), initializer="zeros", dtype="float32", name="planned_steps")
    planned.assign(steps * settings.epochs)
    optimizer.learning_rate = WarmupCosine(settings.learning_rate, max(steps // 2, 1), planned)
    trainer = keras.Model(inputs, logit, name=f"{network.name}_trainer")
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    trainer.compile(optimizer, loss, loss_weights=1 - settings.taught if settings.teachers else None)
    return trainer, planned


def averaged_weights(trainer: keras.Model, network: keras.Model) -> list[np.ndarray]:
    """The weights of ``network`` with the moving average in place of the trained ones; the trainer stays as it is."""
    raw = [ops.convert_to_numpy(variable) for variable in trainer.trainable_variables]
    trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
    averaged = [np.array(weight) for weight in network.get_weights()]
    for variable, value in zip(trainer.trainable_variables, raw, strict=True):
        variable.assign(value)
    return averaged


# --- checkpoints ----------------------------------------------------------------------------------------------------
def _state(trainer: keras.Model) -> list:
    """All that a run needs to go on: weights, random state of the layers, optimizer with its average and steps."""
    return [*trainer.trainable_variables, *trainer.non_trainable_variables, *trainer.optimizer.variables]


def save_checkpoint(path: Path, trainer: keras.Model, epoch: int, history: list[dict]) -> None:
    """Write the whole state after ``epoch`` epochs, under a temporary name first: no reader sees half a file."""
    arrays = {f"v{i}": ops.convert_to_numpy(variable) for i, variable in enumerate(_state(trainer))}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, epoch=epoch, history=json.dumps(history), **arrays)
    partial.replace(path)


def load_checkpoint(path: Path, trainer: keras.Model) -> tuple[int, list[dict]]:
    """Put a saved state back; returns the number of finished epochs and their history.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    trainer.optimizer.build(trainer.trainable_variables)
    state = _state(trainer)
    with np.load(path, allow_pickle=False) as file:
        values = [file[f"v{i}"] for i in range(len(file.files) - 2)]
        epoch, history = int(file["epoch"]), json.loads(str(file["history"]))
    shapes = [tuple(value.shape) for value in values]
    if shapes != [tuple(variable.shape) for variable in state]:
        raise ValueError(f"{path}: expected the {len(state)} arrays of {trainer.name}, found {len(values)} "
                         "of other shapes; delete it to start anew")
    for variable, value in zip(state, values, strict=True):
        variable.assign(value)
    return epoch, history


class PlanEpochs(keras.callbacks.Callback):
    """Keeps a run inside its time: progress, epochs planned from the measured speed, validation, checkpoints.

    Args:
        batches: told the number of each epoch.
        planned: the schedule's variable of planned steps.
        deadline: on ``time.monotonic``'s clock, None: no limit. The run is planned anew after each epoch so that it
            ends before; one that finds no time for a whole epoch stops in the middle of it.
        validate: called with (epoch, logs) after each epoch; may add to the logs.
        checkpoint: file, or None.
        history: the epochs of the run that this one goes on with.
    """

    async_safe = True  # reads no logs in the hooks of a batch, so that the device need not wait

    def __init__(self, batches: FaceBatches, planned, epochs: int, deadline: float | None = None,
                 validate: Callable | None = None, checkpoint: Path | None = None, history: Sequence[dict] = ()):
        super().__init__()
        self.batches, self.planned, self.epochs, self.deadline = batches, planned, epochs, deadline
        self.validate, self.checkpoint, self.history = validate, checkpoint, list(history)
        self.steps, self.wanted, self.validations = batches.num_batches, epochs, []
        self.bar = tqdm(total=self.steps * epochs, initial=self.steps * len(self.history), unit="step", mininterval=5)

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch
        self.began = self.first_step = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()
        if batch == 0:
            self.first_step = time.monotonic()
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        ended = time.monotonic()
        logs = {"loss": float(logs["loss"])}
        if self.validate is not None:
            found = self.validate(epoch)
            self.validations += [time.monotonic() - ended] if found else []
            logs |= found
        # the first step compiles; it and the validation are left out of the speed only while nothing else is known
        seconds = ended - (self.began if len(self.history) else self.first_step)
        self.history.append({"epoch": epoch + 1, **logs, "seconds": round(ended - self.began, 1)})
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()})
        values = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        tqdm.write(f"epoch {epoch + 1}/{self.epochs}: {values}, {self.steps / max(seconds, 1e-9):.1f} steps/s, "
                   f"{seconds * (self.epochs - epoch - 1) / 60:.1f} min left")
        if self.deadline is not None:
            self._plan(epoch + 1, seconds)
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.model, epoch + 1, self.history)

    def _plan(self, done: int, seconds: float):
        """Set the end of the schedule to as many of the wanted epochs as the time left holds."""
        validation = min(self.validations) * len(self.validations) / done if self.validations else 0.0
        affordable = done + int(max(self.deadline - time.monotonic(), 0) / (seconds + validation))
        self.epochs = max(min(affordable, self.wanted), done)
        self.planned.assign(self.steps * self.epochs)
        self.bar.total = self.steps * self.epochs
        if done >= self.epochs:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        self.bar.close()


# --- scoring --------------------------------------------------------------------------------------------------------
def predict_logits(
    network: keras.Model, crops: np.ndarray, size: int, batch: int = 128, flip: bool = False
) -> np.ndarray:
    """Logit of each crop, float32 (N,).

    Args:
        network: takes pixels 0–255 (size, size, 3) and gives a dict with ``logit``.
        crops: uint8 (N, S, S, 3), resized to ``size`` (bilinear) if they differ.
        flip: score the mirror images instead.
    """
    logits = []
    for start in range(0, len(crops), batch):
        part = np.asarray(crops[start:start + batch])[:, :, ::-1 if flip else 1]
        if part.shape[1] != size:
            part = np.stack([cv2.resize(np.ascontiguousarray(crop), (size, size)) for crop in part])
        padded = np.zeros((batch, size, size, 3), np.float32)  # one shape: one compilation
        padded[: len(part)] = part
        outputs = network.predict_on_batch(padded)
        logits.append(np.asarray(outputs["logit"], np.float32)[: len(part), 0])
    return np.concatenate(logits)


def score_faces(network: keras.Model, faces: Faces, split: str, size: int, batch: int = 128) -> pd.DataFrame:
    """The table's rows of ``split`` with their ``logit`` and ``logit_flipped``."""
    rows = faces.rows(split)
    kept = [name for name in ("stem", "label", "group", "part", "source_px", "p99", "split") if name in faces.table]
    crops = faces.crops[rows]
    return faces.table.iloc[rows][kept].assign(
        logit=predict_logits(network, crops, size, batch),
        logit_flipped=predict_logits(network, crops, size, batch, flip=True),
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T that minimises the log loss of sigmoid(logit / T) (Guo et al., ICML 2017)."""

    def loss(log_temperature: float) -> float:
        return log_loss(labels, sigmoid(logits / np.exp(log_temperature)))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def figures(scores: pd.DataFrame, temperature: float = 1.0, column: str = "logit", interval: bool = False) -> dict:
    """AUC, log loss and log loss with both classes weighted alike; with a 95 % bootstrap interval by original if asked."""
    labels, probabilities = scores["label"].to_numpy(), sigmoid(scores[column] / temperature)
    metrics = {"auc": auc, "log_loss": log_loss, "balanced_log_loss": balanced_log_loss}
    result = {"crops": len(scores), **{name: metric(labels, probabilities) for name, metric in metrics.items()}}
    if interval:
        groups = scores["group"].to_numpy()
        for name, metric in metrics.items():
            result[f"{name}_low"], result[f"{name}_high"] = bootstrap_interval(metric, labels, probabilities, groups)
    return result


def balanced_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The mean of both classes' log losses: what a balanced test set of the same crops would give."""
    return float(np.mean([log_loss(labels[labels == value], probabilities[labels == value]) for value in (REAL, FAKE)]))


def evaluate(scores: pd.DataFrame, temperature: float = 1.0, column: str = "logit", interval: bool = True) -> pd.DataFrame:
    """The evaluation of one run: all rows, without unaltered fakes, by size of the source, by part.

    Returns:
        One row for each group of crops: ``crops``, ``auc``, ``log_loss`` and ``balanced_log_loss`` (after
        ``temperature``), their intervals.
    """
    groups = {"all": scores, "without unaltered fakes": scores[~is_unaltered(scores)]}
    for low, high in pairwise(SOURCE_SIZES):
        groups[f"source {low}–{high} px"] = scores[(scores["source_px"] >= low) & (scores["source_px"] < high)]
    groups |= {f"part {part}": rows for part, rows in scores.groupby("part")}
    both = {name: rows for name, rows in groups.items() if rows["label"].nunique() == 2}
    return pd.DataFrame({name: figures(rows, temperature, column, interval and rows["group"].nunique() > 1)
                         for name, rows in both.items()}).T


def evaluate_network(network: keras.Model, data: str | Path, split: str = "test", line: tuple[float, float] = (1.0, 0.0),
                     size: int = CROP_SIZE) -> dict[str, pd.DataFrame]:
    """The evaluation of a saved face network on the DFDC training faces of parts that it was not trained on.

    Args:
        network: a face branch with its ``logit``.
        data: holds ``dfdc_faces``.
        split: ``validation`` (parts 45–47) or ``test`` (48–49).
        line: scale and shift of the calibration.
        size: the crops are resized to it, in pixels.

    Returns:
        :func:`evaluate` for ``one pass`` and for ``mirror averaged``.
    """
    folder = Path(data) / "dfdc_faces"
    table = split_by_part(read_face_table(folder))
    table = table[table["split"] == split].reset_index(drop=True)
    faces = Faces(table, load_face_crops(folder, table), np.zeros((len(table), 81, 2), np.float32))
    scores = score_faces(network, faces, split, size, batch=32)
    both = {"one pass": scores, "mirror averaged": flip_averaged(scores)}
    return {name: evaluate(one.assign(logit=line[0] * one["logit"] + line[1])) for name, one in both.items()}


def flip_averaged(scores: pd.DataFrame) -> pd.DataFrame:
    """The same table with the logit averaged over the crop and its mirror image."""
    return scores.assign(logit=(scores["logit"] + scores["logit_flipped"]) / 2)


def pack_scores(folder: str | Path, path: str | Path, split: str = "validation") -> None:
    """Write the scores of every run in ``folder`` as one table, a column or two for each run, for :func:`read_scores`."""
    runs = {name: scores.set_index("stem") for name, scores in read_scores(folder, split).items()}
    shared = next(iter(runs.values())).drop(columns=["logit", "logit_flipped", "split"])
    columns = {f"{name}{suffix}": scores[f"logit{suffix}"].round(3) for name, scores in runs.items()
               for suffix in ("", "_flipped")}
    shared.assign(**columns).to_csv(path)


def read_scores(folder: str | Path, split: str = "validation") -> dict[str, pd.DataFrame]:
    """The saved scores of every run by name: of a folder (``RUN.SPLIT.csv``) or of one table (:func:`pack_scores`)."""
    if Path(folder).is_file():
        table = pd.read_csv(folder)
        names = [name.removesuffix("_flipped") for name in table if name.endswith("_flipped")]
        shared = table.drop(columns=[name + suffix for name in names for suffix in ("", "_flipped")])
        return {name: shared.assign(logit=table[name], logit_flipped=table[f"{name}_flipped"]) for name in names}
    files = sorted(Path(folder).glob(f"**/*.{split}.csv"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected scores of runs, RUN.{split}.csv")
    return {file.name.removesuffix(f".{split}.csv"): pd.read_csv(file) for file in files}


def compare(folder: str | Path, split: str = "validation", best: int = 3, interval: bool = True) -> pd.DataFrame:
    """One line for each run in ``folder`` on the rows that all runs scored, and one for the average of the best.

    Returns:
        ``crops``, ``auc``, ``log_loss`` with intervals, ``temperature`` (fitted on these rows when they are the
        validation parts) and ``calibrated`` log loss, ``auc_flipped`` (flip averaging); the best AUC first.
    """
    runs = read_scores(folder, split)
    shared = sorted(set.intersection(*(set(scores["stem"]) for scores in runs.values())))
    runs = {name: scores.set_index("stem").loc[shared] for name, scores in runs.items()}
    order = sorted(runs, key=lambda name: -figures(runs[name])["auc"])
    if len(order) > best > 1:
        members = [runs[name] for name in order[:best]]
        average = {name: np.mean([member[name] for member in members], axis=0) for name in ("logit", "logit_flipped")}
        runs[f"average of {', '.join(order[:best])}"] = members[0].assign(**average)
    lines = {}
    for name, scores in runs.items():
        temperature = fit_temperature(scores["label"].to_numpy(), scores["logit"].to_numpy())
        lines[name] = {
            **figures(scores, interval=interval),
            "temperature": temperature,
            "calibrated": figures(scores, temperature)["log_loss"],
            "auc_flipped": figures(flip_averaged(scores))["auc"],
        }
    return pd.DataFrame(lines).T.sort_values("auc", ascending=False)


# --- runs -----------------------------------------------------------------------------------------------------------
@dataclass
class FaceRun:
    """A finished run: the float32 network with the averaged weights, its history and its validation scores."""

    settings: FaceSettings
    network: keras.Model
    history: pd.DataFrame
    scores: pd.DataFrame | None


def training_rows(faces: Faces, settings: FaceSettings) -> np.ndarray:
    """Rows of the training split: all, without unaltered fakes, or a balanced sample of whole originals."""
    table = faces.table
    use = table["split"] == "train"
    if settings.cleaned and "p99" in table:
        use &= ~is_unaltered(table)
    rows = np.flatnonzero(use)
    if settings.crops is None:
        return rows
    random = np.random.default_rng(0)  # the same subset for every run, whatever its seed
    groups = table["group"].to_numpy()[rows]
    names = random.permutation(np.unique(groups))
    chosen = []
    for value in (REAL, FAKE):
        of_class = rows[table["label"].to_numpy()[rows] == value]
        rank = pd.Series(range(len(names)), index=names)[table["group"].to_numpy()[of_class]].to_numpy()
        chosen.append(of_class[np.argsort(rank, kind="stable")[: settings.crops // 2]])
    return np.sort(np.concatenate(chosen))


def train_face(
    settings: FaceSettings, faces: Faces, folder: str | Path, minutes: float | None = None, resume: bool = True,
    checkpoints: bool = True, validate_every: int = 1, workers: int = 4,
) -> FaceRun:
    """Train a face network and score the validation parts.

    Args:
        settings: of the run.
        faces: from :func:`read_faces`, or made of any crops with the same columns.
        folder: gets ``NAME.checkpoint.npz`` while it runs, then ``NAME.keras``, ``NAME.history.csv``,
            ``NAME.validation.csv`` (scores) and ``NAME.json`` (settings and figures).
        minutes: limit on the wall clock, evaluation included; fewer epochs are planned when they would not fit.
        resume: go on from a checkpoint of that name if there is one.
        checkpoints: write one after each epoch.
        validate_every: epochs between validations of the averaged weights; 0: only at the end.
        workers: threads that gather batches.
    """
    began, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    policy = settings.policy or fast_policy()
    keras.utils.set_random_seed(settings.seed)
    network, scorer = build_face_network(settings, policy), build_face_network(settings)
    if settings.start is not None:
        load_start(network, settings.start)
    batches = FaceBatches(faces, training_rows(faces, settings), settings, workers)
    trainer, planned = make_trainer(network, settings, faces.crops.shape[1], batches.num_batches, policy)
    checkpoint = folder / f"{settings.name}.checkpoint.npz"
    done, history = load_checkpoint(checkpoint, trainer) if resume and checkpoint.is_file() else (0, [])
    watched = faces.rows("validation")
    batch = min(128, settings.batch_size * 2)

    def validate(epoch: int) -> dict:
        if not len(watched) or not validate_every or (epoch + 1) % validate_every:
            return {}
        scorer.set_weights(averaged_weights(trainer, network))
        labels = faces.table["label"].to_numpy()[watched]
        probabilities = sigmoid(predict_logits(scorer, faces.crops[watched], settings.size, batch))
        return {"val_loss": log_loss(labels, probabilities), "val_auc": auc(labels, probabilities)}

    reserve = 40 if minutes is not None else 0
    deadline = began + 60 * minutes - min(reserve, 20 * minutes) if minutes is not None else None
    plan = PlanEpochs(batches, planned, settings.epochs, deadline, validate,
                      checkpoint if checkpoints else None, history)
    batches.epoch = done  # Keras asks for the first batches before the first epoch begins
    if done < settings.epochs:
        trainer.fit(batches, epochs=settings.epochs, initial_epoch=done, callbacks=[plan], shuffle=False, verbose=0)
    scorer.set_weights(network.get_weights())  # fit has put the average in place
    scores = score_faces(scorer, faces, "validation", settings.size, batch) if len(watched) else None
    run = FaceRun(settings, scorer, pd.DataFrame(plan.history), scores)
    save_run(run, folder, {"policy": policy, "minutes": (time.monotonic() - began) / 60})
    checkpoint.unlink(missing_ok=True)
    return run


def save_run(run: FaceRun, folder: Path, extra: dict) -> None:
    """Write the network (float16 if it is large), history, validation scores, settings and figures of a run."""
    name = run.settings.name
    policy = "float16" if run.network.count_params() > HALF_FROM else "float32"
    networks.save_network(run.network, folder / f"{name}.keras", policy)
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    summary = {"settings": asdict(run.settings), "epochs": len(run.history), "keras": keras.__version__,
               "backend": keras.backend.backend(), **extra}
    if run.scores is not None:
        run.scores.to_csv(folder / f"{name}.validation.csv", index=False, float_format="%.5f")
        temperature = fit_temperature(run.scores["label"].to_numpy(), run.scores["logit"].to_numpy())
        summary |= figures(run.scores) | {
            "temperature": temperature,
            "calibrated": figures(run.scores, temperature)["log_loss"],
            "auc_flipped": figures(flip_averaged(run.scores))["auc"],
        }
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def average_runs(settings: FaceSettings, paths: Sequence[str | Path], faces: Faces, folder: str | Path) -> FaceRun:
    """The mean of the weights of runs that began at the same weights (Wortsman et al. 2022), scored and saved as a run.

    Args:
        settings: of the runs, under the name of the new one. paths: their ``.keras`` files.
    """
    network = build_face_network(settings)
    members = [networks.load_network(path).get_weights() for path in paths]
    network.set_weights([np.mean(weights, axis=0) for weights in zip(*members, strict=True)])
    run = FaceRun(settings, network, pd.DataFrame(), score_faces(network, faces, "validation", settings.size))
    save_run(run, Path(folder), {"average_of": [Path(path).name for path in paths]})
    return run


# --- the remedies of the study --------------------------------------------------------------------------------------
# An average over 100 steps: these runs are too short for one over 1,000, which would keep their first weights.
ALIKE = FaceSettings(crops=8000, size=160, epochs=10, learning_rate=1e-3, average=0.99, self_blended=0.0)
STUDY = replace(ALIKE, network="one_image_cnn")
REMEDIES = (
    replace(STUDY, name="reference_batch4", batch_size=4, learning_rate=2.5e-4),
    replace(STUDY, name="reference_batch64"),
    replace(STUDY, name="group_norm", network_options={"normalization": "group"}),
    replace(STUDY, name="bam", network_options={"attention": "bam"}),
    replace(STUDY, name="time_series", network_options={"attention": "time_series"}),
    replace(STUDY, name="residual", network_options={"block": "residual"}),
    replace(STUDY, name="gated", network_options={"block": "gated"}),
    replace(STUDY, name="dense", network_options={"block": "dense"}),
    replace(ALIKE, name="mesoinception4", network="mesoinception4"),
    replace(ALIKE, name="inception_scratch"),
    replace(ALIKE, name="inception_pretrained", start=IMAGENET),
    replace(ALIKE, name="inception_self_blended", start=IMAGENET, self_blended=0.4),
)
ALL_SHAPES = ("hull", "hull_without_forehead", "parts", "components", "raised_components", "mouth")
MANY = FaceSettings(name="inception_many", start=IMAGENET, seed=3, epochs=34, mixed=0.15, mask_shapes=ALL_SHAPES)
DISTILLED = replace(
    MANY, name="distilled", start="inception_256", size=256, seed=21, mixed=0.3, learning_rate=2e-4,
    teachers=("inception_many", "inception_256"),
)
RUNS = {run.name: run for run in (
    MANY,
    replace(MANY, name="inception_256", size=256, seed=11),
    replace(MANY, name="inception_located", located=0.5, seed=12),
    DISTILLED,
    replace(DISTILLED, name="distilled_web", real_frames=True, seed=22),
    FaceSettings(name="one_image_cnn", network="one_image_cnn", size=256, epochs=8, learning_rate=1e-3, average=0.99,
                 self_blended=0.0),
    *REMEDIES,
)}


def run_face(name: str, data: str | Path, output: str | Path, minutes: float | None = None,
             cache: str | Path | None = None, **options) -> FaceRun:
    """Train one of ``RUNS`` on the research data, as ``python -m kaggle_utils train face`` does.

    Args:
        data: holds ``dfdc_faces`` (and ``real_frames``); the InceptionV3 weights lie in ``weights`` beside or inside it.
        output: folder of results, and of the runs that this one starts from or learns from.
        options: of :func:`train_face`.

    Raises:
        ValueError: no run of that name. FileNotFoundError: weights that the run needs are missing.
    """
    if name not in RUNS:
        raise ValueError(f"expected one of {', '.join(RUNS)}, found {name!r}")
    settings = with_files(RUNS[name], data, output)
    faces = read_faces(Path(data) / "dfdc_faces", cache)
    if settings.real_frames:
        faces = faces + read_real_frames(Path(data) / "real_frames")
    return train_face(settings, faces, output, minutes, **options)


def with_files(settings: FaceSettings, data: str | Path, output: str | Path) -> FaceSettings:
    """The settings of a run of ``RUNS`` with the files that its start and its teachers lie in."""
    start, *teachers = (run and str(inception_weights(data) if run == IMAGENET else Path(output) / f"{run}.keras")
                        for run in (settings.start, *settings.teachers))
    return replace(settings, start=start, teachers=tuple(teachers))


def inception_weights(data: str | Path) -> Path:
    """The file of InceptionV3 weights in ``weights``, beside or inside the folder of research data."""
    folders = Path(data), Path(data).resolve().parent
    places = [folder / "weights" / "inception_v3_notop_uint8.npz" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"expected InceptionV3 weights in {places[0]} or {places[1]}")
