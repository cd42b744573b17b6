"""Tests of confidence sequences and of hypothesis tests of distributions, against exact values and simulations."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import integrate, stats

from compress.plugins.monitoring.hypothesis_tests import (
    class_shares,
    gaussian_kernel,
    grown_means,
    holm,
    kolmogorov_smirnov,
    log_even_odds,
    log_wealth,
    mean_discrepancy,
    mean_sequence,
    median_sequence,
)


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.25])
def test_expected_wealth_is_one(mean: float) -> None:
    up = 0.3 + max(mean, 0)
    chances = {1: up, -1: up - mean, 0: 1 - 2 * up + mean}
    average = 0.0
    for outcomes in product(chances, repeat=5):
        counts = [outcomes.count(kind) for kind in (1, -1, 0)]
        likely = math.prod(chances[outcome] for outcome in outcomes)
        average += likely * math.exp(log_wealth(*counts, mean))
    assert average == pytest.approx(1.0, rel=1e-12)


def test_interval_contains_the_means_that_are_not_rejected() -> None:
    actual = mean_sequence(30, 12, 200)
    assert actual.value == pytest.approx(18 / 242)
    means = np.linspace(-0.99, 0.99, 1999)
    remaining = [mean for mean in means if log_wealth(30, 12, 200, float(mean)) < math.log(20)]
    assert (actual.low, actual.high) == (pytest.approx(remaining[0], abs=1e-3), pytest.approx(remaining[-1], abs=1e-3))
    assert np.diff(remaining).max() < 1.5e-3


def test_checking_after_every_outcome_is_rarely_wrong() -> None:
    wrong = 0
    for number in range(100):
        outcomes = np.random.default_rng(number).choice([1, -1, 0], size=400, p=[0.08, 0.08, 0.84])
        wins, losses = np.cumsum(outcomes == 1), np.cumsum(outcomes == -1)
        ties = np.arange(1, 401) - wins - losses
        counts = zip(wins.tolist(), losses.tolist(), ties.tolist(), strict=True)
        wrong += any(log_wealth(*item, 0.0) >= math.log(20) for item in counts)
    assert wrong <= 5


def test_even_odds_equal_the_integral_over_all_odds() -> None:
    mixture, _ = integrate.quad(lambda odds: odds**7 * (1 - odds) ** 3, 0, 1)
    assert math.exp(log_even_odds(7, 3)) == pytest.approx(2**10 * mixture)


def test_median_interval_is_infinite_below_eight_values() -> None:
    # 2^n / (n + 1) passes 20 at n = 8: 28.4.
    assert median_sequence([1.0] * 7) == (1.0, -math.inf, math.inf)
    assert median_sequence(list(range(1, 9))) == (4.5, 1.0, 8.0)
    with pytest.raises(ValueError, match="one or more"):
        median_sequence([])


def test_mean_of_no_outcomes_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more outcomes"):
        mean_sequence(0, 0, 0)


def test_p_value_equals_share_of_extreme_permutations() -> None:
    original, now = np.array([[0.1], [0.4], [0.2], [0.9], [0.3]]), np.array([[0.8], [1.4], [0.7], [0.35]])
    rows = np.concatenate([original, now])[:, 0]
    splits = [list(chosen) for chosen in combinations(range(9), 4)]
    grown = [rows[chosen].mean() - np.delete(rows, chosen).mean() for chosen in splits]
    exact = np.mean(np.array(grown) >= grown[-1] - 1e-12)

    actual = grown_means(original, now, seed=0)

    assert actual.p_values[0] == pytest.approx(exact, abs=4 * np.sqrt(exact / 500))
    assert actual.effects[0] == pytest.approx(grown[-1] / rows.std(), rel=1e-5)


def test_p_values_are_corrected_for_the_number_of_columns() -> None:
    chance = np.random.default_rng(1)
    original, now = chance.normal(size=(80, 20)), chance.normal(size=(60, 20))
    now[:, 7] += 0.3
    known = stats.ttest_ind(now[:, 7], original[:, 7], alternative="greater").pvalue
    alone, together = grown_means(original[:, 7], now[:, 7], seed=0), grown_means(original, now, seed=0)
    assert alone.p_values[0] == pytest.approx(known, rel=0.4)
    # Sidak's correction is exact for independent columns.
    assert together.p_values[7] == pytest.approx(1 - (1 - known) ** 20, rel=0.3)
    assert together.p_values.argmin() == 7


def test_rounding_differences_of_constants_are_no_growth() -> None:
    original, now = np.full((40, 1), 6.27), np.full((30, 1), np.nextafter(6.27, 7))
    assert grown_means(original, now, seed=0) == (pytest.approx([0.0]), pytest.approx([1.0]))


def test_class_shares_equal_the_chi_square_test() -> None:
    original, now = np.repeat([0, 1, 2], [150, 100, 50]), np.repeat([0, 1, 2], [60, 55, 35])
    table = np.array([np.bincount(original, minlength=5), np.bincount(now, minlength=5)])[:, :3]
    known = stats.chi2_contingency(table, correction=False)
    actual = class_shares(original, now, 5, seed=0)
    assert actual.effect == pytest.approx(np.sqrt(known.statistic / table.sum()), rel=1e-5)
    assert actual.p_value == pytest.approx(known.pvalue, abs=0.03)


def test_mean_discrepancy_equals_the_unbiased_estimator() -> None:
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


def test_change_of_variance_alone_is_detected() -> None:
    chance = np.random.default_rng(0)
    rows = np.concatenate([chance.normal(size=(150, 4)), 2 * chance.normal(size=(100, 4))])
    assert mean_discrepancy(gaussian_kernel(rows), 150, seed=0).p_value < 0.005


def test_kolmogorov_smirnov_is_exact_for_small_samples() -> None:
    # Three values are below four others: 2 of the 35 orders are as extreme.
    actual = kolmogorov_smirnov([1, 2, 3], [4, 5, 6, 7])
    assert actual == (1.0, pytest.approx(2 / 35))


def test_holm_correction_of_known_p_values() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]).tolist() == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_false_alarm_rate_equals_the_significance_level() -> None:
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
def test_empty_and_non_finite_values_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        kolmogorov_smirnov(wrong, [1.0])
