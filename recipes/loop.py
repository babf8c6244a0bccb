"""Shared by all training runs: schedule, averaged weights, time limit, checkpoints and resume.

The runs are in ``face.training`` and ``voice.training``.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import keras
import numpy as np
from keras import ops
from tqdm.auto import tqdm


def fast_policy() -> str:
    """This machine's dtype policy: bfloat16 or float16 on a GPU that supports it well, else float32."""
    if keras.backend.backend() == "jax":
        import jax

        return "float32" if jax.default_backend() == "cpu" else "mixed_bfloat16"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = [tf.config.experimental.get_device_details(gpu)
                for gpu in tf.config.list_physical_devices("GPU")]
        if gpus:
            newest = gpus[0].get("compute_capability", (0, 0))[0]
            return "mixed_bfloat16" if newest >= 8 else "mixed_float16"
    return "float32"


@contextmanager
def dtype_policy(policy: str):
    """Context in which layers are built under ``policy``."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextmanager
def data_parallel(batch_size: int, most: int | None = None) -> Iterator[int]:
    """Distribute the batches of a model built and fitted inside over the visible devices; yields their
    number.

    Each device holds all weights and takes an equal part of each batch; gradients are averaged: a run is the
    same on any number of devices. Uses ``keras.distribution.DataParallel`` on JAX,
    ``tf.distribute.MirroredStrategy`` on TensorFlow, and one device on PyTorch.

    Args:
        batch_size: global batch size; the number of devices used must divide it.
        most: maximum number of devices.
    """
    devices = _devices()[:most]
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if count == 1:
        yield 1
    elif keras.backend.backend() == "jax":
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices[:count]))
        try:
            yield count
        finally:
            keras.distribution.set_distribution(before)
    else:
        with _mirrored(*devices[:count]).scope():
            yield count


@cache
def _mirrored(*devices: str):
    """TensorFlow's strategy for these devices, one per process: the collectives of two would be mixed up."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(devices)


def _devices() -> list[str]:
    """Names of the devices to distribute a model over: accelerators, or else processors."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return [device.name for device in found]
    return keras.distribution.list_devices() if keras.backend.backend() == "jax" else ["default"]


class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a cosine to 0 at the planned end, a variable: a time limit may shorten it."""

    def __init__(self, peak: float, warmup_steps: int, total_steps):
        super().__init__()
        self.peak, self.warmup_steps, self.total_steps = peak, warmup_steps, total_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warm = (step + 1) / self.warmup_steps
        total = ops.convert_to_tensor(self.total_steps)
        progress = (step - self.warmup_steps) / ops.maximum(total - self.warmup_steps, 1.0)
        progress = ops.clip(progress, 0.0, 1.0)
        return self.peak * ops.minimum(warm, 0.5 * (1 + ops.cos(np.pi * progress)))

    def get_config(self):
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "total_steps": float(self.total_steps)}


def averaged_weights(trainer: keras.Model, network: keras.Model) -> list[np.ndarray]:
    """The weights of ``network``, the trained ones replaced by their moving average; no side effects."""
    raw = [ops.convert_to_numpy(variable) for variable in trainer.trainable_variables]
    trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
    averaged = [np.array(weight) for weight in network.get_weights()]
    for variable, value in zip(trainer.trainable_variables, raw, strict=True):
        variable.assign(value)
    return averaged


# --- checkpoints --------------------------------------------------------------------------------------------
def _state(trainer: keras.Model) -> list:
    """The state needed to resume: weights, the layers' random state, the optimizer's average and steps."""
    return [*trainer.trainable_variables, *trainer.non_trainable_variables, *trainer.optimizer.variables]


def save_checkpoint(path: Path, trainer: keras.Model, epoch: int, history: list[dict]) -> None:
    """Write the full state after ``epoch`` epochs, atomically (temporary name, then rename)."""
    arrays = {f"v{i}": ops.convert_to_numpy(variable) for i, variable in enumerate(_state(trainer))}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, epoch=epoch, history=json.dumps(history), **arrays)
    partial.replace(path)


def load_checkpoint(path: Path, trainer: keras.Model) -> tuple[int, list[dict]]:
    """Restore a saved state; returns the number of finished epochs and their history.

    Raises:
        ValueError: the checkpoint belongs to another network.
    """
    trainer.optimizer.build(trainer.trainable_variables)
    state = _state(trainer)
    with np.load(path, allow_pickle=False) as file:
        values = [file[f"v{i}"] for i in range(len(file.files) - 2)]
        epoch, history = int(file["epoch"]), json.loads(str(file["history"]))
    shapes = [tuple(value.shape) for value in values]
    if shapes != [tuple(variable.shape) for variable in state]:
        raise ValueError(f"{path}: expected the {len(state)} arrays of {trainer.name}, found {len(values)} "
                         "of other shapes; delete it to restart")
    for variable, value in zip(state, values, strict=True):
        variable.assign(value)
    return epoch, history


class PlanEpochs(keras.callbacks.Callback):
    """Keeps a run within its time limit: progress, planned epochs, validation, checkpoints.

    Args:
        batches: has ``num_batches``; its ``epoch`` is set at the start of each epoch.
        planned: the schedule's variable of planned steps.
        deadline: on the clock of ``time.monotonic``; None: no limit. The run is replanned after each epoch,
            from the measured speed, to end before it; if no epoch fits, training stops inside one.
        validate: called with ``epoch`` after each epoch; returns further logs.
        history: the epochs of the run that this one resumes.
    """

    async_safe = True  # batch hooks read no logs: the device need not wait

    def __init__(self, batches: keras.utils.PyDataset, planned, epochs: int, deadline: float | None = None,
                 validate: Callable | None = None, checkpoint: Path | None = None,
                 history: Sequence[dict] = ()):
        super().__init__()
        self.batches, self.planned, self.epochs, self.deadline = batches, planned, epochs, deadline
        self.validate, self.checkpoint, self.history = validate, checkpoint, list(history)
        self.steps, self.wanted, self.validations = batches.num_batches, epochs, []
        if deadline is None:  # the run that this one resumes may have been planned for a time limit
            planned.assign(self.steps * epochs)
        self.bar = tqdm(total=self.steps * epochs, initial=self.steps * len(self.history), unit="step",
                        mininterval=5)

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
        # the first epoch is timed from its second step: the first one compiles
        seconds = ended - (self.began if len(self.history) else self.first_step)
        self.history.append({"epoch": epoch + 1, **logs, "seconds": round(ended - self.began, 1)})
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()})
        values = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        tqdm.write(f"epoch {epoch + 1}/{self.epochs}: {values}, {self.steps / max(seconds, 1e-9):.1f} "
                   f"steps/s, {seconds * (self.epochs - epoch - 1) / 60:.1f} min left")
        if self.deadline is not None:
            self._plan(epoch + 1, seconds)
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.model, epoch + 1, self.history)

    def _plan(self, done: int, seconds: float):
        """Set the end of the schedule: as many of the wanted epochs as fit into the time left."""
        validation = min(self.validations) * len(self.validations) / done if self.validations else 0.0
        affordable = done + int(max(self.deadline - time.monotonic(), 0) / (seconds + validation))
        self.epochs = max(min(affordable, self.wanted), done)
        self.planned.assign(self.steps * self.epochs)
        self.bar.total = self.steps * self.epochs
        if done >= self.epochs:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        self.bar.close()
