"""Evaluate the face networks on unseen data: clips of unseen generators, whole clips, still portraits.

``python -m recipes evaluate face`` prints the tables. A clip counts once, with the mean logit of its crops.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import FAKE, REAL, read_dfdc
from kaggle_utils.metrics import auc, bootstrap_interval, log_loss, sigmoid
from kaggle_utils.report import zone_of
from kaggle_utils.results import result
from recipes.face.data import CROP_SIZE, Faces, is_kept_portrait, read_split

from .evaluation import balanced_log_loss, face_metrics, predict_logits

FOLDS = "face_folds.csv"  # scores of clips by networks trained without their generator and their people
CLIP_SETS = ("dfdc_clips", "ffpp_clips", "web_clips")
PORTRAITS = {
    "UTKFace": ("utkface", REAL),
    "real stills": ("real_stills", REAL),
    "StyleGAN2": ("generated/stylegan2", FAKE),
}


def read_members(folder: str | Path) -> dict[str, keras.Model]:
    """Load the face networks of a folder of weights, by name: ``face`` and the other ensemble members."""
    files = [Path(folder) / "face.keras", *sorted(Path(folder).glob("face_*.keras"))]
    return {file.stem: storage.load_network(file) for file in files}


def member_logits(members: dict[str, keras.Model], crops: np.ndarray) -> dict[str, np.ndarray]:
    """Logit of each crop by each member, and the ``mean`` that the detector uses; each float32 (N,)."""
    logits = {name: predict_logits(network, crops, CROP_SIZE, batch=32) for name, network in members.items()}
    return logits | {"mean": np.mean(list(logits.values()), axis=0)}


def score_dfdc(
    members: dict[str, keras.Model], data: str | Path, split: str, file: Path, count: int | None = None
) -> pd.DataFrame:
    """Logits of DFDC's ``validation`` or ``test`` parts: the table of crops, a column a member, ``mean``.

    They are written to ``file``, as they take minutes on a CPU; a file that is there is read instead.

    Args:
        count: of a random balanced sample; None: all crops.
    """
    if not file.exists():
        faces: Faces = read_split(data, split, count)
        scores = faces.table[["stem", "label", "group", "p99"]].assign(**member_logits(members, faces.crops))
        file.parent.mkdir(parents=True, exist_ok=True)
        scores.to_csv(file, index=False, float_format="%.5f")
    return pd.read_csv(file)


def evaluate_dfdc(scores: pd.DataFrame, line: tuple[float, float]) -> pd.DataFrame:
    """AUC and log loss of each member and of their mean, from :func:`score_dfdc`.

    The intervals are by original.
    """
    names = scores.columns.drop(["stem", "label", "group", "p99"])
    return pd.DataFrame(
        {
            name: face_metrics(scores.assign(logit=line[0] * scores[name] + line[1]), interval=True)
            for name in names
        }
    ).T


def clip_metrics(
    labels: np.ndarray, logits: np.ndarray, groups: np.ndarray, line: tuple[float, float]
) -> dict:
    """AUC of clips with its interval by ``groups``, recall at 5 % false alarms, and fractions over one half.

    The fractions are of fakes and of reals whose P(fake), calibrated with ``line``, is over one half.
    """
    labels, logits = np.asarray(labels), line[0] * np.asarray(logits) + line[1]
    low, high = bootstrap_interval(auc, labels, sigmoid(logits), groups)
    over = logits > 0
    return {
        "clips": len(labels),
        "auc": auc(labels, sigmoid(logits)),
        "auc_low": low,
        "auc_high": high,
        "recall": (logits[labels == FAKE] > np.quantile(logits[labels == REAL], 0.95)).mean(),
        "fake_over_half": over[labels == FAKE].mean(),
        "real_over_half": over[labels == REAL].mean(),
    }


def fit_clip_line(
    webs: Sequence[pd.DataFrame], dfdc: pd.DataFrame, alarms: float = 0.05, limit: float = 0.303
) -> tuple[float, float]:
    """The line of a clip, ``face`` in ``detector.json``: scale and shift of the mean logit of its crops.

    Of all lines in steps of 0.05 that keep DFDC's log loss within ``limit``, take those with the smallest
    share of real web clips over one half, beyond ``alarms``; of these, the one with the lowest
    class-balanced log loss, each set alike.

    Args:
        webs: sets of clips with ``label`` and ``logit``, the mean of the crops, by networks that never met
            their generator and people.
        dfdc: the same of single crops: DFDC's research set holds one a clip.

    Raises:
        ValueError: no line keeps the limit.
    """
    best: tuple = ()
    for scale, shift in product(np.arange(0.5, 1.21, 0.05), np.arange(-1.0, 0.51, 0.05)):
        answers = [sigmoid(scale * rows["logit"].to_numpy() + shift) for rows in (*webs, dfdc)]
        labels = [rows["label"].to_numpy() for rows in (*webs, dfdc)]
        if log_loss(labels[-1], answers[-1]) <= limit:
            over = [np.mean(p[y == REAL] > 0.5) for p, y in zip(answers[:-1], labels[:-1], strict=True)]
            excess = sum(max(share - alarms, 0) for share in over)
            loss = sum(balanced_log_loss(y, p) for y, p in zip(labels, answers, strict=True))
            best = min(best or (np.inf,), (excess, loss, round(scale, 2), round(shift, 2)))
    if not best:
        raise ValueError(f"log loss on DFDC: expected a line with at most {limit}, found none")
    return best[2:]


def words(labels: np.ndarray, logits: np.ndarray, line: tuple[float, float]) -> pd.DataFrame:
    """What the report's words mean: the number of clips and the share of fakes under each."""
    answers = sigmoid(line[0] * np.asarray(logits) + line[1])
    table = pd.DataFrame({"word": [zone_of(answer).name for answer in answers], "fake": labels})
    return table.groupby("word")["fake"].agg(clips="size", fakes="mean")


def read_folds(file: str | Path) -> pd.DataFrame:
    """Clips of ``web_faces`` scored by networks trained without their generator and their people.

    The columns are ``clip``, ``label`` (0, 1), ``generator`` (for real clips: the kind of video), ``person``,
    ``logit``, the mean of four crops of the clip, and ``logit_video``, the mean of up to twelve that the
    product's own face finder cut from the whole clip.
    """
    return pd.read_csv(file, dtype={"clip": str})


def evaluate_folds(clips: pd.DataFrame, line: tuple[float, float], column: str = "logit") -> pd.DataFrame:
    """:func:`clip_metrics` of the clips of :func:`read_folds`, over all of them and by generator."""
    real, fakes = clips[clips["label"] == REAL], clips[clips["label"] == FAKE]
    groups = {"all": clips} | {name: pd.concat([real, rows]) for name, rows in fakes.groupby("generator")}
    return pd.DataFrame(
        {
            name: clip_metrics(rows["label"], rows[column], rows["person"].to_numpy(), line)
            for name, rows in groups.items()
        }
    ).T


def false_alarms(clips: pd.DataFrame, line: tuple[float, float], column: str = "logit") -> pd.DataFrame:
    """False alarms by kind of real video among the clips of :func:`read_folds`.

    The columns are the number of clips, the mean P(fake) and the fraction over one half.
    """
    real = clips[clips["label"] == REAL]
    real = real.assign(probability=sigmoid(line[0] * real[column] + line[1]))
    real["over_half"] = real["probability"] > 0.5
    grouped = real.groupby("generator")[["probability", "over_half"]]
    return grouped.mean().assign(clips=grouped.size())[["clips", "probability", "over_half"]]


def evaluate_clips(detector, data: str | Path) -> pd.DataFrame:
    """P(fake) of each clip of ``CLIP_SETS`` and of its faces, from the video file through the detector."""
    lines = {}
    for name in CLIP_SETS:
        for clip in read_dfdc(Path(data) / name).to_dict("records"):
            verdict = detector.predict(clip["path"])
            lines[f"{name}/{clip['filename']}"] = {
                "label": clip["label"],
                "face": verdict.face,
                "clip": verdict.probability,
            }
    return pd.DataFrame(lines).T


def evaluate_portraits(detector, data: str | Path, count: int = 200) -> pd.DataFrame:
    """Fraction over one half and mean P(fake) of still portraits that no network was trained on.

    The detector finds and crops the faces.
    """
    lines = {}
    for name, (folder, label) in PORTRAITS.items():
        files = [
            file
            for file in sorted((Path(data) / folder).glob("*.jpg"))
            if label == FAKE or is_kept_portrait(file.name)
        ]
        pictures = (cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files[:count])
        chances = np.concatenate([detector.score_faces(picture[None]) for picture in pictures])
        lines[name] = {
            "label": label,
            "pictures": len(chances),
            "over_half": (chances > 0.5).mean(),
            "mean": chances.mean(),
        }
    return pd.DataFrame(lines).T


def figures(table: pd.DataFrame, kind: str, split: str = "validation", title: str = "") -> list[dict]:
    """The main rows of a table of this module as entries of ``models/results.json``.

    Args:
        kind: ``dfdc`` (:func:`evaluate_dfdc` of ``split``), ``folds`` (:func:`evaluate_folds`), ``words``
            (:func:`words`) or ``portraits`` (:func:`evaluate_portraits`).
        title: of the table, for the names of the figures of ``words`` and ``folds``.
    """
    command = "python -m recipes evaluate face" + (" --split test" if split == "test" else "")
    if kind == "portraits":
        return [
            result(
                f"face/portraits/{name}/over one half",
                table.at[name, "over_half"],
                data=f"{PORTRAITS[name][0]}, {table.at[name, 'pictures']:.0f} portraits",
                split="portraits that no network was trained on",
                command=command,
            )
            for name in table.index
        ]
    if kind == "words":
        return [
            result(
                f"face/{title}/fakes among {word}",
                row["fakes"],
                data=f"{row['clips']:.0f} of {table['clips'].sum():.0f} rows",
                split="five folds by generator and person" if "web" in title else "by original",
                command=command,
            )
            for word, row in table.iterrows()
        ]
    if kind == "folds":
        names = {"AUC": "auc", "recall at 5 % false alarms": "recall"}
        names |= {f"{who} over one half": f"{who[:4]}_over_half" for who in ("fakes", "real")}
        prefix, row = f"face/{title or 'web folds'}", table.loc["all"]
        data, by = f"web_faces, {row['clips']:.0f} clips", "five folds by generator and person"
    else:
        names = {"AUC": "auc", "log loss": "log_loss"}
        prefix, row = f"face/DFDC {split}", table.loc["mean"]
        parts = {"validation": "45-47", "test": "48-49"}[split]
        data, by = f"DFDC faces, parts {parts}", "by original"
    return [
        result(
            f"{prefix}/{name}",
            row[column],
            (row[f"{column}_low"], row[f"{column}_high"]) if f"{column}_low" in row else None,
            data=data,
            split=by,
            command=command,
            seed=0,
        )
        for name, column in names.items()
    ]
