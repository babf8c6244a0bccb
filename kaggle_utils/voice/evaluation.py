"""Judge voice networks: generators left out, false alarms after codecs and noise, a plain baseline.

The functions take the scores that ``voice_training.train_voice`` writes: the table of voices with a column ``logit``.
"""

from collections.abc import Sequence

import keras
import numpy as np
import pandas as pd

from ..datasets.dfdc import FAKE, REAL
from ..media.sound import SAMPLE_RATE
from ..metrics import auc, equal_error_rate, sigmoid
from .data import Voices, noisy, recode, to_int16
from .signal import canonical, lfcc
from .training import VoiceSettings, predict_logits, unheard
from .vocoders import family

CHANNELS = ("as recorded", "aac_64", "opus_24", "telephone", "noise 15 dB")


# --- figures --------------------------------------------------------------------------------------------------------
def threshold_of_eer(scores: pd.DataFrame) -> float:
    """The logit, midway between two scores, above which as many bona fide voices lie as spoofed ones lie below."""
    real, fake = (np.sort(scores.loc[scores["label"] == label, "logit"]) for label in (REAL, FAKE))
    places = np.sort(scores["logit"].to_numpy())
    alarms = 1 - np.searchsorted(real, places, side="left") / len(real)
    misses = np.searchsorted(fake, places, side="left") / len(fake)
    found = np.argmin(np.abs(alarms - misses))
    return float(places[max(found - 1, 0)] + places[found]) / 2


def by_family(scores: pd.DataFrame, families: Sequence[str] | None = None) -> pd.DataFrame:
    """EER and AUC of each family of generators against all bona fide voices of ``scores``.

    Columns: voices (spoofed), speakers (of them), eer, auc.
    """
    real = scores[scores["label"] == REAL]
    fakes = scores[scores["label"] == FAKE]
    groups = fakes.groupby(fakes["generator"].map(family))
    lines = {}
    for name, some in groups:
        if families is None or name in families:
            both = pd.concat([real, some])
            labels, chances = both["label"].to_numpy(), sigmoid(both["logit"].to_numpy())
            lines[name] = {"voices": len(some), "speakers": some["speaker"].nunique(),
                           "eer": equal_error_rate(labels, chances), "auc": auc(labels, chances)}
    return pd.DataFrame(lines).T


def left_out(scores: pd.DataFrame, settings: VoiceSettings) -> pd.DataFrame:
    """:func:`by_family` for the families that a run was not given, all spoofed voices of unheard speakers together below."""
    families = [name for name, share in settings.weights.items() if share == 0]
    return by_family(scores, families)


def averaged(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Scores of several networks on the same rows as those of their average: the mean of the logits."""
    rows = [part.set_index("row") for part in parts]
    shared = rows[0].index
    if any(not part.index.equals(shared) for part in rows):
        raise ValueError("expected scores of the same rows, in the same order")
    return parts[0].assign(logit=np.mean([part["logit"].to_numpy() for part in rows], axis=0))


# --- false alarms ---------------------------------------------------------------------------------------------------
def false_alarms(networks: Sequence[keras.Model], voices: Voices, threshold: float, length: int) -> pd.DataFrame:
    """How many bona fide speakers are flagged after codecs, telephone band and noise.

    Args:
        networks: one, or several whose logits are averaged.
        voices: as recorded, at 16 kHz, not yet canonical; its bona fide speakers are judged.
        threshold: logit; a speaker is flagged when the mean over the speaker's voices lies above.
        length: of the networks' window, in samples.

    Returns:
        A line for each of ``CHANNELS``: speakers, flagged speakers, share; voices, share of flagged voices.
    """
    real = np.flatnonzero(voices.table["label"] == REAL)
    person = (voices.table["corpus"] + "-" + voices.table["speaker"]).to_numpy()[real]
    lines = {}
    for channel in CHANNELS:
        heard = [_heard(voices.samples[row], channel, int(row)) for row in real]
        some = Voices(voices.table.iloc[real].reset_index(drop=True), heard)
        logits = np.mean([predict_logits(network, some, np.arange(len(real)), length) for network in networks], axis=0)
        speakers = pd.Series(logits).groupby(person).mean()
        lines[channel] = {"speakers": len(speakers), "flagged": int((speakers > threshold).sum()),
                          "share": float((speakers > threshold).mean()), "voices": len(real),
                          "share of voices": float((logits > threshold).mean())}
    return pd.DataFrame(lines).T


def _heard(samples: np.ndarray, channel: str, seed: int) -> np.ndarray:
    if channel == "noise 15 dB":
        samples = noisy(samples, 15, seed)
    elif channel != "as recorded":
        samples = recode(samples, SAMPLE_RATE, channel)
    return to_int16(canonical(samples / np.float32(32768), SAMPLE_RATE))


# --- the plain baseline ---------------------------------------------------------------------------------------------
def lfcc_statistics(samples: np.ndarray, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mean and deviation of 60 linear frequency cepstral coefficients over a canonical voice: float32 (120,)."""
    features = lfcc(samples, rate)
    return np.concatenate([features.mean(axis=1), features.std(axis=1)]).astype(np.float32)


def lfcc_baseline(features: np.ndarray, voices: Voices, settings: VoiceSettings) -> pd.DataFrame:
    """Logistic regression on :func:`lfcc_statistics` (N, 120), trained and scored on the rows of a run of ``settings``.

    Families have the shares that the run gives them, both classes weigh alike.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = voices.rows("train")
    table = voices.table.iloc[rows]
    families = table["generator"].map(family)
    weight = (families.map(settings.weights).fillna(1.0) / families.map(families.value_counts())).to_numpy()
    fake = (table["label"] == FAKE).to_numpy()
    weight = np.where(fake, weight, weight[fake].sum() / (~fake).sum())
    used = weight > 0
    weight = weight[used] / weight[used].mean()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    model.fit(features[rows][used], fake[used], logisticregression__sample_weight=weight)
    judged = unheard(voices, settings)
    return voices.table.iloc[judged].assign(logit=model.decision_function(features[judged]), row=judged)
