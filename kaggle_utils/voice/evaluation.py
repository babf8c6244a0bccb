"""Judge voice networks on pages and systems that they never heard, as recorded and through channels.

Five folds of pages: the networks of a fold learn from the other pages, without the systems of their own
(``data.training_rows``), and judge theirs. :func:`judge_folds` trains and scores, :func:`figures` makes tables of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from scipy import signal

from .. import storage
from ..datasets.dfdc import FAKE, REAL
from ..media.sound import SAMPLE_RATE
from ..metrics import auc, bootstrap_interval, equal_error_rate, fit_line, sigmoid
from ..results import result
from . import data
from .data import FOLDS, Voices, folds, noisy, to_int16, training_rows
from .signal import lfcc
from .training import RUNS, VoiceSettings, predict_logits, train_voice

CHANNELS = ("as recorded", "aac_64", "mp3_48", "opus_24", "telephone", "low-pass 3.4 kHz", "22 kHz", "noise 15 dB", "room")
MEMBERS = ("lfcc", "linear")  # averaged, as shipped
BASELINES = ("voice_cnn", "lfcc_regression")
COMMAND = "python -m kaggle_utils evaluate voice"


# --- channels -------------------------------------------------------------------------------------------------------
def heard_through(voices: Voices, channel: str, processes: int = 1) -> Voices:
    """Voices as recorded, at 16 kHz, after one of ``CHANNELS``; canonical."""
    if channel in data.CODECS:
        samples = data.recoded(voices.samples, channel, voices.rate, processes)
    else:
        samples = [_heard(channel, samples, seed) for seed, samples in enumerate(voices.samples)]
    return data.prepared(Voices(voices.table, samples), processes=processes)


def _heard(channel: str, samples: np.ndarray, seed: int) -> np.ndarray:
    match channel:
        case "as recorded":
            return samples
        case "noise 15 dB":
            return noisy(samples, 15, seed)
        case "room":
            return to_int16(_in_a_room(samples / np.float32(32768), seed))
        case "low-pass 3.4 kHz":
            return to_int16(signal.sosfilt(signal.butter(8, 3400, fs=SAMPLE_RATE, output="sos"), samples / 32768))
        case "22 kHz":
            there = signal.resample_poly(samples / 32768, 441, 320)
            return to_int16(signal.resample_poly(there, 320, 441))
    raise ValueError(f"channel: found {channel!r}, expected one of {', '.join(CHANNELS)}")


def _in_a_room(samples: np.ndarray, seed: int) -> np.ndarray:
    """Direct sound and, 3 dB under it, noise that decays by 60 dB in 0.5 s (Moorer 1979)."""
    seconds = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    tail = np.random.default_rng(seed).standard_normal(len(seconds)) * np.exp(-6.9 * seconds / 0.5)
    tail *= 10 ** (-3 / 20) / np.sqrt(np.sum(np.square(tail)))
    tail[0] += 1
    wet = signal.fftconvolve(samples, tail)[: len(samples)]
    return wet * min(1.0, 0.99 / max(float(np.abs(wet).max()), 1e-6))


# --- folds ----------------------------------------------------------------------------------------------------------
def make_channels(folder: str | Path, output: str | Path, processes: int = 1) -> None:
    """Write ``CHANNEL.npz`` of all voices under ``folder`` for each channel that ``output`` lacks."""
    voices = None
    for channel in CHANNELS:
        if not (path := _channel_file(output, channel)).is_file():
            voices = voices or data.read_voices(folder)
            Path(output).mkdir(parents=True, exist_ok=True)
            heard_through(voices, channel, processes).save(path)


def _channel_file(folder: str | Path, channel: str) -> Path:
    return Path(folder) / f"{channel.replace(' ', '_')}.npz"


def judge_fold(settings: VoiceSettings, corpus: Voices, judged: int, channels: str | Path, output: str | Path,
               minutes: float | None = None) -> pd.DataFrame:
    """Train on the pages of all folds but one, and score that one through every channel.

    Args:
        corpus: canonical, with copies, at ``settings.rate``. judged: the fold.
        channels: folder of :func:`make_channels`. output: gets the run, ``NAME_foldK``, and ``NAME_foldK.judged.csv``.

    Returns:
        A line for each voice and channel: the table's columns, ``row``, ``fold``, ``channel``, ``logit``.
    """
    fold = folds(corpus.table)
    rows = training_rows(corpus.table, fold, judged)
    name = f"{settings.name}_fold{judged}"
    network = train_voice(replace(settings, name=name, seed=settings.seed + judged), corpus, rows, output, minutes).network
    return score_channels(network, settings, np.flatnonzero(fold == judged), channels).assign(fold=judged).pipe(
        _written, Path(output) / f"{name}.judged.csv")


def judge_speakers(settings: VoiceSettings, corpus: Voices, channels: str | Path, output: str | Path,
                   minutes: float | None = None) -> pd.DataFrame:
    """The same for known pages and systems and unknown speakers: a fifth of the named speakers is left out."""
    speakers = corpus.table["speaker"]
    names = np.random.default_rng(0).permutation(sorted(set(speakers) - {""}))
    held = speakers.isin(names[: len(names) // 5])
    learnt = set(corpus.table.loc[~held, "system"])
    judged = np.flatnonzero(held & corpus.table["system"].isin(learnt))
    name = f"{settings.name}_speakers"
    network = train_voice(replace(settings, name=name), corpus, np.flatnonzero(~held), output, minutes).network
    return score_channels(network, settings, judged, channels).assign(fold=-1).pipe(
        _written, Path(output) / f"{name}.judged.csv")


def score_channels(network: keras.Model, settings: VoiceSettings, rows: np.ndarray, channels: str | Path) -> pd.DataFrame:
    """Logits of these rows through every channel."""
    parts = []
    for channel in CHANNELS:
        voices = Voices.load(_channel_file(channels, channel)).take(rows).at(settings.rate)
        heard = np.flatnonzero([len(samples) > 0 for samples in voices.samples])
        logits = predict_logits(network, voices, heard, settings.length)
        parts.append(voices.table.iloc[heard].assign(row=rows[heard], channel=channel, logit=logits))
    return pd.concat(parts, ignore_index=True)


def _written(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    table.to_csv(path, index=False, float_format="%.5f")
    return table


def judge_folds(folder: str | Path, output: str | Path, names: Sequence[str] = (*MEMBERS, "voice_cnn"),
                minutes: float | None = None, processes: int = 1) -> pd.DataFrame:
    """Scores of every voice by networks that never heard its page and systems; what ``output`` holds is not made again.

    Args:
        folder: of voices (``data.read_voices``). output: gets corpus, channels, runs and scores.
        names: of ``RUNS``. minutes: for each training.

    Returns:
        As :func:`judge_fold`, with the column ``network``; the plain baseline among the networks.
    """
    from .training import make_corpus

    output = Path(output)
    make_channels(folder, output, processes)
    if not (cache := output / "voices.npz").is_file():
        make_corpus(folder, processes=processes).save(cache)
    corpus, parts = Voices.load(cache), []
    for name in names:
        at_rate = corpus.at(RUNS[name].rate)
        for judged in (*range(FOLDS), "speakers"):
            done = output / f"{name}_{judged if judged == 'speakers' else f'fold{judged}'}.judged.csv"
            if done.is_file():
                scores = pd.read_csv(done, keep_default_na=False)
            elif judged == "speakers":
                scores = judge_speakers(RUNS[name], at_rate, output, output, minutes)
            else:
                scores = judge_fold(RUNS[name], at_rate, judged, output, output, minutes)
            parts.append(scores.assign(network=name))
    parts.append(lfcc_baseline(Voices.load(_channel_file(output, CHANNELS[0]))).assign(network="lfcc_regression"))
    return pd.concat(parts, ignore_index=True)


def averaged(scores: pd.DataFrame, names: Sequence[str] = MEMBERS) -> pd.DataFrame:
    """Scores of the average of some networks: the mean of their logits."""
    some = scores[scores["network"].isin(names)]
    keys = [column for column in some.columns if column not in ("network", "logit")]
    mean = some.groupby(keys, as_index=False, dropna=False)["logit"].agg(["mean", "size"])
    if (mean["size"] != len(names)).any():
        raise ValueError(f"expected a score of each of {', '.join(names)} for every voice and channel")
    return mean.rename(columns={"mean": "logit"}).drop(columns="size")


# --- the plain baseline ---------------------------------------------------------------------------------------------
def lfcc_statistics(samples: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mean and deviation of 60 linear frequency cepstral coefficients over a canonical voice: float32 (120,)."""
    features = lfcc(samples, rate)
    return np.concatenate([features.mean(axis=1), features.std(axis=1)]).astype(np.float32)


def lfcc_baseline(voices: Voices) -> pd.DataFrame:
    """Logistic regression on :func:`lfcc_statistics`, both classes weighted alike, on the same folds, as recorded."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.stack([lfcc_statistics(samples / np.float32(32768)) for samples in voices.samples])
    labels, fold, parts = voices.table["label"].to_numpy(), folds(voices.table), []
    for judged in range(FOLDS):
        rows, there = training_rows(voices.table, fold, judged), np.flatnonzero(fold == judged)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced"))
        model.fit(features[rows], labels[rows])
        parts.append(voices.table.iloc[there].assign(row=there, channel=CHANNELS[0], fold=judged,
                                                     logit=model.decision_function(features[there])))
    return pd.concat(parts, ignore_index=True)


# --- figures --------------------------------------------------------------------------------------------------------
def eer(scores: pd.DataFrame) -> float:
    """EER of a table of scores."""
    return equal_error_rate(scores["label"], sigmoid(scores["logit"]))


def by_page(scores: pd.DataFrame) -> pd.DataFrame:
    """EER of each page that has both classes, with intervals over its voices; of all below, over pages.

    Args:
        scores: of one network, through one channel.
    """
    lines = {}
    for page, some in scores.groupby("page"):
        if some["label"].nunique() == 2:
            lines[page] = _line(some, None)
    lines["all"] = _line(scores, scores["page"])
    return pd.DataFrame(lines).T


def _line(some: pd.DataFrame, groups: pd.Series | None) -> dict:
    labels, chances = some["label"].to_numpy(), sigmoid(some["logit"].to_numpy())
    low, high = bootstrap_interval(equal_error_rate, labels, chances, groups, rounds=300)
    return {"spoofed": int(labels.sum()), "bona fide": int((1 - labels).sum()), "EER": equal_error_rate(labels, chances),
            "low": low, "high": high, "AUC": auc(labels, chances)}


def by_system(scores: pd.DataFrame, false_alarms: float = 0.05) -> pd.DataFrame:
    """Recall of each system at the threshold that flags ``false_alarms`` of all bona fide voices, with intervals."""
    threshold = float(np.quantile(scores.loc[scores["label"] == REAL, "logit"], 1 - false_alarms))
    fakes = scores[scores["label"] == FAKE]
    groups = {**dict(list(fakes.groupby("system"))), "all": fakes}
    return pd.DataFrame({name: _share(some["logit"] > threshold, "recall") for name, some in groups.items()}).T


def false_alarms(scores: pd.DataFrame, line: tuple[float, float], by: str) -> pd.DataFrame:
    """Share of bona fide voices over one half, after the calibration ``line``, by ``page`` or ``channel``, with intervals."""
    real = scores[scores["label"] == REAL]
    over = line[0] * real["logit"] + line[1] > 0
    groups = {**dict(list(over.groupby(real[by], sort=False))), "all": over}
    return pd.DataFrame({name: _share(some, "over one half") for name, some in groups.items()}).T


def _share(hits: pd.Series, name: str) -> dict:
    """A share with its 95 % interval (Wilson 1927)."""
    count, share, z = len(hits), float(hits.mean()), 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return {"voices": count, name: share, "low": middle - half, "high": middle + half}
