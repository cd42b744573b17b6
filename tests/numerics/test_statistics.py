"""Intervals and tests of statistics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from compress.numerics.hypothesis_tests import (
    class_shares,
    gaussian_kernel,
    grown_means,
    holm,
    kolmogorov_smirnov,
    mean_discrepancy,
)
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


def test_pearson_and_its_interval_are_fishers() -> None:
    actual, targets = [1.0, 2.0, 3.0, 5.0, 4.0, 7.0], [1.0, 3.0, 2.0, 5.0, 6.0, 6.0]
    estimate = pearson(actual, targets)
    expected = np.corrcoef(actual, targets)[0, 1]
    assert estimate.value == pytest.approx(expected)
    width = 1.959964 / np.sqrt(3)
    assert estimate.low == pytest.approx(np.tanh(np.arctanh(expected) - width), abs=1e-6)
    assert estimate.high == pytest.approx(np.tanh(np.arctanh(expected) + width), abs=1e-6)


def test_spearman_is_pearson_of_ranks_with_ties_in_the_middle() -> None:
    actual, expected = [0.1, 0.4, 0.2, 9.0, 0.3], [1.0, 5.0, 5.0, 7.0, 2.0]
    estimate = spearman(actual, expected)
    assert estimate.value == pytest.approx(np.corrcoef([1, 4, 2, 5, 3], [1, 3.5, 3.5, 5, 2])[0, 1])
    assert estimate.low is not None and estimate.low < estimate.value


def test_a_perfect_correlation_has_no_width() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 3, 9]).low == 1


def test_differences_are_over_the_spread_of_what_is_expected() -> None:
    expected = np.array([[1.0, -1.0], [1.0, -1.0]])
    actual = np.array([[1.5, -1.0], [1.0, -2.0]])
    rms, largest, cosine = output_agreement(expected, actual)
    # The standard deviation is 1; differences are 0.5, 0, 0 and 1.
    assert rms == pytest.approx(np.sqrt(1.25 / 4))
    assert largest == pytest.approx(1.0)
    assert cosine == pytest.approx((2.5 / np.sqrt(2 * 3.25) + 3 / np.sqrt(2 * 5)) / 2)
    assert output_agreement(10 * expected, 10 * actual) == pytest.approx((rms, largest, cosine))
    assert output_agreement(expected, expected) == (0.0, 0.0, 1.0)


def test_a_constant_is_measured_by_its_magnitude_and_nothing_is_alike() -> None:
    assert output_agreement(np.full((2, 3), 4.0), np.full((2, 3), 5.0)).rms == pytest.approx(0.25)
    assert output_agreement(np.zeros((1, 2)), np.zeros((1, 2))) == (0.0, 0.0, 1.0)
    assert output_agreement(np.zeros((1, 2)), np.ones((1, 2))).cosine == 0.0


def test_outputs_of_other_sizes_lack_numbers_and_infinite_masks_agree() -> None:
    longer = output_agreement(np.array([[1.0, -1.0, np.nan]]), np.array([[1.0, -1.0, 2.0]]))
    assert longer.largest == pytest.approx(2.0 / np.array([1.0, -1.0, 0.0]).std())
    assert output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0]])).largest == pytest.approx(1.0)
    masked = output_agreement(np.array([[-np.inf, 1.0, -1.0]]), np.array([[-np.inf, 1.0, -0.5]]))
    assert masked.largest == pytest.approx(0.5)
    lost = output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0, np.inf]]))
    assert lost == (np.inf, np.inf, 0.0)


def test_p_values_are_the_share_of_all_splits_that_are_as_extreme() -> None:
    original, now = np.array([[0.1], [0.4], [0.2], [0.9], [0.3]]), np.array([[0.8], [1.4], [0.7], [0.35]])
    rows = np.concatenate([original, now])[:, 0]
    splits = [list(chosen) for chosen in combinations(range(9), 4)]
    grown = [rows[chosen].mean() - np.delete(rows, chosen).mean() for chosen in splits]
    exact = np.mean(np.array(grown) >= grown[-1] - 1e-12)

    actual = grown_means(original, now, seed=0)

    assert actual.p_values[0] == pytest.approx(exact, abs=4 * np.sqrt(exact / 500))
    assert actual.effects[0] == pytest.approx(grown[-1] / rows.std(), rel=1e-5)


def test_a_column_among_many_needs_more_than_one_alone() -> None:
    chance = np.random.default_rng(1)
    original, now = chance.normal(size=(80, 20)), chance.normal(size=(60, 20))
    now[:, 7] += 0.3
    known = stats.ttest_ind(now[:, 7], original[:, 7], alternative="greater").pvalue
    alone, together = grown_means(original[:, 7], now[:, 7], seed=0), grown_means(original, now, seed=0)
    assert alone.p_values[0] == pytest.approx(known, rel=0.4)
    # Of independent columns Sidak's correction is exact.
    assert together.p_values[7] == pytest.approx(1 - (1 - known) ** 20, rel=0.3)
    assert together.p_values.argmin() == 7


def test_what_is_the_same_everywhere_but_for_rounding_has_not_grown() -> None:
    original, now = np.full((40, 1), 6.27), np.full((30, 1), np.nextafter(6.27, 7))
    assert grown_means(original, now, seed=0) == (pytest.approx([0.0]), pytest.approx([1.0]))


def test_shares_of_classes_as_the_chi_square_distribution_has_them() -> None:
    original, now = np.repeat([0, 1, 2], [150, 100, 50]), np.repeat([0, 1, 2], [60, 55, 35])
    table = np.array([np.bincount(original, minlength=5), np.bincount(now, minlength=5)])[:, :3]
    known = stats.chi2_contingency(table, correction=False)
    actual = class_shares(original, now, 5, seed=0)
    assert actual.effect == pytest.approx(np.sqrt(known.statistic / table.sum()), rel=1e-5)
    assert actual.p_value == pytest.approx(known.pvalue, abs=0.03)


def test_the_discrepancy_is_that_of_the_paper() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.normal(size=(12, 3)), chance.normal(size=(9, 3)) + 1
    kernel = gaussian_kernel(np.concatenate([x, y]))
    xx, yy, xy = kernel[:12, :12], kernel[12:, 12:], kernel[:12, 12:]
    within = [(item.sum() - np.trace(item)) / (len(item) * (len(item) - 1)) for item in (xx, yy)]
    expected = sum(within) - 2 * xy.mean()
    spread = 1 - (kernel.sum() - 21) / (21 * 20)
    actual = mean_discrepancy(kernel, 12, seed=0)
    assert actual.effect == pytest.approx(expected / spread, rel=1e-4)
    assert actual.p_value < 0.01


def test_a_shift_of_no_mean_is_found_by_its_spread() -> None:
    chance = np.random.default_rng(0)
    rows = np.concatenate([chance.normal(size=(150, 4)), 2 * chance.normal(size=(100, 4))])
    assert mean_discrepancy(gaussian_kernel(rows), 150, seed=0).p_value < 0.005


def test_kolmogorov_smirnov_counts_small_samples_out() -> None:
    # All of 3 below all of 4: 2 of the 35 orders are as far apart.
    actual = kolmogorov_smirnov([1, 2, 3], [4, 5, 6, 7])
    assert actual == (1.0, pytest.approx(2 / 35))


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]).tolist() == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_alarms_of_one_source_are_as_rare_as_they_say() -> None:
    alarms = 0
    for number in range(60):
        chance = np.random.default_rng(number)
        rows, classes = chance.exponential(size=(90, 3)), chance.integers(0, 3, 90)
        p_values = [
            *grown_means(rows[:50], rows[50:], number).p_values,
            class_shares(classes[:50], classes[50:], 3, number).p_value,
            mean_discrepancy(gaussian_kernel(rows), 50, number).p_value,
        ]
        alarms += min(p_values[:3]) <= 0.1
        alarms += p_values[3] <= 0.1
        alarms += p_values[4] <= 0.1
    # 18 of 180 are expected; 99.9% of binomial draws are below.
    assert alarms <= stats.binom.ppf(0.999, 180, 0.1)
    assert alarms >= stats.binom.ppf(0.001, 180, 0.1)


@pytest.mark.parametrize("wrong", [[], [np.nan]])
def test_values_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        kolmogorov_smirnov(wrong, [1.0])
