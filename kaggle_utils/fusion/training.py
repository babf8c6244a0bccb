"""Train and compare the ways to join the branches, on clips that are assembled from faces and voices.

Labelled clips with sound are few, so a clip is made of ten augmented views of one face crop, which stand for ten
frames, and of a voice drawn at random; it is FAKE when the face or the voice is. The branches stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..blocks import FRAMES
from ..datasets.dfdc import FAKE, REAL
from ..face.augment import FaceAugment
from ..face.data import Faces
from ..metrics import auc, bootstrap_interval, expected_calibration_error, fit_line, log_loss, sigmoid
from ..voice.data import Voices
from ..voice.signal import windows
from .networks import last_cnn
from .rules import BRANCH_OUTPUTS, Calibration, NoisyOr, log_odds, pooled

MISSING = 0.15  # share of the training clips without a face, and of those without a voice
KINDS = {(REAL, REAL): "real", (FAKE, REAL): "fake face", (REAL, FAKE): "fake voice", (FAKE, FAKE): "both fake"}
PRIOR = 0.75  # share of fakes where the four kinds are equally many
FACES_AT_ONCE = 8  # in a batch of embed_faces
EVEN_SHARE = 2 / 3  # noisy-or's share of the voice there: half of all voices are fake


# --- outputs of the branches ----------------------------------------------------------------------------------------
@dataclass
class Embeddings:
    """Outputs of a branch for labelled faces or voices, row by row.

    ``outputs``: arrays by name (``embedding``, ``side1`` …, ``logit``), each (N, …); for faces (N, 10, …).
    ``labels``: int (N,), 0 REAL, 1 FAKE. ``groups``: str (N,), originals or speakers, what a split keeps together.
    """

    outputs: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray

    def take(self, rows: np.ndarray) -> "Embeddings":
        return Embeddings({name: x[rows] for name, x in self.outputs.items()}, self.labels[rows], self.groups[rows])

    def halves(self, share: float = 0.5, seed: int = 0) -> tuple["Embeddings", "Embeddings"]:
        """Two parts with no group in both, the first with ``share`` of the groups."""
        names = np.random.default_rng(seed).permutation(np.unique(self.groups))
        first = np.isin(self.groups, names[: round(share * len(names))])
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))

    def save(self, path) -> None:
        """Write one npz; the arrays in float16."""
        np.savez(path, labels=self.labels, groups=self.groups.astype(str),
                 **{name: x.astype(np.float16) for name, x in self.outputs.items()})

    @classmethod
    def load(cls, path) -> "Embeddings":
        """Read what :meth:`save` wrote, in float32."""
        with np.load(path, allow_pickle=False) as file:
            outputs = {name: file[name].astype(np.float32) for name in file.files if name not in ("labels", "groups")}
            return cls(outputs, file["labels"], file["groups"])


def cached_embeddings(path: str | Path, make: Callable[[], Embeddings]) -> Embeddings:
    """What ``make`` returns, kept in the file ``path``, from which the next call reads it. Delete it for other weights."""
    if not Path(path).is_file():
        make().save(path)
    return Embeddings.load(path)


class AugmentedNetwork(keras.Model):
    """A face network that sees its input through ``augment``, in prediction too."""

    def __init__(self, network: keras.Model, augment: FaceAugment):
        super().__init__()
        self.network, self.augment = network, augment

    def call(self, inputs):
        return self.network(self.augment(inputs, training=True), training=False)


def embed_faces(network: keras.Model, faces: Faces, size: int = 256, views: int = FRAMES, seed: int = 0) -> Embeddings:
    """Run slightly different views of each crop through the face network.

    Args:
        network: a face branch with its head.
        faces: crops with landmarks.
        size: side of the views in pixels, which the network takes.
        views: how many are different; they are repeated to ten.
    """
    augmented = AugmentedNetwork(network, FaceAugment(
        size, zoom=1.06, shift=0.04, angle=5.0, cutout=0.0, quality=0.25, seed=seed))
    order, count = np.resize(np.arange(views), FRAMES), len(faces.table)
    parts = []
    for start in tqdm(range(0, count, FACES_AT_ONCE), unit="batch"):
        rows = np.repeat(np.minimum(np.arange(start, start + FACES_AT_ONCE), count - 1), views)
        crops, ones = faces.crops[rows], np.ones((len(rows), 1), np.float32)
        outputs = augmented.predict_on_batch({"crop": crops, "mask": np.zeros_like(crops[..., :1]), "points": faces.points[rows],
                                           "label": ones, "width": ones})
        parts.append({name: np.asarray(x).reshape(FACES_AT_ONCE, views, -1)[:, order] for name, x in outputs.items()})
    outputs = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    return Embeddings(outputs, faces.table["label"].to_numpy(), faces.table["group"].to_numpy(str))


def embed_voices(network: keras.Model, voices: Voices) -> Embeddings:
    """Run every window of each voice through the voice network; means over the windows.

    Args:
        network: a voice branch with its head.
        voices: canonical, at the network's rate (``voice_training.Voices.canonical``).
    """
    shape = network.input_shape[1:]
    parts = [windows(samples / np.float32(32768), shape[0]) for samples in voices.samples]
    outputs = network.predict(np.concatenate(parts).reshape(-1, *shape), batch_size=8, verbose=0)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    means = {name: np.stack([part.mean(0) for part in np.split(np.asarray(x), ends)]) for name, x in outputs.items()}
    table = voices.table
    return Embeddings(means, table["label"].to_numpy(), (table["corpus"] + table["speaker"]).to_numpy(str))


# --- assembled clips ------------------------------------------------------------------------------------------------
@dataclass
class Clips:
    """Assembled clips: inputs of :func:`networks.last_cnn`, the logits of the branches, and what is fake.

    ``inputs`` arrays by name; ``face``, ``voice`` float (N,) mean logits, NaN where missing; ``table``: ``face`` and
    ``voice`` (0 real, 1 fake, −1 missing), ``label`` (1: one of them is fake), ``group`` (the face's original).
    """

    inputs: dict[str, np.ndarray]
    face: np.ndarray
    voice: np.ndarray
    table: pd.DataFrame

    @property
    def labels(self) -> np.ndarray:
        return self.table["label"].to_numpy()


def assemble(faces: Embeddings, voices: Embeddings, count: int, seed: int = 0, missing: float = 0.0) -> Clips:
    """Pair faces and voices at random, both classes of each equally often.

    Args:
        missing: share of the clips without a face, and of those without a voice; where it is not 0, single frames are
            missing too.
    """
    random = np.random.default_rng(seed)
    face_rows, voice_rows = (_balanced(part.labels, count, random) for part in (faces, voices))
    draw = random.random(count)
    seen, heard = draw >= missing, draw < 1 - missing  # never both missing
    lost = random.choice([0.0, 0.0, 0.3], count) * (missing > 0)
    mask = (random.random((count, FRAMES)) >= lost[:, None]) & seen[:, None]
    mask[seen & ~mask.any(axis=1), 0] = True
    inputs = {f"face_{name}": faces.outputs[name][face_rows] for name in BRANCH_OUTPUTS}
    inputs |= {f"voice_{name}": voices.outputs[name][voice_rows] for name in BRANCH_OUTPUTS}
    inputs |= {"face_mask": mask.astype(np.float32), "voice_mask": heard[:, None].astype(np.float32)}
    logits = faces.outputs["logit"][face_rows][..., 0]
    table = pd.DataFrame({"face": np.where(seen, faces.labels[face_rows], -1),
                          "voice": np.where(heard, voices.labels[voice_rows], -1), "group": faces.groups[face_rows]})
    table["label"] = (table[["face", "voice"]] == FAKE).any(axis=1).astype(int)
    return Clips(inputs, np.array([pooled(*pair) for pair in zip(logits, mask, strict=True)]),
                 np.where(heard, voices.outputs["logit"][voice_rows][:, 0], np.nan), table)


def _balanced(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """``count`` rows drawn with both classes equally likely."""
    chance = np.where(labels == FAKE, 0.5 / (labels == FAKE).sum(), 0.5 / (labels != FAKE).sum())
    return random.choice(len(labels), count, p=chance / chance.sum())


def train_last(clips: Clips, epochs: int = 15, seed: int = 0, normalization: str = "batch", as_run: bool = False,
               verbose: int = 0) -> keras.Model:
    """Fit the study's last CNN on assembled clips; binary cross-entropy, Adam with a cosine to 0.

    Returns:
        the network, inputs by name as :func:`networks.last_cnn` says -> logit (1).
    """
    keras.utils.set_random_seed(seed)
    network = last_cnn(as_run=as_run, normalization=normalization)
    steps = -(-len(clips.labels) // 64) * epochs
    network.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
                    keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.02))
    labels = clips.labels.astype(np.float32)[:, None]
    network.fit(clips.inputs, labels, batch_size=64, epochs=epochs, verbose=verbose)
    return network


# --- the ways to join -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """A way to answer for clips: ``logits`` maps :class:`Clips` to float (N,).

    ``prior``: None: raw logits, still to be calibrated by a line; else they are log odds where classes are balanced, and
    this is the share of fakes to add.
    """

    logits: Callable[[Clips], np.ndarray]
    prior: float | None = None


def branch_lines(clips: Clips) -> dict[str, tuple[float, float]]:
    """The calibration of each branch by its own label: ``{"face": (scale, shift), "voice": …}``."""
    lines = {}
    for name, logits in (("face", clips.face), ("voice", clips.voice)):
        there = np.isfinite(logits)
        lines[name] = fit_line(clips.table[name].to_numpy()[there], logits[there])
    return lines


def branch_logits(clips: Clips, lines: dict[str, tuple[float, float]]) -> np.ndarray:
    """Calibrated logits of face and voice, float (N, 2); 0, which says nothing, where one is missing."""
    pairs = [scale * logits + shift for (scale, shift), logits in ((lines["face"], clips.face), (lines["voice"], clips.voice))]
    return np.nan_to_num(np.stack(pairs, axis=1))


def noisy_or(clips: Clips, lines: dict, voice_share: float = EVEN_SHARE, prior: float = PRIOR) -> np.ndarray:
    """:class:`fusion.NoisyOr` on assembled clips: log odds (N,) with the prior taken out again."""
    join = NoisyOr(Calibration(lines, (0, 1)), voice_share)
    whole = np.ones(1, bool)
    answers = [join({"logit": np.full((1, 1), face)}, whole & np.isfinite(face),
                    {"logit": np.full((1, 1), voice)} if np.isfinite(voice) else None, prior)
               for face, voice in zip(clips.face, clips.voice, strict=True)]
    answers = np.clip(answers, 1e-7, 1 - 1e-7)
    return np.log(answers / (1 - answers)) - log_odds(prior)


def last_logits(network: keras.Model, clips: Clips) -> np.ndarray:
    return network.predict(clips.inputs, batch_size=256, verbose=0)[:, 0]


def fit_methods(train: Clips, epochs: int = 15, seed: int = 0) -> dict[str, Method]:
    """Every way to join the branches, from one branch alone to the study's last CNN, fitted on ``train``.

    A branch alone answers for itself: half of the faces are fake and half of the voices. Noisy-or is made of these
    answers. The others are fitted on the clips' labels and need a line.
    """
    from sklearn.linear_model import LogisticRegression

    lines = branch_lines(train)
    regression = LogisticRegression(class_weight="balanced").fit(branch_logits(train, lines), train.labels)
    methods = {
        "face alone": Method(lambda clips: branch_logits(clips, lines)[:, 0], 0.5),
        "voice alone": Method(lambda clips: branch_logits(clips, lines)[:, 1], 0.5),
        "mean of logits": Method(lambda clips: branch_logits(clips, lines).mean(axis=1)),
        "noisy-or": Method(lambda clips: noisy_or(clips, lines), PRIOR),
        "logistic regression": Method(lambda clips: regression.decision_function(branch_logits(clips, lines))),
    }
    for normalization in ("batch", "group"):
        network = train_last(train, epochs, seed, normalization)
        methods[f"last CNN, {normalization} norm"] = Method(lambda clips, network=network: last_logits(network, clips))
    return methods


# --- comparison -----------------------------------------------------------------------------------------------------
def probabilities(method: Method, calibrate: Clips, clips: Clips, limits: tuple[float, float] = (0.01, 0.99)) -> np.ndarray:
    """P(fake) of ``clips``, float (N,): by a line fitted on ``calibrate`` where the method needs one, its prior, the limits."""
    scale, shift, prior = 1.0, 0.0, method.prior
    if prior is None:
        (scale, shift), prior = fit_line(calibrate.labels, method.logits(calibrate)), PRIOR
    return np.clip(sigmoid(scale * method.logits(clips) + shift + log_odds(prior)), *limits)


def best_limits(labels: np.ndarray, chances: np.ndarray, margins=(0.001, 0.003, 0.01, 0.02, 0.05)) -> tuple[float, float]:
    """The range (margin, 1 − margin) with the lowest log loss on clips that the calibration was not fitted on."""
    best = min(margins, key=lambda margin: log_loss(labels, np.clip(chances, margin, 1 - margin)))
    return best, 1 - best


def kind_of(clips: Clips) -> np.ndarray:
    """The name in ``KINDS`` of each clip, str (N,)."""
    return np.array([KINDS.get(pair, "missing") for pair in zip(clips.table["face"], clips.table["voice"], strict=True)])


def fusion_metrics(clips: Clips, chances: np.ndarray, interval: bool = True) -> dict:
    """Log loss of each kind and of all, AUC of each fake kind against real clips and of all, calibration error."""
    kinds, labels, groups = kind_of(clips), clips.labels, clips.table["group"].to_numpy()
    lines = {}
    for kind in KINDS.values():
        chosen = kinds == kind
        lines[f"log loss, {kind}"] = log_loss, chosen
        if kind != KINDS[REAL, REAL]:
            lines[f"AUC, {kind}"] = auc, chosen | (kinds == KINDS[REAL, REAL])
    everything = np.ones(len(labels), bool)
    lines |= {"log loss": (log_loss, everything), "AUC": (auc, everything), "ECE": (expected_calibration_error, everything)}
    result = {}
    for name, (metric, chosen) in lines.items():
        some = labels[chosen], chances[chosen]
        result[name] = metric(*some)
        if interval:
            result[f"{name} low"], result[f"{name} high"] = bootstrap_interval(metric, *some, groups[chosen], rounds=300)
    return result


def compare(methods: dict[str, Method], calibrate: Clips, test: Clips, interval: bool = True) -> pd.DataFrame:
    """One line for each method on the same clips: :func:`figures` of its probabilities."""
    return pd.DataFrame({name: fusion_metrics(test, probabilities(method, calibrate, test), interval)
                         for name, method in methods.items()}).T
