"""Evaluate voice networks on unseen pages and systems, as recorded and through channels.

The pages form five folds. The networks of a fold are trained on the other pages, without the systems of that
fold (``data.training_rows``), and evaluated on its pages. :func:`judge_folds` trains and scores;
:func:`tables` summarises the scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from kaggle_utils import storage
from kaggle_utils.datasets.dfdc import FAKE, REAL
from kaggle_utils.media.sound import SAMPLE_RATE
from kaggle_utils.metrics import auc, bootstrap_interval, equal_error_rate, fit_line, sigmoid
from kaggle_utils.results import result
from kaggle_utils.voice.signal import lfcc
from recipes.voice.data import FOLDS, Voices, folds, training_rows

from .channels import CHANNELS, channel_file, make_channels, with_channels
from .training import RUNS, VoiceSettings, load_corpus, predict_logits, train_voice

MEMBERS = ("linear", "lfcc", "quality")  # averaged: voice.keras, voice_lfcc.keras, voice_quality.keras
SPEAKERS = "speakers"  # instead of a fold: known systems and pages, unseen speakers
COMMAND = "python -m recipes evaluate voice"


# --- folds --------------------------------------------------------------------------------------------------
def judge_folds(
    folder: str | Path,
    output: str | Path,
    names: Sequence[str] = (*MEMBERS, "voice_cnn"),
    minutes: float | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """Score every voice with networks trained without its page and its systems.

    Args:
        folder: holds the voices (``data.read_voices``). names: of ``RUNS``. minutes: time limit per training.
        output: gets corpus, channels, runs and scores. Existing files are reused: an interrupted evaluation
            resumes, and networks trained elsewhere are scored.

    Returns:
        One row per voice, channel and network: ``data.COLUMNS``, ``row``, ``channel``, ``fold`` (−1: known
        systems, unseen speakers), ``logit``, ``network`` (with the baseline ``lfcc_regression``).
    """
    output = Path(output)
    corpus = load_corpus(output / "voices.npz", folder, processes)
    make_channels(folder, corpus, output, processes)
    parts = []
    for name in names:
        voices = with_channels(corpus, output) if RUNS[name].frozen else corpus.at(RUNS[name].rate)
        for judged in (*range(FOLDS), SPEAKERS):
            done = output / f"{name}_{judged}.judged.csv"
            if not done.is_file():
                network, rows = _judge(RUNS[name], voices, judged, output, minutes)
                scores = score_channels(network, RUNS[name], rows, output)
                scores.to_csv(done, index=False, float_format="%.5f")
            scores = pd.read_csv(done, keep_default_na=False)
            parts.append(scores.assign(fold=-1 if judged == SPEAKERS else judged, network=name))
    heard = Voices.load(channel_file(output, CHANNELS[0]))
    return pd.concat([*parts, lfcc_baseline(heard).assign(network="lfcc_regression")], ignore_index=True)


def _judge(
    settings: VoiceSettings, corpus: Voices, judged: int | str, output: Path, minutes: float | None
) -> tuple[keras.Model, np.ndarray]:
    """The network of a fold, trained if ``output`` does not hold it, and its test rows."""
    name = f"{settings.name}_{judged}"
    learnt, rows = split_speakers(corpus.table) if judged == SPEAKERS else split_fold(corpus.table, judged)
    if (saved := output / f"{name}.keras").is_file():
        return storage.load_network(saved), rows
    seed = settings.seed if judged == SPEAKERS else settings.seed + judged
    return train_voice(replace(settings, name=name, seed=seed), corpus, learnt, output, minutes).network, rows


def split_fold(table: pd.DataFrame, judged: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and test rows of a fold of pages."""
    fold = folds(table)
    return training_rows(table, fold, judged), np.flatnonzero(fold == judged)


def split_speakers(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Training rows, and test rows of a fifth of the named speakers whose systems are in training."""
    names = np.random.default_rng(0).permutation(sorted(set(table["speaker"]) - {""}))
    held = table["speaker"].isin(names[: len(names) // 5])
    known = table["system"].isin(set(table.loc[~held, "system"]))
    return np.flatnonzero(~held), np.flatnonzero(held & known)


def score_channels(
    network: keras.Model, settings: VoiceSettings, rows: np.ndarray, channels: str | Path
) -> pd.DataFrame:
    """Logits of these rows through every channel, without the voices that a channel makes silent."""
    parts = []
    for channel in CHANNELS:
        voices = Voices.load(channel_file(channels, channel)).take(rows).at(settings.rate)
        heard = np.flatnonzero([len(samples) > 0 for samples in voices.samples])
        logits = predict_logits(network, voices, heard, settings.length)
        parts.append(voices.table.iloc[heard].assign(row=rows[heard], channel=channel, logit=logits))
    return pd.concat(parts, ignore_index=True)


def averaged(scores: pd.DataFrame, names: Sequence[str] = MEMBERS) -> pd.DataFrame:
    """Average the logits of some networks.

    Raises:
        ValueError: a network has no score for a voice and channel that another has scored.
    """
    some = scores[scores["network"].isin(names)]
    keys = [column for column in some.columns if column not in ("network", "logit")]
    mean = some.groupby(keys, as_index=False, dropna=False)["logit"].agg(["mean", "size"])
    if (mean["size"] != len(names)).any():
        raise ValueError(f"expected a score of each of {', '.join(names)} for every voice and channel")
    return mean.rename(columns={"mean": "logit"}).drop(columns="size")


# --- baseline -----------------------------------------------------------------------------------------------
def lfcc_statistics(samples: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mean and deviation of 60 LFCC over a canonical voice: float32 (120,)."""
    features = lfcc(samples, rate)
    return np.concatenate([features.mean(axis=1), features.std(axis=1)]).astype(np.float32)


def lfcc_baseline(voices: Voices) -> pd.DataFrame:
    """Scores of a logistic regression on :func:`lfcc_statistics`, on the same folds, as recorded."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.stack([lfcc_statistics(samples / np.float32(32768)) for samples in voices.samples])
    labels, parts = voices.table["label"].to_numpy(), []
    for judged in range(FOLDS):
        learnt, rows = split_fold(voices.table, judged)
        regression = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
        model = make_pipeline(StandardScaler(), regression).fit(features[learnt], labels[learnt])
        logits = model.decision_function(features[rows])
        parts.append(voices.table.iloc[rows].assign(row=rows, channel=CHANNELS[0], fold=judged, logit=logits))
    return pd.concat(parts, ignore_index=True)


# --- metrics ------------------------------------------------------------------------------------------------
def error_rates(scores: pd.DataFrame, by: str = "page") -> pd.DataFrame:
    """EER and AUC of each page (or channel, fold) with both classes, and overall, with 95 % intervals.

    The intervals resample voices within a page; otherwise they resample whole pages.
    """
    groups = {name: some for name, some in scores.groupby(by, sort=False) if some["label"].nunique() == 2}
    lines = {name: _error_rate(some, some["page"] if by != "page" else None) for name, some in groups.items()}
    return pd.DataFrame({**lines, "all": _error_rate(scores, scores["page"])}).T


def _error_rate(some: pd.DataFrame, groups: pd.Series | None) -> dict:
    labels, chances = some["label"].to_numpy(), sigmoid(some["logit"].to_numpy())
    groups = None if groups is None or groups.nunique() < 2 else groups
    low, high = bootstrap_interval(equal_error_rate, labels, chances, groups, rounds=300)
    return {
        "spoofed": int(labels.sum()),
        "bona fide": int((labels == REAL).sum()),
        "EER": equal_error_rate(labels, chances),
        "low": low,
        "high": high,
        "AUC": auc(labels, chances),
    }


def recall(scores: pd.DataFrame, alarms: float = 0.05) -> pd.DataFrame:
    """Recall of each system at the threshold that flags the fraction ``alarms`` of all bona fide voices."""
    threshold = float(np.quantile(scores.loc[scores["label"] == REAL, "logit"], 1 - alarms))
    found = scores.loc[scores["label"] == FAKE, "logit"] > threshold
    return _shares(found, scores["system"].reindex(found.index))


def false_alarms(scores: pd.DataFrame, line: tuple[float, float], by: str) -> pd.DataFrame:
    """Fraction of bona fide voices with a calibrated P(fake) over one half, by ``page`` or ``channel``."""
    over = line[0] * scores.loc[scores["label"] == REAL, "logit"] + line[1] > 0
    return _shares(over, scores[by].reindex(over.index))


def _shares(hits: pd.Series, names: pd.Series) -> pd.DataFrame:
    """Fraction of hits for each name and overall, with 95 % intervals (Wilson 1927)."""
    groups = {**dict(list(hits.groupby(names, sort=False))), "all": hits}
    lines, z = {}, 1.96
    for name, some in groups.items():
        count, share = len(some), float(some.mean())
        middle, spread = (
            share + z**2 / (2 * count),
            z * np.sqrt((share * (1 - share) + z**2 / (4 * count)) / count),
        )
        low, high = (np.array([middle - spread, middle + spread]) / (1 + z**2 / count)).clip(0, 1)
        lines[name] = {"voices": count, "share": share, "low": low, "high": high}
    return pd.DataFrame(lines).T


def careful_line(
    scores: pd.DataFrame, alarms: float = 0.05, any_channel: float = 0.10
) -> tuple[float, float]:
    """Scale and shift that calibrate logits, with few bona fide voices over one half.

    The scale is Platt's on the folds. The shift leaves at most the fraction ``alarms`` of the bona fide
    voices over one half as recorded, and at most ``any_channel`` through any other channel.
    """
    scale, _ = fit_line(scores["label"], scores["logit"])
    real = scores[scores["label"] == REAL]
    shares = {channel: alarms if channel == CHANNELS[0] else any_channel for channel in CHANNELS}
    half = max(
        np.quantile(some["logit"], 1 - shares[channel], method="higher")
        for channel, some in real.groupby("channel")
    )
    return scale, float(-scale * half)


def tables(scores: pd.DataFrame, line: tuple[float, float]) -> dict[str, pd.DataFrame]:
    """Tables of the scores of :func:`judge_folds` for the average of the members, by title.

    Args:
        line: of ``detector.json``, for the false alarms.
    """
    shipped = averaged(scores)
    of_pages, known = shipped[shipped["fold"] >= 0], shipped[shipped["fold"] < 0]
    recorded = of_pages[of_pages["channel"] == CHANNELS[0]]
    alone = scores[(scores["fold"] >= 0) & (scores["channel"] == CHANNELS[0])]
    networks = {name: error_rates(some).loc["all"] for name, some in alone.groupby("network")}
    found = {
        "EER": error_rates(recorded),
        "EER through": error_rates(of_pages, "channel").drop(index="all"),
        "EER of": pd.DataFrame(networks).T,
        "recall": recall(recorded),
        "over one half": false_alarms(recorded, line, "page"),
        "over one half through": false_alarms(of_pages, line, "channel").drop(index="all"),
    }
    if len(known):
        heard = known[known["channel"] == CHANNELS[0]]
        found["EER, known systems, unknown speakers"] = error_rates(heard).loc[["all"]]
    return found


def figures(scores: pd.DataFrame, line: tuple[float, float]) -> list[dict]:
    """The values of :func:`tables` as entries of ``models/results.json``: ``voice/TABLE/ROW``."""
    entries = []
    for name, table in tables(scores, line).items():
        split = "speakers not heard" if "known" in name else "five folds; neither page nor system heard"
        for row, value in table[table.columns.intersection(["EER", "share"])[0]].items():
            interval = table.at[row, "low"], table.at[row, "high"]
            entries.append(
                result(
                    f"voice/{name}/{row}",
                    value,
                    interval,
                    data="voice/systems, neural, bona_fide",
                    split=split,
                    command=COMMAND,
                    seed=0,
                )
            )
    return entries
