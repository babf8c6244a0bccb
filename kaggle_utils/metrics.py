"""Metrics of a set of scores, and pooling of a clip's frame scores.

Labels are 0 (REAL) and 1 (FAKE), probabilities are P(fake) in [0, 1]; both are one-dimensional and equally
long. Anything else, NaN included, raises ValueError. scikit-learn loads on first use.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["auc", "bootstrap_interval", "confident_strategy", "equal_error_rate",
           "expected_calibration_error", "fit_line", "log_loss", "power_transform", "reliability", "sigmoid"]


def sigmoid(logits: ArrayLike) -> np.ndarray:
    """1 / (1 + exp(-logit)), for one logit or an array; float64."""
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def log_loss(labels: ArrayLike, probabilities: ArrayLike, eps: float = 1e-15) -> float:
    """Mean binary cross-entropy in nats, the metric of the Deepfake Detection Challenge.

    Probabilities are clipped to [eps, 1 - eps] as Kaggle does, so one wrong certainty costs 34.5 nats.
    Answering 0.5 for every clip gives ln 2 = 0.693147.
    """
    from sklearn import metrics

    labels, probabilities = _checked(labels, probabilities)
    return float(metrics.log_loss(labels, np.clip(probabilities, eps, 1 - eps), labels=[0, 1]))


def auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a fake scores above a real; a tie counts one half.

    Raises:
        ValueError: one class is missing.
    """
    from sklearn import metrics

    return float(metrics.roc_auc_score(*_checked(labels, probabilities, both_classes=True)))


def equal_error_rate(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The error rate, in [0, 1], at the threshold where false alarms equal misses.

    Both rates are interpolated linearly between neighbouring points of the ROC curve: the result is where the
    curve crosses the diagonal FPR = 1 - TPR.

    Raises:
        ValueError: one class is missing.
    """
    from sklearn import metrics

    false_alarm, hit, _ = metrics.roc_curve(*_checked(labels, probabilities, both_classes=True),
                                            drop_intermediate=False)
    return float(np.interp(0.0, false_alarm - (1 - hit), false_alarm))


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> tuple[np.ndarray, ...]:
    """The points of a reliability diagram over ``bins`` intervals of equal width.

    A probability on an inner edge falls into the upper interval.

    Returns:
        float arrays (k,) for the k non-empty intervals: mean probability, share of fakes, number of scores.
    """
    labels, probabilities = _checked(labels, probabilities)
    interval = np.minimum((probabilities * bins).astype(int), bins - 1)
    counts, predicted, fakes = (np.bincount(interval, weights, bins)
                                for weights in (np.ones_like(probabilities), probabilities, labels))
    held = counts > 0
    return predicted[held] / counts[held], fakes[held] / counts[held], counts[held]


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Mean distance, in [0, 1], between probability and share of fakes (Naeini et al. 2015).

    The ``bins`` intervals have equal width and are weighted by their number of scores.
    """
    predicted, observed, counts = reliability(labels, probabilities, bins)
    return float(np.average(np.abs(predicted - observed), weights=counts))


def bootstrap_interval(metric: Callable[[np.ndarray, np.ndarray], float], labels: ArrayLike,
                       probabilities: ArrayLike, groups: ArrayLike | None = None, rounds: int = 1000,
                       seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of ``metric(labels, probabilities)`` (Efron 1979), resampling whole groups.

    ``groups`` (n,) names rows that belong together (an original and its fakes, a speaker); by default every
    row is its own group. If both classes are present, resamples with one class are redrawn.
    """
    labels, probabilities = _checked(labels, probabilities)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if groups.shape != labels.shape:
        raise ValueError(f"groups: found shape {groups.shape}, expected {labels.shape}, one name per row")
    _, member = np.unique(groups, return_inverse=True)
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    classes = len(np.unique(labels))
    if classes == 2 and len(rows) == 1:
        raise ValueError("groups: found only one group, expected at least two to resample")
    random = np.random.default_rng(seed)
    values: list[float] = []
    while len(values) < rounds:
        drawn = np.concatenate([rows[i] for i in random.integers(len(rows), size=len(rows))])
        if len(np.unique(labels[drawn])) == classes:
            values.append(metric(labels[drawn], probabilities[drawn]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def fit_line(labels: ArrayLike, logits: ArrayLike) -> tuple[float, float]:
    """Scale and shift that turn logits into log odds, both classes weighted alike (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    logits = np.asarray(logits, np.float64)
    middle, spread = float(logits.mean()), max(float(logits.std()), 1e-6)
    places = (logits[:, None] - middle) / spread
    model = LogisticRegression(C=10.0, class_weight="balanced", tol=1e-8).fit(places, labels)
    scale = float(model.coef_[0, 0] / spread)
    return scale, float(model.intercept_[0]) - scale * middle


def confident_strategy(probabilities: ArrayLike, threshold: float = 0.8) -> float:
    """Pooling of the challenge's winner (Seferbekov 2020): trust the confident frames.

    The mean of the frames above ``threshold`` if they are more than 2 in 5 (rounded down) and more than 11 of
    32; else the mean of the frames below 1 - threshold if they are more than 9 in 10; else the mean of all.
    The original 11 assumed 32 frames; here it scales with their number.
    """
    probabilities = clip_frames(probabilities)
    frames = len(probabilities)
    fake, real = probabilities > threshold, probabilities < 1 - threshold
    if fake.sum() > frames // 2.5 and fake.sum() > 11 * frames / 32:
        return float(probabilities[fake].mean())
    if real.sum() > 0.9 * frames:
        return float(probabilities[real].mean())
    return float(probabilities.mean())


def power_transform(probabilities: ArrayLike, power: float = 0.65) -> float:
    """Pooling of the third place (NTech-Lab 2020): sharpen each frame and weight it by its confidence.

    With d = p - 0.5, a frame's score is 0.5 + sign(d) |d|^power, clipped to [0.01, 0.99], with weight |d| +
    1e-4. Frames that are all 0.7 give 0.8513.
    """
    distance = clip_frames(probabilities) - 0.5
    sharpened = np.clip(0.5 + np.sign(distance) * np.abs(distance) ** power, 0.01, 0.99)
    return float(np.average(sharpened, weights=np.abs(distance) + 1e-4))


def _checked(labels: ArrayLike, probabilities: ArrayLike,
             both_classes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays (n,), or a ValueError that says what was found."""
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    if labels.ndim != 1 or labels.shape != probabilities.shape or not labels.size:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape}: expected two equal "
                         "shapes (n,), n > 0")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels: found {np.setdiff1d(labels, (0, 1))[:5]}, expected 0 (REAL) and 1 "
                         "(FAKE) only")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities: found NaN or a value outside [0, 1]")
    if both_classes and labels.min() == labels.max():
        raise ValueError(f"labels: found only {labels[0]:.0f}, expected both 0 (REAL) and 1 (FAKE)")
    return labels, probabilities


def clip_frames(probabilities: ArrayLike) -> np.ndarray:
    probabilities = np.asarray(probabilities, np.float64)
    return _checked(np.zeros(probabilities.shape), probabilities)[1]
