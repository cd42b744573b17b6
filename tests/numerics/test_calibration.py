"""Calibration against hand-worked bins, scikit-learn and simulated models whose error is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from compress.numerics.calibration import (
    brier_scores,
    calibration_bins,
    calibration_error,
    calibration_error_interval,
    mean_interval,
    softmax,
)

# Bins of width 0.2: 0.55 and 0.60 in (0.4, 0.6], 0.65 in (0.6, 0.8], 0.9 and 1.0 in (0.8, 1].
CONFIDENCE = [0.55, 0.60, 0.65, 0.9, 1.0]
CORRECT = [1, 0, 0, 1, 1]


def test_the_bins_of_five_rows() -> None:
    actual = calibration_bins(CONFIDENCE, CORRECT, bins=5)
    assert [bin.rows for bin in actual] == [2, 1, 2]
    assert [bin.low for bin in actual] == pytest.approx([0.4, 0.6, 0.8])
    assert [bin.high for bin in actual] == pytest.approx([0.6, 0.8, 1.0])
    assert [bin.confidence for bin in actual] == pytest.approx([0.575, 0.65, 0.95])
    assert [bin.accuracy for bin in actual] == [0.5, 0.0, 1.0]


def test_the_error_of_five_rows_by_hand() -> None:
    # 2/5 |0.5 - 0.575| + 1/5 |0 - 0.65| + 2/5 |1 - 0.95|
    assert calibration_error(CONFIDENCE, CORRECT, bins=5) == pytest.approx(0.03 + 0.13 + 0.02)


def test_an_edge_belongs_to_the_bin_below_it_whatever_the_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point.
    edges = np.arange(1, 101) / 100
    assert [bin.high for bin in calibration_bins(edges, np.ones(100), bins=100)] == pytest.approx(edges)


def test_sure_and_right_has_no_error_and_sure_and_wrong_all_of_it() -> None:
    assert calibration_error([1.0, 1.0], [1, 1]) == 0
    assert calibration_error([1.0, 1.0], [0, 0]) == 1


def test_brier_by_hand() -> None:
    # (0.7 - 1)^2 + 0.2^2 + 0.1^2, and 0.5^2 + 0.5^2
    actual = brier_scores([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], [0, 1])
    assert actual.tolist() == pytest.approx([0.14, 0.5])


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_as_scikit_learn_has_it(classes: int) -> None:
    generator = np.random.default_rng(classes)
    probabilities = softmax(generator.normal(size=(300, classes)))
    labels = generator.integers(0, classes, 300)
    expected = brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
    assert brier_scores(probabilities, labels).mean() == pytest.approx(expected, rel=1e-12)


def test_softmax_of_large_logits() -> None:
    assert softmax([[1000.0, 1000.0 + np.log(3)]])[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_softmax_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        softmax([[0.0, bad]])


@pytest.mark.parametrize("overconfidence", [0.0, 0.05, 0.1])
def test_the_interval_holds_the_true_error(overconfidence: float) -> None:
    generator = np.random.default_rng(7)
    held = 0
    for seed in range(200):
        confidence = generator.uniform(0.6, 1.0, 600)
        correct = generator.random(600) < confidence - overconfidence
        actual = calibration_error_interval(confidence, correct, seed, resamples=200)
        assert actual.low <= actual.value <= actual.high
        held += actual.low <= overconfidence <= actual.high
    # 96%, 97% and 93% of 400 were counted; fewer than 87% of 200 happens once in a thousand times.
    assert held >= 174


def test_the_interval_of_a_mean_is_that_of_the_central_limit() -> None:
    samples = np.random.default_rng(3).exponential(size=4000)
    value, low, high = mean_interval(samples, seed=0)
    half = 1.959964 * samples.std() / np.sqrt(4000)
    assert value == pytest.approx(samples.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=half * 0.1)


def test_resampling_in_parts_draws_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(1).normal(size=500)
    whole = mean_interval(samples, seed=0)
    monkeypatch.setattr("compress.numerics.calibration._CHUNK", 1200)
    parts = mean_interval(samples, seed=0)
    assert parts == pytest.approx(whole, abs=1e-12)


def test_two_thousand_rows_take_no_time() -> None:
    generator = np.random.default_rng(0)
    confidence, correct = generator.uniform(0.5, 1, 2000), generator.random(2000) < 0.8
    calibration_error_interval(confidence[:50], correct[:50], 0)
    # Of this process alone, since the machine may be busy; it takes about 0.04 s.
    began = time.process_time()
    calibration_error_interval(confidence, correct, 0)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("confidence", "correct"),
    [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([-0.1], [0]), ([np.nan], [1])],
)
def test_what_is_no_confidence_is_refused(confidence: list[float], correct: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        calibration_error(confidence, correct)
