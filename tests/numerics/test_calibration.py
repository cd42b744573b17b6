"""Tests of calibration of probabilities, activation ranges and saturation of integer sums."""

from __future__ import annotations

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
from compress.numerics.int8_activations import (
    Histogram,
    cut_pairs,
    find_range,
    pairs_at_risk,
    pairwise_saturating,
    round_to_levels,
    squared_error,
    without_saturation,
)

# Bins of width 0.2: 0.55 and 0.60 in (0.4, 0.6], 0.65 in (0.6, 0.8], 0.9 and 1.0 in (0.8, 1].
CONFIDENCE = [0.55, 0.60, 0.65, 0.9, 1.0]
CORRECT = [1, 0, 0, 1, 1]


def test_bins_of_five_rows() -> None:
    actual = calibration_bins(CONFIDENCE, CORRECT, bins=5)
    assert [bin.rows for bin in actual] == [2, 1, 2]
    assert [bin.low for bin in actual] == pytest.approx([0.4, 0.6, 0.8])
    assert [bin.high for bin in actual] == pytest.approx([0.6, 0.8, 1.0])
    assert [bin.confidence for bin in actual] == pytest.approx([0.575, 0.65, 0.95])
    assert [bin.accuracy for bin in actual] == [0.5, 0.0, 1.0]


def test_calibration_error_of_five_rows_matches_hand_computation() -> None:
    # 2/5 |0.5 - 0.575| + 1/5 |0 - 0.65| + 2/5 |1 - 0.95|
    assert calibration_error(CONFIDENCE, CORRECT, bins=5) == pytest.approx(0.03 + 0.13 + 0.02)


def test_bin_edge_belongs_to_the_lower_bin() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point.
    edges = np.arange(1, 101) / 100
    assert [bin.high for bin in calibration_bins(edges, np.ones(100), bins=100)] == pytest.approx(edges)


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_score_equals_scikit_learn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    probabilities = softmax(generator.normal(size=(300, classes)))
    labels = generator.integers(0, classes, 300)
    expected = brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
    assert brier_scores(probabilities, labels).mean() == pytest.approx(expected, rel=1e-12)


def test_softmax_of_large_logits() -> None:
    assert softmax([[1000.0, 1000.0 + np.log(3)]])[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_softmax_refuses_non_finite_values(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        softmax([[0.0, bad]])


@pytest.mark.parametrize("overconfidence", [0.0, 0.05, 0.1])
def test_interval_covers_the_true_calibration_error(overconfidence: float) -> None:
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


def test_interval_of_a_mean_matches_the_central_limit_theorem() -> None:
    samples = np.random.default_rng(3).exponential(size=4000)
    value, low, high = mean_interval(samples, seed=0)
    half = 1.959964 * samples.std() / np.sqrt(4000)
    assert value == pytest.approx(samples.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=half * 0.1)


def test_chunked_resampling_draws_equally_many(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(1).normal(size=500)
    whole = mean_interval(samples, seed=0)
    monkeypatch.setattr("compress.numerics.calibration._CHUNK", 1200)
    parts = mean_interval(samples, seed=0)
    assert parts == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct"), [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([-0.1], [0]), ([np.nan], [1])]
)
def test_invalid_confidences_are_refused(confidence: list[float], correct: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        calibration_error(confidence, correct)


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def heavy_tailed(count: int = 40_000) -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, count).astype(np.float32)


def test_histogram_ends_are_exact_and_counts_survive_growth():
    values = heavy_tailed()
    parts = np.array_split(np.sort(np.abs(values)) * np.sign(values), 7)
    grown, at_once = histogram_of(*parts), histogram_of(np.concatenate(parts))
    assert grown.low == np.concatenate(parts).min() and grown.high == np.concatenate(parts).max()
    assert grown.limit == at_once.limit and grown.counts.sum() == len(values)
    np.testing.assert_array_equal(grown.counts, at_once.counts)


def test_minmax_range_includes_zero():
    assert find_range(histogram_of(np.array([2.0, 5.0])), "minmax") == (0.0, 5.0)
    assert find_range(histogram_of(np.array([-3.0, -1.0])), "minmax") == (-3.0, 0.0)


def test_percentile_matches_numpy_within_a_bin():
    values = heavy_tailed()
    histogram = histogram_of(values)
    low, high = find_range(histogram, "percentile", 99.0)
    width = histogram.limit / 4096
    assert low == pytest.approx(np.percentile(values, 0.5), abs=1.5 * width)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=1.5 * width)


def test_mse_range_is_close_to_optimal():
    values = heavy_tailed()
    low, high = find_range(histogram_of(values), "mse")

    def error(ends: tuple[float, float]) -> float:
        return float(np.square(round_to_levels(values, *ends) - values).mean())

    shares = np.linspace(0.2, 1, 33)
    best = min(error((a * values.min(), b * values.max())) for a in shares for b in shares)
    assert error((low, high)) < 1.05 * best
    assert error((low, high)) < 0.95 * error((values.min(), values.max()))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_all_zero_activations_have_an_empty_range(method: str):
    histogram = histogram_of(np.zeros(10))
    assert find_range(histogram, method) == (0.0, 0.0) and histogram.constant  # type: ignore[arg-type]


def test_squared_error_of_histogram_matches_the_values():
    values = np.array([-1.0, -0.5, 0.0, 0.3, 2.5, 9.0])
    restored = np.array([-1.0, -0.5, 0.0, 0.3, 2.5, 4.1])
    # 255 steps of 0.02 from -1: 4.1 is the highest.
    assert round_to_levels(values, -1.0, 4.1) == pytest.approx(restored)
    assert squared_error(np.ones(6), values, -1.0, 4.1) == pytest.approx(4.9**2)


def by_hand(activations: np.ndarray, weights: np.ndarray) -> tuple[list[list[int]], int]:
    cut, rows = 0, []
    for row in activations.tolist():
        out = []
        for column in weights.T.tolist():
            total = 0
            for index in range(0, len(row), 2):
                pair = sum(a * w for a, w in zip(row[index : index + 2], column[index : index + 2], strict=True))
                remaining = max(-32768, min(32767, pair))
                cut += remaining != pair
                total += remaining
            out.append(total)
        rows.append(out)
    return rows, cut


def test_products_saturate_as_the_instruction_does():
    generator = np.random.default_rng(0)
    for inner in (1, 2, 7, 12):
        activations = generator.integers(0, 256, (5, inner), dtype=np.uint8)
        weights = generator.integers(-128, 128, (inner, 6)).astype(np.int8)
        expected, cut = by_hand(activations, weights)
        actual, counted = pairwise_saturating(activations, weights)
        assert actual.tolist() == expected and counted == cut
    assert cut > 0 and (actual != activations.astype(int) @ weights.astype(int)).any()


def test_seven_bits_never_saturate_and_eight_can():
    full, reduced = np.full((4, 3), 127, np.int8), np.full((4, 3), 64, np.int8)
    most = np.full((2, 4), 255, np.uint8)
    assert pairs_at_risk(full) == 1.0 and pairs_at_risk(reduced) == 0.0
    assert pairwise_saturating(most, reduced)[1] == 0
    actual, cut = pairwise_saturating(most, full)
    assert (actual == 2 * 32767).all() and cut == 12
    # Only pairs of one sign add up: +127 beside -127 cancels.
    mixed = np.array([[127], [-127], [127], [127]], np.int8)
    assert pairs_at_risk(mixed) == 0.5


def full_range(weights: np.ndarray) -> np.ndarray:
    return (np.abs(weights).max(axis=0) / 127).astype(np.float32)


@pytest.mark.parametrize("inner", [1, 2, 33, 384])
def test_narrowed_weights_never_saturate(inner: int):
    generator = np.random.default_rng(inner)
    weights = generator.normal(size=(inner, 24)).astype(np.float32)
    integers, scales = without_saturation(weights, full_range(weights))
    # The worst that can come in: 255 wherever a column is positive, or wherever it is negative.
    worst = np.concatenate([255 * (integers.T > 0), 255 * (integers.T < 0)]).astype(np.uint8)
    actual, cut = pairwise_saturating(worst, integers)
    assert cut == 0 and pairs_at_risk(integers) == 0
    np.testing.assert_array_equal(actual, worst.astype(int) @ integers.astype(int))
    assert integers.min() >= -127 and (scales >= full_range(weights)).all()


def test_narrowed_weights_lose_less_than_seven_bits():
    weights = np.random.default_rng(0).normal(size=(384, 256)).astype(np.float32)
    weights[:, 0], weights[0, 0] = weights[:, 0] / 100, weights[0, 0]  # one outlier, and nothing beside it
    scales, coarse = full_range(weights), (np.abs(weights).max(axis=0) / 64).astype(np.float32)
    eight, seven = (weights / scales).round(), (weights / coarse).round()
    integers, flat = without_saturation(weights, scales)
    assert pairs_at_risk(eight.astype(np.int8)) > 0.01
    lost = [np.square(weights - item).sum() for item in (eight * scales, integers * flat, seven * coarse)]
    assert lost[0] < lost[1] < 0.5 * lost[2]
    np.testing.assert_array_equal(integers[:, 0], eight[:, 0])
    assert flat[0] == scales[0]


def test_per_tensor_scale_stays_per_tensor():
    weights = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    weights[:2, 0] = 4.5
    scale = np.array([np.abs(weights).max() / 127], np.float32)
    assert pairs_at_risk((weights / scale).round().astype(np.int8)) > 0
    integers, flat = without_saturation(weights, scale)
    assert flat.shape == (1,) and pairs_at_risk(integers) == 0


def test_each_of_a_pair_is_reduced_by_half_the_excess():
    pairs = np.array([[127, 100, -127, 127, 64], [5, 100, -3, -127, 64]], np.int8)
    assert cut_pairs(pairs).tolist() == [[125, 64, -126, 127, 64], [3, 64, -2, -127, 64]]
    assert cut_pairs(np.full((3, 1), 127, np.int8)).tolist() == [[64], [64], [127]]
