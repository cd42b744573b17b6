"""Tests of confidence intervals and statistical tests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy import stats

from compress.numerics.output_agreement import output_agreement
from compress.numerics.statistics import (
    bootstrap_interval,
    geometric_interval,
    median_interval,
    nested_quantile_intervals,
    pearson,
    spearman,
    t_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (81, 263), (1746, 2000), (9, 9), (0, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_bootstrap_agrees_with_scipy() -> None:
    samples = np.random.default_rng(1).gamma(2.0, size=80)
    expected = stats.bootstrap(
        (samples,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(2)
    ).confidence_interval
    actual = bootstrap_interval(samples, lambda x: float(x.mean()), seed=3, resamples=20000)
    width = expected.high - expected.low
    assert actual == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_bootstrap_repeats_with_its_seed() -> None:
    samples = np.random.default_rng(1).normal(size=30)
    mean: Callable[[np.ndarray], float] = lambda x: float(x.mean())  # noqa: E731
    assert bootstrap_interval(samples, mean, seed=5) == bootstrap_interval(samples, mean, seed=5)
    assert bootstrap_interval(samples, mean, seed=5) != bootstrap_interval(samples, mean, seed=6)


def quantile(samples: np.ndarray, q: float) -> float:
    return float(np.quantile(samples, q, method="inverted_cdf"))


@pytest.mark.parametrize("q", [0.25, 0.5, 0.9])
def test_cluster_bootstrap_of_one_group_matches_brute_force(q: float) -> None:
    clusters = [[1.0, 1.0, 3.0], [2.0, 4.0], [10.0, 0.5]]
    draws = product(range(3), repeat=3)
    actual = [quantile(np.concatenate([clusters[i] for i in draw]), q) for draw in draws]
    expected = np.quantile(actual, [0.1, 0.9], method="inverted_cdf")
    ((low, high),) = nested_quantile_intervals([clusters], [q], seed=0, resamples=6000, confidence=0.8)
    assert (low, high) == pytest.approx(tuple(expected))


def test_cluster_bootstrap_of_two_groups_matches_brute_force() -> None:
    groups = [[[0.0, 6.0], [1.0]], [[5.0], [7.0, 2.0, 3.0]]]
    actual = []
    for first, second in product(range(2), repeat=2):
        for inner in product(product(range(2), repeat=2), repeat=2):
            chosen = [groups[g][c] for g, draw in zip((first, second), inner, strict=True) for c in draw]
            actual.append(quantile(np.concatenate(chosen), 0.5))
    expected = np.quantile(actual, [0.1, 0.9], method="inverted_cdf")
    ((low, high),) = nested_quantile_intervals(groups, [0.5], seed=0, resamples=6000, confidence=0.8)
    assert (low, high) == pytest.approx(tuple(expected))


def test_bootstrap_accounts_for_cluster_and_group_correlation() -> None:
    generator = np.random.default_rng(0)
    clusters = [shift + 0.01 * generator.normal(size=50) for shift in generator.normal(size=40)]
    medians = [np.median(cluster) for cluster in clusters]
    # The median depends on 40 clusters, not 2,000 samples: its interval is as wide as that of cluster medians.
    expected = bootstrap_interval(medians, lambda x: quantile(x, 0.5), seed=0)
    for groups in ([clusters], [[cluster] for cluster in clusters]):
        ((low, high),) = nested_quantile_intervals(groups, [0.5], seed=0)
        assert high - low == pytest.approx(expected[1] - expected[0], rel=0.15)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_geometric_interval_is_the_t_interval_of_logarithms(confidence: float) -> None:
    samples = np.random.default_rng(3).lognormal(0.2, 0.1, 9)
    logs = np.log(samples)
    low, high = stats.t.interval(confidence, 8, loc=logs.mean(), scale=stats.sem(logs))
    expected = (stats.gmean(samples), np.exp(low), np.exp(high))
    assert geometric_interval(samples, confidence) == pytest.approx(expected, rel=1e-12)


def test_t_interval_agrees_with_scipy() -> None:
    samples = np.random.default_rng(3).normal(5, 2, 9)
    expected = stats.t.interval(0.9, 8, samples.mean(), stats.sem(samples))
    assert t_interval(samples, 0.9) == pytest.approx(expected)
    with pytest.raises(ValueError, match="two samples"):
        t_interval([1.0])


@pytest.mark.parametrize("samples", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_geometric_interval_needs_two_positive_samples(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="two positive samples"):
        geometric_interval(samples)


@pytest.mark.parametrize("n", [7, 31, 200, 3000])
def test_median_interval_has_binomial_coverage(n: int) -> None:
    low, high = median_interval(np.arange(1.0, n + 1))
    k = int(low)
    assert high == n + 1 - k
    assert 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95


def test_median_interval_refuses_five_samples() -> None:
    with pytest.raises(ValueError, match="too few"):
        median_interval([1, 2, 3, 4, 5])


def test_pearson_interval_is_that_of_fisher() -> None:
    actual, targets = [1.0, 2.0, 3.0, 5.0, 4.0, 7.0], [1.0, 3.0, 2.0, 5.0, 6.0, 6.0]
    estimate = pearson(actual, targets)
    expected = np.corrcoef(actual, targets)[0, 1]
    assert estimate.value == pytest.approx(expected)
    width = 1.959964 / np.sqrt(3)
    assert estimate.low == pytest.approx(np.tanh(np.arctanh(expected) - width), abs=1e-6)
    assert estimate.high == pytest.approx(np.tanh(np.arctanh(expected) + width), abs=1e-6)


def test_spearman_is_pearson_of_average_ranks() -> None:
    actual, expected = [0.1, 0.4, 0.2, 9.0, 0.3], [1.0, 5.0, 5.0, 7.0, 2.0]
    estimate = spearman(actual, expected)
    assert estimate.value == pytest.approx(np.corrcoef([1, 4, 2, 5, 3], [1, 3.5, 3.5, 5, 2])[0, 1])
    assert estimate.low is not None and estimate.low < estimate.value


def test_interval_of_perfect_correlation_has_zero_width() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 3, 9]).low == 1


def test_differences_are_relative_to_expected_standard_deviation() -> None:
    expected = np.array([[1.0, -1.0], [1.0, -1.0]])
    actual = np.array([[1.5, -1.0], [1.0, -2.0]])
    rms, largest, cosine = output_agreement(expected, actual)
    # The standard deviation is 1; differences are 0.5, 0, 0 and 1.
    assert rms == pytest.approx(np.sqrt(1.25 / 4))
    assert largest == pytest.approx(1.0)
    assert cosine == pytest.approx((2.5 / np.sqrt(2 * 3.25) + 3 / np.sqrt(2 * 5)) / 2)
    assert output_agreement(10 * expected, 10 * actual) == pytest.approx((rms, largest, cosine))
    assert output_agreement(expected, expected) == (0.0, 0.0, 1.0)


def test_difference_of_constant_is_relative_to_its_magnitude() -> None:
    assert output_agreement(np.full((2, 3), 4.0), np.full((2, 3), 5.0)).rms == pytest.approx(0.25)
    assert output_agreement(np.zeros((1, 2)), np.zeros((1, 2))) == (0.0, 0.0, 1.0)
    assert output_agreement(np.zeros((1, 2)), np.ones((1, 2))).cosine == 0.0


def test_nan_and_missing_outputs_count_as_zero_and_equal_infinities_agree() -> None:
    longer = output_agreement(np.array([[1.0, -1.0, np.nan]]), np.array([[1.0, -1.0, 2.0]]))
    assert longer.largest == pytest.approx(2.0 / np.array([1.0, -1.0, 0.0]).std())
    assert output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0]])).largest == pytest.approx(1.0)
    masked = output_agreement(np.array([[-np.inf, 1.0, -1.0]]), np.array([[-np.inf, 1.0, -0.5]]))
    assert masked.largest == pytest.approx(0.5)
    lost = output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0, np.inf]]))
    assert lost == (np.inf, np.inf, 0.0)
