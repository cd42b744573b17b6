from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy import stats

from compress.numerics.statistics import (
    bootstrap_interval,
    clustered_bootstrap_intervals,
    mcnemar,
    median_interval,
    paired_ratio_interval,
    round_ratios,
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
    found = bootstrap_interval(samples, lambda x: float(x.mean()), seed=3, resamples=20000)
    width = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_bootstrap_repeats_with_its_seed() -> None:
    samples = np.random.default_rng(1).normal(size=30)
    mean: Callable[[np.ndarray], float] = lambda x: float(x.mean())  # noqa: E731
    assert bootstrap_interval(samples, mean, seed=5) == bootstrap_interval(samples, mean, seed=5)
    assert bootstrap_interval(samples, mean, seed=5) != bootstrap_interval(samples, mean, seed=6)


def test_clustered_bootstrap_is_the_brute_force_over_all_draws_of_clusters() -> None:
    clusters = [[1.0, 1.0], [2.0, 4.0], [10.0, 10.0]]
    means = [np.mean([clusters[i] for i in draw]) for draw in product(range(3), repeat=3)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    ((low, high),) = clustered_bootstrap_intervals(clusters, lambda x: [float(x.mean())], seed=0, resamples=4000)
    assert (low, high) == pytest.approx(tuple(expected))


def test_clustered_bootstrap_sees_what_a_cluster_shares() -> None:
    generator = np.random.default_rng(0)
    clusters = [shift + 0.01 * generator.normal(size=50) for shift in generator.normal(size=20)]
    mean: Callable[[np.ndarray], float] = lambda x: float(x.mean())  # noqa: E731
    ((low, high),) = clustered_bootstrap_intervals(clusters, lambda x: [mean(x)], seed=0)
    naive = bootstrap_interval(np.concatenate(clusters), mean, seed=0)
    # The variance of the mean rests on 20 clusters, not on 1,000 samples: sqrt(50) = 7 times wider.
    assert high - low == pytest.approx(7.07 * (naive[1] - naive[0]), rel=0.2)


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


def test_paired_ratio_ignores_a_drift_that_slows_both() -> None:
    drift = np.linspace(1.0, 3.0, 12)
    baseline = [np.array([8.0, 10.0, 12.0]) * d for d in drift]
    candidate = [np.array([4.0, 5.0, 60.0]) * d for d in drift]
    assert paired_ratio_interval(baseline, candidate) == pytest.approx((2.0, 2.0, 2.0))


def test_paired_ratio_interval_is_that_of_the_ratios() -> None:
    generator = np.random.default_rng(4)
    baseline, candidate = generator.gamma(9, size=(2, 15, 5))
    ratios = np.median(baseline, axis=1) / np.median(candidate, axis=1)
    found = paired_ratio_interval(list(baseline), list(candidate))
    ordered = np.sort(ratios)
    assert found == pytest.approx((np.median(ratios), ordered[3], ordered[11]))


def test_rounds_must_pair_and_be_finite() -> None:
    with pytest.raises(ValueError, match="pair"):
        round_ratios([[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="NaN"):
        round_ratios([[1.0]], [[float("nan")]])
    with pytest.raises(ValueError, match="positive"):
        round_ratios([[1.0]], [[0.0]])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 5), (5, 0), (10, 10), (3, 15), (121, 59), (70, 80)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = 1.0 if only_a + only_b == 0 else stats.binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="counts"):
        mcnemar(-1, 3)
