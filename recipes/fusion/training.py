"""Train and compare fusion methods, on clips assembled from faces and voices.

Labelled clips with sound are few. Each assembled clip therefore combines ten augmented views of one face
crop, as its ten frames, with a random voice. It is FAKE if either is. The branches are frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.fusion.rules import BRANCH_OUTPUTS, Calibration, NoisyOr, log_odds, pooled
from kaggle_utils.metrics import (
    auc,
    bootstrap_interval,
    expected_calibration_error,
    fit_line,
    log_loss,
    sigmoid,
)
from kaggle_utils.report import zone_of
from kaggle_utils.results import result, save_results
from kaggle_utils.voice.signal import windows
from recipes.blocks import FRAMES
from recipes.face.augment import FaceAugment
from recipes.face.data import Faces
from recipes.voice.data import Voices

MISSING = 0.15  # share of the training clips without a face, and without a voice
KINDS = {
    (REAL, REAL): "real",
    (FAKE, REAL): "fake face",
    (REAL, FAKE): "fake voice",
    (FAKE, FAKE): "both fake",
}
PRIOR = 0.75  # share of fakes if the four kinds are equally frequent
FACES_AT_ONCE = 8  # batch size of embed_faces
EVEN_SHARE = 2 / 3  # noisy-or's voice share at that prior: half of the voices are fake


# --- outputs of the branches --------------------------------------------------------------------------------
@dataclass
class Embeddings:
    """Outputs of a branch for labelled faces or voices, one per row.

    ``outputs``: arrays by name (``embedding``, ``side1`` …, ``logit``), each (N, …); for faces (N, 10, …).
    ``labels``: int (N,), 0 REAL, 1 FAKE. ``groups``: str (N,), originals or speakers, never split.
    """

    outputs: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray

    def take(self, rows: np.ndarray) -> "Embeddings":
        return Embeddings(
            {name: x[rows] for name, x in self.outputs.items()}, self.labels[rows], self.groups[rows]
        )

    def halves(self, share: float = 0.5, seed: int = 0) -> tuple["Embeddings", "Embeddings"]:
        """Two parts without a common group, the first with ``share`` of the groups."""
        names = np.random.default_rng(seed).permutation(np.unique(self.groups))
        first = np.isin(self.groups, names[: round(share * len(names))])
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))

    def save(self, path) -> None:
        """Write one npz, with the outputs in float16."""
        np.savez(
            path,
            labels=self.labels,
            groups=self.groups.astype(str),
            **{name: x.astype(np.float16) for name, x in self.outputs.items()},
        )

    @classmethod
    def load(cls, path) -> "Embeddings":
        """Read a file of :meth:`save`, in float32."""
        with np.load(path, allow_pickle=False) as file:
            outputs = {
                name: file[name].astype(np.float32) for name in file.files if name not in ("labels", "groups")
            }
            return cls(outputs, file["labels"], file["groups"])


def cached_embeddings(path: str | Path, make: Callable[[], Embeddings]) -> Embeddings:
    """The result of ``make``, cached in the file ``path``. Delete the file after a change of weights."""
    if not Path(path).is_file():
        make().save(path)
    return Embeddings.load(path)


class AugmentedNetwork(keras.Model):
    """A face network whose input is augmented, in prediction too."""

    def __init__(self, network: keras.Model, augment: FaceAugment):
        super().__init__()
        self.network, self.augment = network, augment

    def call(self, inputs):
        return self.network(self.augment(inputs, training=True), training=False)


def embed_faces(
    network: keras.Model, faces: Faces, size: int = 256, views: int = FRAMES, seed: int = 0
) -> Embeddings:
    """Run slightly different views of each crop through the face network.

    Args:
        views: number of different views; they are repeated to ten.
    """
    augmented = AugmentedNetwork(
        network, FaceAugment(size, zoom=1.06, shift=0.04, angle=5.0, cutout=0.0, quality=0.25, seed=seed)
    )
    order, count = np.resize(np.arange(views), FRAMES), len(faces.table)
    parts = []
    for start in tqdm(range(0, count, FACES_AT_ONCE), unit="batch"):
        rows = np.repeat(np.minimum(np.arange(start, start + FACES_AT_ONCE), count - 1), views)
        crops, ones = faces.crops[rows], np.ones((len(rows), 1), np.float32)
        outputs = augmented.predict_on_batch(
            {
                "crop": crops,
                "mask": np.zeros_like(crops[..., :1]),
                "points": faces.points[rows],
                "label": ones,
                "width": ones,
            }
        )
        parts.append(
            {name: np.asarray(x).reshape(FACES_AT_ONCE, views, -1)[:, order] for name, x in outputs.items()}
        )
    outputs = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
    return Embeddings(outputs, faces.table["label"].to_numpy(), faces.table["group"].to_numpy(str))


def embed_voices(network: keras.Model, voices: Voices) -> Embeddings:
    """Run every window of each voice through the voice network; means over the windows.

    Args:
        voices: canonical, at the network's rate (``voice.data.Voices.canonical``).
    """
    shape = network.input_shape[1:]
    parts = [windows(samples / np.float32(32768), shape[0]) for samples in voices.samples]
    outputs = network.predict(np.concatenate(parts).reshape(-1, *shape), batch_size=8, verbose=0)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    means = {
        name: np.stack([part.mean(0) for part in np.split(np.asarray(x), ends)])
        for name, x in outputs.items()
    }
    table = voices.table
    return Embeddings(means, table["label"].to_numpy(), table["speaker"].to_numpy(str))


# --- assembled clips ----------------------------------------------------------------------------------------
@dataclass
class Clips:
    """Assembled clips: inputs of :func:`networks.last_cnn`, the logits of the branches, and the labels.

    ``inputs``: arrays by name; ``face``, ``voice`` float (N,): mean logits, NaN if missing; ``table``:
    ``face`` and ``voice`` (0 real, 1 fake, −1 missing), ``label`` (1: either is fake), ``group`` (face).
    """

    inputs: dict[str, np.ndarray]
    face: np.ndarray
    voice: np.ndarray
    table: pd.DataFrame

    @property
    def labels(self) -> np.ndarray:
        return self.table["label"].to_numpy()


def assemble(faces: Embeddings, voices: Embeddings, count: int, seed: int = 0, missing: float = 0.0) -> Clips:
    """Pair faces and voices at random, drawing both classes of each equally often.

    Args:
        missing: share of clips without a face, and without a voice; above 0, single frames are missing too.
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
    table = pd.DataFrame(
        {
            "face": np.where(seen, faces.labels[face_rows], -1),
            "voice": np.where(heard, voices.labels[voice_rows], -1),
            "group": faces.groups[face_rows],
        }
    )
    table["label"] = (table[["face", "voice"]] == FAKE).any(axis=1).astype(int)
    return Clips(
        inputs,
        np.array([pooled(*pair) for pair in zip(logits, mask, strict=True)]),
        np.where(heard, voices.outputs["logit"][voice_rows][:, 0], np.nan),
        table,
    )


def _balanced(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """``count`` rows drawn with both classes equally likely."""
    chance = np.where(labels == FAKE, 0.5 / (labels == FAKE).sum(), 0.5 / (labels != FAKE).sum())
    return random.choice(len(labels), count, p=chance / chance.sum())


# --- fusion methods -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Method:
    """A way to score clips: ``logits`` maps :class:`Clips` to float (N,).

    ``prior``: None: raw logits, still to be calibrated by a line. Otherwise the logits are log odds on
    balanced classes, and ``prior`` is the share of fakes to add.
    """

    logits: Callable[[Clips], np.ndarray]
    prior: float | None = None


def branch_lines(clips: Clips) -> dict[str, tuple[float, float]]:
    """The calibration of each branch on its own label: ``{"face": (scale, shift), "voice": …}``."""
    lines = {}
    for name, logits in (("face", clips.face), ("voice", clips.voice)):
        there = np.isfinite(logits)
        lines[name] = fit_line(clips.table[name].to_numpy()[there], logits[there])
    return lines


def branch_logits(clips: Clips, lines: dict[str, tuple[float, float]]) -> np.ndarray:
    """Calibrated logits of face and voice, float (N, 2); 0 (uninformative) for a missing one."""
    pairs = [
        scale * logits + shift
        for (scale, shift), logits in ((lines["face"], clips.face), (lines["voice"], clips.voice))
    ]
    return np.nan_to_num(np.stack(pairs, axis=1))


def noisy_or(clips: Clips, lines: dict, voice_share: float = EVEN_SHARE, prior: float = PRIOR) -> np.ndarray:
    """:class:`rules.NoisyOr` on assembled clips: log odds (N,) with the prior removed again."""
    join = NoisyOr(Calibration(lines, (0, 1)), voice_share)
    whole = np.ones(1, bool)
    answers = [
        join(
            {"logit": np.full((1, 1), face)},
            whole & np.isfinite(face),
            {"logit": np.full((1, 1), voice)} if np.isfinite(voice) else None,
            prior,
        )
        for face, voice in zip(clips.face, clips.voice, strict=True)
    ]
    answers = np.clip(answers, 1e-7, 1 - 1e-7)
    return np.log(answers / (1 - answers)) - log_odds(prior)


def last_logits(network: keras.Model, clips: Clips) -> np.ndarray:
    return network.predict(clips.inputs, batch_size=256, verbose=0)[:, 0]


def fit_methods(train: Clips) -> dict[str, Method]:
    """Fit every fusion method on ``train``, except the study's last network, which notebook 06 trains.

    A single branch detects its own fakes: half of the faces are fake and half of the voices. Noisy-or
    combines these two answers. The other methods are fitted on the clips' labels and need a calibration line.
    """
    from sklearn.linear_model import LogisticRegression

    lines = branch_lines(train)
    regression = LogisticRegression(class_weight="balanced").fit(branch_logits(train, lines), train.labels)
    return {
        "face alone": Method(lambda clips: branch_logits(clips, lines)[:, 0], 0.5),
        "voice alone": Method(lambda clips: branch_logits(clips, lines)[:, 1], 0.5),
        "mean of logits": Method(lambda clips: branch_logits(clips, lines).mean(axis=1)),
        "noisy-or": Method(lambda clips: noisy_or(clips, lines), PRIOR),
        "logistic regression": Method(
            lambda clips: regression.decision_function(branch_logits(clips, lines))
        ),
    }


# --- comparison ---------------------------------------------------------------------------------------------
def probabilities(
    method: Method, calibrate: Clips, clips: Clips, limits: tuple[float, float] = (0.01, 0.99)
) -> np.ndarray:
    """P(fake) of ``clips``, float (N,), by the method's prior or a line fitted on ``calibrate``, clipped."""
    scale, shift, prior = 1.0, 0.0, method.prior
    if prior is None:
        (scale, shift), prior = fit_line(calibrate.labels, method.logits(calibrate)), PRIOR
    return np.clip(sigmoid(scale * method.logits(clips) + shift + log_odds(prior)), *limits)


def best_limits(
    labels: np.ndarray, chances: np.ndarray, margins=(0.001, 0.003, 0.01, 0.02, 0.05)
) -> tuple[float, float]:
    """The range (margin, 1 − margin) with the lowest log loss on clips not used for calibration."""
    best = min(margins, key=lambda margin: log_loss(labels, np.clip(chances, margin, 1 - margin)))
    return best, 1 - best


def kind_of(clips: Clips) -> np.ndarray:
    """The name in ``KINDS`` of each clip, str (N,)."""
    return np.array(
        [KINDS.get(pair, "missing") for pair in zip(clips.table["face"], clips.table["voice"], strict=True)]
    )


def fusion_metrics(clips: Clips, chances: np.ndarray, interval: bool = True) -> dict:
    """Log loss per kind and overall, AUC of each fake kind against real and overall, calibration error."""
    kinds, labels, groups = kind_of(clips), clips.labels, clips.table["group"].to_numpy()
    lines = {}
    for kind in KINDS.values():
        chosen = kinds == kind
        lines[f"log loss, {kind}"] = log_loss, chosen
        if kind != KINDS[REAL, REAL]:
            lines[f"AUC, {kind}"] = auc, chosen | (kinds == KINDS[REAL, REAL])
    everything = np.ones(len(labels), bool)
    lines |= {
        "log loss": (log_loss, everything),
        "AUC": (auc, everything),
        "ECE": (expected_calibration_error, everything),
    }
    result = {}
    for name, (metric, chosen) in lines.items():
        some = labels[chosen], chances[chosen]
        result[name] = metric(*some)
        if interval:
            result[f"{name} low"], result[f"{name} high"] = bootstrap_interval(
                metric, *some, groups[chosen], rounds=300
            )
    return result


def compare(methods: dict[str, Method], calibrate: Clips, test: Clips, interval: bool = True) -> pd.DataFrame:
    """One row per method on the same clips: :func:`fusion_metrics` of its probabilities."""
    return pd.DataFrame(
        {
            name: fusion_metrics(test, probabilities(method, calibrate, test), interval)
            for name, method in methods.items()
        }
    ).T


def scored(table: pd.DataFrame, group: str, frames: bool) -> Embeddings:
    """Embeddings that hold logits alone, for the methods that need no more.

    Args:
        table: columns ``label``, ``logit`` and the one that ``group`` names. frames: repeat the logit over
        ten frames, for faces.
    """
    shape = (len(table), FRAMES, 1) if frames else (len(table), 1)
    logits = np.broadcast_to(table["logit"].to_numpy(np.float32).reshape(-1, *[1] * (len(shape) - 1)), shape)
    outputs = {name: np.zeros(shape, np.float32) for name in BRANCH_OUTPUTS} | {"logit": logits}
    return Embeddings(outputs, table["label"].to_numpy(int), table[group].to_numpy(str))


def compare_scores(
    validation: pd.DataFrame,
    test: pd.DataFrame,
    voices: pd.DataFrame,
    lines: dict,
    clips: int = 8000,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the methods on scores of faces and voices that the networks never met.

    Args:
        validation, test: faces with ``label``, ``logit`` and ``group`` (the original).
        voices: out-of-fold scores with ``label``, ``logit`` and ``page``; pages are split.
        lines: the shipped calibration, for the method "noisy-or, as shipped".

    Returns:
        The table of :func:`compare`, and for each word of the report the clips and the share of fakes.
    """
    fit_faces, line_faces = scored(validation, "group", True).halves(0.6, seed)
    fit_voices, others = scored(voices, "page", False).halves(0.4, seed)
    line_voices, test_voices = others.halves(0.4, seed)
    line = assemble(line_faces, line_voices, clips // 2, seed + 1)
    chosen = assemble(scored(test, "group", True), test_voices, clips // 2, seed + 2)
    methods = fit_methods(assemble(fit_faces, fit_voices, clips, seed, missing=MISSING))
    methods["noisy-or, as shipped"] = Method(lambda some: noisy_or(some, lines), PRIOR)
    table = compare(methods, line, chosen)
    answers = probabilities(methods["noisy-or, as shipped"], line, chosen)
    words = pd.DataFrame({"word": [zone_of(answer).name for answer in answers], "fake": chosen.labels})
    return table, words.groupby("word")["fake"].agg(clips="size", fakes="mean")


def save_comparison(table: pd.DataFrame, words: pd.DataFrame, command: str, seed: int = 0) -> None:
    """Put log loss, AUC and calibration error of every method, and the words, into ``models/results.json``.
    """
    source = {
        "data": "4,000 assembled clips, faces of DFDC parts 48–49, voices of unheard pages",
        "seed": seed,
        "split": "by original and page",
        "command": command,
    }
    save_results(
        result(f"fusion/{method}/{name}", row[name], (row[f"{name} low"], row[f"{name} high"]), **source)
        for method, row in table.iterrows()
        for name in ("log loss", "AUC", "ECE")
    )
    save_results(
        result(f"fusion/fakes among/{word}", row["fakes"], **source) for word, row in words.iterrows()
    )
