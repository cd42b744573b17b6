from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy import stats

from compress.numerics.statistics import (
    bootstrap_interval,
    geometric_interval,
    median_interval,
    nested_quantile_intervals,
    t_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 10), (81, 263), (1746, 2000), (9, 9), (0, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_gives_the_published_interval() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263 and 15 of 148.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


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
def test_one_group_is_the_brute_force_over_all_draws_of_its_clusters(q: float) -> None:
    clusters = [[1.0, 1.0, 3.0], [2.0, 4.0], [10.0, 0.5]]
    draws = product(range(3), repeat=3)
    actual = [quantile(np.concatenate([clusters[i] for i in draw]), q) for draw in draws]
    expected = np.quantile(actual, [0.1, 0.9], method="inverted_cdf")
    ((low, high),) = nested_quantile_intervals([clusters], [q], seed=0, resamples=6000, confidence=0.8)
    assert (low, high) == pytest.approx(tuple(expected))


def test_groups_are_the_brute_force_over_all_draws_of_both() -> None:
    groups = [[[0.0, 6.0], [1.0]], [[5.0], [7.0, 2.0, 3.0]]]
    actual = []
    for first, second in product(range(2), repeat=2):
        for inner in product(product(range(2), repeat=2), repeat=2):
            chosen = [groups[g][c] for g, draw in zip((first, second), inner, strict=True) for c in draw]
            actual.append(quantile(np.concatenate(chosen), 0.5))
    expected = np.quantile(actual, [0.1, 0.9], method="inverted_cdf")
    ((low, high),) = nested_quantile_intervals(groups, [0.5], seed=0, resamples=6000, confidence=0.8)
    assert (low, high) == pytest.approx(tuple(expected))


def test_the_bootstrap_sees_what_a_cluster_and_a_group_share() -> None:
    generator = np.random.default_rng(0)
    clusters = [shift + 0.01 * generator.normal(size=50) for shift in generator.normal(size=40)]
    medians = [np.median(cluster) for cluster in clusters]
    # The median rests on 40 clusters, not on 2,000 samples: as wide as that of the clusters' medians.
    expected = bootstrap_interval(medians, lambda x: quantile(x, 0.5), seed=0)
    for groups in ([clusters], [[cluster] for cluster in clusters]):
        ((low, high),) = nested_quantile_intervals(groups, [0.5], seed=0)
        assert high - low == pytest.approx(expected[1] - expected[0], rel=0.15)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_geometric_interval_is_the_t_interval_of_the_logarithms(confidence: float) -> None:
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


@pytest.mark.parametrize(
    ("n", "ranks"),
    # Conover 1999 and the usual sign-test tables: ranks of the 95% interval of a median.
    [(6, (1, 6)), (9, (2, 8)), (10, (2, 9)), (15, (4, 12)), (20, (6, 15)), (25, (8, 18)), (50, (18, 33))],
)
def test_median_interval_has_the_tabulated_ranks(n: int, ranks: tuple[int, int]) -> None:
    samples = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert median_interval(samples) == ranks


@pytest.mark.parametrize("n", [7, 31, 200, 3000])
def test_median_interval_covers_by_the_binomial_law(n: int) -> None:
    low, high = median_interval(np.arange(1.0, n + 1))
    k = int(low)
    assert high == n + 1 - k
    assert 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95


def test_median_interval_refuses_five_samples() -> None:
    with pytest.raises(ValueError, match="too few"):
        median_interval([1, 2, 3, 4, 5])
