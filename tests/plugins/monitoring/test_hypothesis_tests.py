"""Intervals that hold at any time, and tests of distributions."""

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
def test_the_wealth_is_on_average_what_it_was(mean: float) -> None:
    up = 0.3 + max(mean, 0)
    chances = {1: up, -1: up - mean, 0: 1 - 2 * up + mean}
    average = 0.0
    for outcomes in product(chances, repeat=5):
        counts = [outcomes.count(kind) for kind in (1, -1, 0)]
        likely = math.prod(chances[outcome] for outcome in outcomes)
        average += likely * math.exp(log_wealth(*counts, mean))
    assert average == pytest.approx(1.0, rel=1e-12)


def test_an_interval_holds_the_means_that_are_not_refuted() -> None:
    actual = mean_sequence(30, 12, 200)
    assert actual.value == pytest.approx(18 / 242)
    means = np.linspace(-0.99, 0.99, 1999)
    remaining = [mean for mean in means if log_wealth(30, 12, 200, float(mean)) < math.log(20)]
    assert (actual.low, actual.high) == (pytest.approx(remaining[0], abs=1e-3), pytest.approx(remaining[-1], abs=1e-3))
    assert np.diff(remaining).max() < 1.5e-3


def test_looking_after_every_outcome_is_wrong_seldom() -> None:
    wrong = 0
    for number in range(100):
        outcomes = np.random.default_rng(number).choice([1, -1, 0], size=400, p=[0.08, 0.08, 0.84])
        wins, losses = np.cumsum(outcomes == 1), np.cumsum(outcomes == -1)
        ties = np.arange(1, 401) - wins - losses
        counts = zip(wins.tolist(), losses.tolist(), ties.tolist(), strict=True)
        wrong += any(log_wealth(*item, 0.0) >= math.log(20) for item in counts)
    assert wrong <= 5


def test_even_odds_are_the_mixture_of_all_odds() -> None:
    mixture, _ = integrate.quad(lambda odds: odds**7 * (1 - odds) ** 3, 0, 1)
    assert math.exp(log_even_odds(7, 3)) == pytest.approx(2**10 * mixture)


def test_a_median_is_unknown_until_eight_say_the_same() -> None:
    # 2^n / (n + 1) passes 20 at n = 8: 28.4.
    assert median_sequence([1.0] * 7) == (1.0, -math.inf, math.inf)
    assert median_sequence(list(range(1, 9))) == (4.5, 1.0, 8.0)
    with pytest.raises(ValueError, match="one or more"):
        median_sequence([])


def test_no_outcome_is_no_mean() -> None:
    with pytest.raises(ValueError, match="one or more outcomes"):
        mean_sequence(0, 0, 0)


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
