"""Fuse the faces and the voice of a clip into one P(fake), and calibrate logits to probabilities."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .. import metrics, storage
from ..metrics import sigmoid

BRANCH_OUTPUTS = ("embedding", "side1", "side2", "side3")


def log_odds(probability: float) -> float:
    """log(p / (1 − p)): the shift that a prior adds to a logit calibrated on balanced data."""
    return math.log(probability / (1 - probability))


def at_prior(balanced, prior: float):
    """Convert a probability at a prior of 0.5 to another prior; 0 and 1 do not change."""
    fake, real = np.asarray(balanced) * prior, (1 - np.asarray(balanced)) * (1 - prior)
    return fake / (fake + real)


def any_fake(logits: Sequence[float], prior: float) -> float:
    """P(at least one of several people is fake): a noisy-or that divides ``prior`` among them.

    Uninformative logits (0) return exactly the prior. A single person gets the whole prior.

    Args:
        logits: calibrated at a prior of 0.5, one per person.
    """
    share = log_odds(1 - (1 - prior) ** (1 / len(logits)))
    return float(1 - np.prod(1 - sigmoid(np.asarray(logits) + share)))


POOLINGS = {"confident": metrics.confident_strategy, "power": metrics.power_transform}  # from the challenge


def pooled(logits: np.ndarray, seen: np.ndarray, pooling: str = "mean") -> float:
    """Pool the logits of the crops that show a face, by mean or ``POOLINGS``; NaN if there are none."""
    if not seen.any():
        return math.nan
    if pooling == "mean":
        return float(logits[seen].mean())
    return log_odds(float(np.clip(POOLINGS[pooling](sigmoid(logits[seen])), 1e-6, 1 - 1e-6)))


class Calibration:
    """Scale and shift of each kind of logit, fitted on class-balanced validation data (Platt 1999).

    Args:
        lines: ``{"crop": (scale, shift), "face": …, "voice": …, "clip": …}``; kinds not listed stay unscaled.
            ``crop`` is fitted on single crops and ``face`` on the mean of a person's ten crops
            (``fusion.training.branch_lines``): a mean varies less than a single crop.
        limits: lowest and highest probability ever returned at a prior of 0.5; other priors shift them too.
        pooling: of a person's frames, ``mean`` (of the logits) or one of ``POOLINGS``.
    """

    def __init__(self, lines: dict[str, tuple[float, float]], limits: tuple[float, float],
                 pooling: str = "mean"):
        if pooling not in ("mean", *POOLINGS):
            raise ValueError(f"pooling: expected mean, {' or '.join(POOLINGS)}, found {pooling!r}")
        self.lines, self.limits, self.pooling = lines, limits, pooling

    def logit(self, raw, kind: str):
        """The calibrated logit at a prior of 0.5."""
        scale, shift = self.lines.get(kind, (1.0, 0.0))
        return scale * np.asarray(raw, np.float64) + shift

    def probability(self, raw, kind: str, prior: float):
        """Calibrated P(fake) at ``prior``, within the limits; NaN stays NaN."""
        return at_prior(np.clip(sigmoid(self.logit(raw, kind)), *self.limits), prior)

    def within_limits(self, probability: float, prior: float) -> float:
        """A fused P(fake) at ``prior``, within the limits."""
        return float(np.clip(probability, *at_prior(np.array(self.limits), prior)))


class Fusion(Protocol):
    """Fuses the branches of one clip."""

    def __call__(self, face: dict[str, np.ndarray], seen: np.ndarray, voice: dict[str, np.ndarray] | None,
                 prior: float, others: Sequence[float] = ()) -> float:
        """
        Args:
            face: outputs of the face network for ten crops of the most suspicious person, each (10, …).
            seen: bool (10,), False for fallback crops.
            voice: outputs of the voice network for the windows, each (windows, …), or None without a voice.
            prior: share of fakes expected.
            others: the calibrated logits of the other people.

        Returns:
            P(fake) in [0, 1]; the prior if there is neither a face nor a voice.
        """


class NoisyOr:
    """A clip is fake if its face or its voice is: 1 − (1 − P(face fake)) (1 − P(voice fake)).

    The prior is split between the two: uninformative branches (logits of 0) return exactly the prior. A
    missing branch cannot be fake; the other one then gets the whole prior. Several people share the prior of
    the face.

    Args:
        calibration: of the branches' logits.
        voice_share: prior of a fake voice, as a fraction of the prior of a fake clip; the face gets the rest.
    """

    def __init__(self, calibration: Calibration, voice_share: float):
        self.calibration, self.voice_share = calibration, voice_share

    def __call__(self, face, seen, voice, prior, others=()) -> float:
        if not seen.any() and voice is None:
            return prior
        voice_prior = 0.0 if voice is None else self.voice_share * prior if seen.any() else prior
        of_faces = of_voice = 0.0
        if seen.any():
            logit = self.calibration.logit(pooled(face["logit"][:, 0], seen, self.calibration.pooling),
                                           "face")
            of_faces = any_fake([float(logit), *others], 1 - (1 - prior) / (1 - voice_prior))
        if voice is not None:
            of_voice = float(sigmoid(self.calibration.logit(voice["logit"].mean(), "voice")
                                     + log_odds(voice_prior)))
        return float(1 - (1 - of_faces) * (1 - of_voice))


class LastNetwork:
    """The study's last CNN on both branches' embeddings and side outputs; missing inputs are masked.

    It uses only the most suspicious person.
    """

    def __init__(self, network, calibration: Calibration):
        self.network, self.calibration = network, calibration

    def __call__(self, face, seen, voice, prior, others=()) -> float:
        if not seen.any() and voice is None:
            return prior
        inputs = {f"face_{name}": face[name][None] for name in BRANCH_OUTPUTS}
        inputs["face_mask"] = seen[None].astype(np.float32)
        for name in BRANCH_OUTPUTS:
            width = self.network.input[f"voice_{name}"].shape[-1]
            empty = np.zeros((1, width), np.float32)
            inputs[f"voice_{name}"] = empty if voice is None else voice[name].mean(0)[None]
        inputs["voice_mask"] = np.full((1, 1), voice is not None, np.float32)
        logit = np.ravel(self.network.predict_on_batch(inputs))[0]
        return float(sigmoid(self.calibration.logit(logit, "clip") + log_odds(prior)))


def load(folder: Path, settings: dict, calibration: Calibration) -> Fusion:
    """The fusion set in ``detector.json``.

    Raises:
        ValueError: unknown fusion.
    """
    name = settings["fusion"]
    if name == "noisy_or":
        return NoisyOr(calibration, settings["voice_share"])
    if name == "last_network":
        return LastNetwork(storage.load_network(folder / "fusion.keras"), calibration)
    raise ValueError(f"{folder}/detector.json: expected the fusion noisy_or or last_network, found {name!r}")
