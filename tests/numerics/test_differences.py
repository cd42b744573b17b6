"""Tests of statistics for differences of outcomes and of weights."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from compress.numerics.differences import (
    allow_for,
    decide,
    difference_of_estimates,
    difference_of_shares,
    logarithm,
    mcnemar_mid_p,
    mcnemar_mid_p_one_sided,
    paired_bootstrap,
    paired_difference,
    relative,
    widen,
)
from compress.numerics.statistics import IntervalEstimate, wilson_interval


def error_rates(n: int, discordance: float, difference: float, confidence: float) -> tuple[float, float]:
    """Return exact probabilities that the interval lies entirely above, and entirely below, the true difference."""
    above = below = 0.0
    most = n if n <= 60 else int(discordance * n + 8 * math.sqrt(discordance * n) + 10)
    share = (discordance + difference) / 2 / discordance
    for either in range(most + 1):
        outer = binom.pmf(either, n, discordance)
        if outer < 1e-13:
            continue
        inner = binom.pmf(np.arange(either + 1), either, share)
        for only_candidate, probability in enumerate(inner):
            actual = difference_of_shares(either - only_candidate, only_candidate, n, confidence)
            above += outer * probability * (actual.low > difference)
            below += outer * probability * (actual.high < difference)
    return above, below


def test_interval_is_wald_with_half_an_observation_per_cell() -> None:
    # The same in matrix form: multinomial covariance of the four cells, each plus 1/2.
    only_baseline, only_candidate, n = 132, 107, 1600
    cells = np.array([1000, only_baseline, only_candidate, n - 1000 - only_baseline - only_candidate]) + 0.5
    shares = cells / cells.sum()
    covariance = (np.diag(shares) - np.outer(shares, shares)) / cells.sum()
    contrast = np.array([0, -1, 1, 0])
    centre, deviation = contrast @ shares, math.sqrt(contrast @ covariance @ contrast)
    z = norm.ppf(0.95)
    actual = difference_of_shares(only_baseline, only_candidate, n, 0.9)
    assert (actual.low, actual.high) == pytest.approx((centre - z * deviation, centre + z * deviation), rel=1e-12)


@pytest.mark.parametrize("discordance", [0.04, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("difference", [0.0, 0.02])
def test_coverage_of_50_examples(discordance: float, difference: float) -> None:
    above, below = error_rates(50, discordance, difference, 0.9)
    assert 1 - above - below >= 0.89
    assert max(above, below) <= 0.07


@pytest.mark.parametrize("discordance", [0.001, 0.003, 0.01, 0.03])
def test_false_alarms_of_2000_examples(discordance: float) -> None:
    above, below = error_rates(2000, discordance, 0.0, 0.9)
    assert max(above, below) <= 0.0501
    assert above == pytest.approx(below)


def test_one_point_drop_on_2000_rows_is_detected_without_false_alarm() -> None:
    generator = np.random.default_rng(3)
    actual = alarms = 0
    for _ in range(400):
        original = generator.random(2000) < 0.87
        lost, gained = generator.random(2000) < 0.0215, generator.random(2000) < 0.067
        dropped = np.where(original, ~lost, gained)  # 1.87 points lost, 0.87 points gained
        equal = np.where(original, ~(generator.random(2000) < 0.0129), generator.random(2000) < 0.0862)
        for after, is_drop in ((dropped, True), (equal, False)):
            effect = paired_difference(original, after, 0.9)
            worse = decide(IntervalEstimate(-effect.value, -effect.high, -effect.low), 0.005) == "worse"
            actual += worse and is_drop
            alarms += worse and not is_drop
    assert actual >= 0.8 * 400
    assert alarms <= 0.05 * 400


@given(st.integers(1, 300), st.data())
def test_interval_contains_the_estimate_and_is_antisymmetric(n: int, data: st.DataObject) -> None:
    only_baseline = data.draw(st.integers(0, n))
    only_candidate = data.draw(st.integers(0, n - only_baseline))
    confidence = data.draw(st.sampled_from([0.51, 0.8, 0.9, 0.99]))
    value, low, high = difference_of_shares(only_baseline, only_candidate, n, confidence)
    assert -1 <= low <= value <= high <= 1
    mirrored = difference_of_shares(only_candidate, only_baseline, n, confidence)
    assert mirrored == pytest.approx((-value, -high, -low))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [([1, 0], [1], "must pair"), ([], [], "at least one"), ([1, 2], [1, 0], "0 or 1"), ([1, math.nan], [1, 0], "NaN")],
)
def test_unpaired_outcomes_are_refused(before: list[float], after: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired_difference(before, after)


def test_impossible_counts_are_refused() -> None:
    for counts in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="counts"):
            difference_of_shares(*counts)
    with pytest.raises(ValueError, match="confidence"):
        difference_of_shares(0, 0, 5, 1.0)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 1), (9, 3), (12, 12), (130, 171), (0, 700)])
def test_mid_p_against_scipy(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    at = float(binom.pmf(only_a, n, 0.5))
    assert mcnemar_mid_p_one_sided(only_a, only_b) == pytest.approx(float(binom.sf(only_a - 1, n, 0.5)) - at / 2)
    exact = binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar_mid_p(only_a, only_b) == pytest.approx(min(1.0, exact - at) if only_a != only_b else 1.0)


def test_mid_p_of_a_published_table() -> None:
    # Airway hyper-responsiveness of 21 children, 7 against 1 (Fagerland, Lydersen and Laake 2013):
    # exact 0.070, mid-p 0.039.
    assert mcnemar_mid_p(7, 1) == pytest.approx(0.039, abs=5e-4)
    with pytest.raises(ValueError, match="counts"):
        mcnemar_mid_p(-1, 2)


def test_bootstrap_of_four_examples_against_every_resample() -> None:
    original, after = np.array([1.0, 2.0, 4.0, 8.0]), np.array([2.0, 2.0, 5.0, 6.0])

    def change(old: np.ndarray, new: np.ndarray) -> float:
        return float(new.mean() - old.mean())

    every = [change(original[list(chosen)], after[list(chosen)]) for chosen in itertools.product(range(4), repeat=4)]
    low, high = np.quantile(every, [0.05, 0.95])
    actual = paired_bootstrap(original, after, change, seed=1, resamples=20_000, confidence=0.9)
    assert actual.value == pytest.approx(0.0)
    assert (actual.low, actual.high) == pytest.approx((low, high), abs=0.26)
    apart = paired_bootstrap(original, after[::-1], change, seed=1, resamples=20_000, confidence=0.9)
    assert apart.high - apart.low > 2 * (actual.high - actual.low)
    with pytest.raises(ValueError, match="resample"):
        paired_bootstrap(original, after, change, seed=1, resamples=0)


def test_newcombes_method_10_of_his_published_example() -> None:
    # 56 of 70 against 48 of 80 (Newcombe 1998, example a, method 10): 0.0524 to 0.3339.
    shares = [IntervalEstimate(k / n, *wilson_interval(k, n, 0.95)) for k, n in ((48, 80), (56, 70))]
    assert difference_of_estimates(*shares) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_widening_and_logarithms() -> None:
    wide = widen(IntervalEstimate(1.0, 0.804, 1.392), 0.95, 0.99)
    assert wide == pytest.approx((1.0, 1 - 0.196 * 2.575829 / 1.959964, 1 + 0.392 * 2.575829 / 1.959964), rel=1e-6)
    assert relative(logarithm(IntervalEstimate(1.05, 1.0, 1.1))) == pytest.approx((0.05, 0.0, 0.1))
    assert allow_for(IntervalEstimate(0.0, -3.0, 6.0), 4.0) == pytest.approx((0.0, -5.0, math.hypot(6, 4)))
    with pytest.raises(ValueError, match="0 < low"):
        logarithm(IntervalEstimate(1.0, 0.0, 2.0))
