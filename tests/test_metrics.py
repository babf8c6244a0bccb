"""Every metric against scikit-learn where it has it, against figures worked out by hand where not."""

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from kaggle_utils import metrics


@pytest.fixture(params=[0, 1, 2])
def scores(request):
    """Labels and probabilities of two decimals, so that many are tied."""
    random = np.random.default_rng(request.param)
    labels = random.integers(0, 2, 400)
    return labels, np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)


def test_log_loss(scores):
    labels, probabilities = scores
    inner = np.clip(probabilities, 0.01, 0.99)
    assert metrics.log_loss(labels, inner) == pytest.approx(reference.log_loss(labels, inner), abs=1e-12)


def test_log_loss_as_kaggle():
    assert metrics.log_loss([0, 1, 1], [0.5, 0.5, 0.5]) == pytest.approx(0.693147, abs=5e-7)
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-np.log(1e-15))
    assert metrics.log_loss([0, 1], [0.0, 1.0]) == pytest.approx(0, abs=1e-14)


def test_auc(scores):
    assert metrics.auc(*scores) == pytest.approx(reference.roc_auc_score(*scores), abs=1e-12)


def test_auc_ties():
    assert metrics.auc([0, 1], [0.5, 0.5]) == 0.5
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8]) == 0.875


def test_equal_error_rate(scores):
    false_alarm, hit, _ = reference.roc_curve(*scores, drop_intermediate=False)
    crossing = np.flatnonzero(false_alarm >= 1 - hit)[0]
    low, high = false_alarm[crossing - 1], false_alarm[crossing]
    gaps = [false_alarm[i] - (1 - hit[i]) for i in (crossing - 1, crossing)]
    expected = low + (high - low) * gaps[0] / (gaps[0] - gaps[1])
    assert metrics.equal_error_rate(*scores) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "probabilities", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0),
        ([0, 0, 1, 1], [0.8, 0.9, 0.1, 0.2], 1),
        ([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.4, 0.8, 0.9], 1 / 3),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5),
    ],
)
def test_equal_error_rate_by_hand(labels, probabilities, expected):
    assert metrics.equal_error_rate(labels, probabilities) == pytest.approx(expected)


def test_reliability(scores):
    labels, probabilities = scores
    inner = np.clip(probabilities + 0.001, 0.001, 0.999)  # scikit-learn counts the edges downwards
    predicted, observed, counts = metrics.reliability(labels, inner)
    theirs_observed, theirs_predicted = calibration_curve(labels, inner, n_bins=10)
    np.testing.assert_allclose(observed, theirs_observed)
    np.testing.assert_allclose(predicted, theirs_predicted)
    assert counts.sum() == len(labels)


def test_expected_calibration_error():
    assert metrics.expected_calibration_error([0, 1, 1, 1], [0.75] * 4) == pytest.approx(0)
    assert metrics.expected_calibration_error([0, 0, 1, 1], [0.1, 0.1, 0.7, 1.0]) == pytest.approx(0.125)


def test_bootstrap_interval_covers(scores):
    low, high = metrics.bootstrap_interval(metrics.auc, *scores, rounds=200)
    assert low < metrics.auc(*scores) < high
    assert (low, high) == metrics.bootstrap_interval(metrics.auc, *scores, rounds=200)


def test_bootstrap_interval_is_wider_by_groups(scores):
    labels, probabilities = (np.repeat(x, 5) for x in scores)
    groups = np.repeat(np.arange(len(labels) // 5), 5)
    rows = metrics.bootstrap_interval(metrics.log_loss, labels, probabilities, rounds=200)
    whole = metrics.bootstrap_interval(metrics.log_loss, labels, probabilities, groups, rounds=200)
    assert np.diff(whole) / np.diff(rows) == pytest.approx(np.sqrt(5), rel=0.25)


def test_bootstrap_interval_keeps_both_classes():
    low, high = metrics.bootstrap_interval(
        metrics.auc, [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8], list("aabb"), rounds=50
    )
    assert low == high == 1
    with pytest.raises(ValueError, match="one group"):
        metrics.bootstrap_interval(metrics.auc, [0, 1], [0.1, 0.9], ["a", "a"])


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.5], "equal shapes"),
        ([], [], "n > 0"),
        ([0, 2], [0.5, 0.5], "expected 0"),
        ([0, 1], [0.5, np.nan], "NaN"),
        ([0, 1], [0.5, 1.5], r"outside \[0, 1\]"),
    ],
)
def test_refuses(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        metrics.log_loss(labels, probabilities)


@pytest.mark.parametrize("metric", [metrics.auc, metrics.equal_error_rate])
def test_needs_both_classes(metric):
    with pytest.raises(ValueError, match="both"):
        metric([1, 1], [0.5, 0.6])


def test_confident_strategy_on_32_frames():
    assert metrics.confident_strategy([0.9] * 13 + [0.1] * 19) == pytest.approx(0.9)
    assert metrics.confident_strategy([0.9] * 12 + [0.1] * 20) == pytest.approx((12 * 0.9 + 20 * 0.1) / 32)
    assert metrics.confident_strategy([0.1] * 29 + [0.7] * 3) == pytest.approx(0.1)
    assert metrics.confident_strategy([0.1] * 28 + [0.7] * 4) == pytest.approx((28 * 0.1 + 4 * 0.7) / 32)


def test_confident_strategy_is_scaled_to_ten_frames():
    assert metrics.confident_strategy([0.9] * 5 + [0.3] * 5) == pytest.approx(0.9)
    assert metrics.confident_strategy([0.9] * 4 + [0.3] * 6) == pytest.approx(0.54)


def test_power_transform():
    assert metrics.power_transform([0.7]) == pytest.approx(0.8513, abs=5e-5)
    assert metrics.power_transform([0.3] * 4) == pytest.approx(1 - 0.8513, abs=5e-5)
    assert metrics.power_transform([0.5]) == 0.5
    assert metrics.power_transform([1.0]) == 0.99
    sure, unsure = 0.5 + 0.4**0.65, 0.5 - 0.1**0.65
    expected = np.average([min(sure, 0.99), unsure], weights=[0.4001, 0.1001])
    assert metrics.power_transform([0.9, 0.4]) == pytest.approx(expected)
