"""Tests that may be looked at at any time: their wealth is fair, their intervals are the means it does not refute."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate

from compress.numerics.anytime import log_even_odds, log_wealth, mean_sequence, median_sequence


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
