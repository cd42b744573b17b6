"""Tests of change point detection: known series, brute force, and error rates on simulated noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compress.plugins.nightly.changepoint import (
    autocorrelation,
    change_points,
    noise_scale,
    segment,
    t_test,
    without_outliers,
)

# Annual flow of the Nile at Aswan, 1871 to 1970, in 10^8 m³ (Cobb 1978, Biometrika 65:243; R's dataset `Nile`).
NILE = [
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969, 831,
    726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759, 781, 865, 845,
    944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890, 744, 749, 838, 1050, 918,
    986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
]  # fmt: skip


def test_nile_series_changes_after_1898() -> None:
    # The known change: the construction of the dam began in 1898, the 28th year of the series.
    (change,) = change_points(NILE)
    assert 1871 + change.position == 1899
    assert (change.before, change.after) == (np.median(NILE[:28]), np.median(NILE[28:]))


def brute_force(values: list[float], penalty: float) -> float:
    """Return the least cost of all segmentations into parts of at least three values."""
    n, best = len(values), math.inf
    for count in range(n // 3):
        for bounds in itertools.combinations(range(3, n - 2), count):
            edges = [0, *bounds, n]
            parts = [values[a:b] for a, b in itertools.pairwise(edges)]
            if all(len(part) >= 3 for part in parts):
                cost = sum(sum((v - sum(part) / len(part)) ** 2 for v in part) + penalty for part in parts)
                best = min(best, cost)
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=6, max_size=12), st.sampled_from([0.5, 5.0, 60.0]))
def test_segmentation_equals_brute_force_optimum(values: list[int], penalty: float) -> None:
    floats = [float(value) for value in values]
    edges = [0, *segment(np.array(floats), penalty), len(floats)]
    parts = [floats[a:b] for a, b in itertools.pairwise(edges)]
    assert all(len(part) >= 3 for part in parts)
    cost = sum(float(np.var(part)) * len(part) + penalty for part in parts)
    assert cost == pytest.approx(brute_force(floats, penalty), abs=1e-8)


def test_t_pools_the_variance_of_all_levels() -> None:
    # Parts (0, 2, 1), (5, 7, 6), (9, 11, 10): within sum of squares 6, freedom 6, s = 1, t = 5 / sqrt(2/3).
    values = np.array([0, 2, 1, 5, 7, 6, 9, 11, 10], dtype=float)
    assert t_test(values, [0, 3, 6, 9], 1) == pytest.approx(2 * stats.t.sf(5 / math.sqrt(2 / 3), 6))
    # A correlation of 0.6 makes the error √(1.6 / 0.4) = 2 times as large.
    assert t_test(values, [0, 3, 6, 9], 1, 0.6) == pytest.approx(2 * stats.t.sf(2.5 / math.sqrt(2 / 3), 6))


def test_noise_scale_ignores_a_step() -> None:
    noise = np.random.default_rng(5).normal(0, 0.02, 4000)
    assert noise_scale(noise) == pytest.approx(0.02, rel=0.05)
    noise[2000:] += 5.0
    assert noise_scale(noise) == pytest.approx(0.02, rel=0.05)


def test_autocorrelation_ignores_a_step() -> None:
    random = np.random.default_rng(11)
    series = np.zeros(40_000)
    for index in range(1, len(series)):
        series[index] = 0.5 * series[index - 1] + random.normal()
    series[20_000:] += 40
    assert autocorrelation(series) == pytest.approx(0.5, abs=0.03)
    assert autocorrelation(random.normal(size=40_000)) < 0.03


def test_outliers_are_clipped_and_steps_are_kept() -> None:
    values = np.array([1.0, 9.0, 0.9, 1.1, 1.0, 1.05, 5.0, 5.1, 4.9, 5.0])
    # The 9 is clipped to three scales above 1.0, the median of the first five; the step at the seventh value stays.
    assert without_outliers(values, 0.1).tolist() == pytest.approx([1.0, 1.3, *values[2:]])


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 5, [1, 1, 1, 2, 2], [3.0] * 50])
def test_too_few_or_constant_values_have_no_change(values: list[float]) -> None:
    assert change_points(values) == []


def test_change_of_a_constant_is_detected_after_three_values() -> None:
    level = [5_120_000.0] * 12
    assert change_points([*level, 5_130_000.0, 5_130_000.0]) == []
    (change,) = change_points([*level, *[5_130_000.0] * 3])
    assert (change.position, change.before, change.after) == (12, 5_120_000.0, 5_130_000.0)


def test_two_outliers_in_a_row_are_no_change_and_hide_none() -> None:
    random = np.random.default_rng(2)
    values = random.normal(0, 0.01, 40)
    values[[10, 11, 25]] += 0.5
    assert change_points(values) == []
    values[34:] += 0.05
    assert [change.position for change in change_points(values)] == [34]


def test_repaired_regression_is_two_changes() -> None:
    values = np.random.default_rng(4).normal(0, 0.01, 60)
    values[20:32] += 0.06
    assert [change.position for change in change_points(values)] == [20, 32]


def test_non_finite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        change_points([1.0] * 8 + [math.nan])
    with pytest.raises(ValueError, match="finite"):
        change_points([1.0] * 8 + [math.inf])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
def test_change_points_do_not_depend_on_scale_and_offset(seed: int, factor: float, shift: float) -> None:
    values = np.random.default_rng(seed).normal(0, 1, 30)
    values[18:] += 6.0
    places = [change.position for change in change_points(values)]
    assert places
    assert [change.position for change in change_points(values * factor + shift)] == places


def noise(kind: str, random: np.random.Generator, n: int) -> np.ndarray:
    """Return n values of 1% noise: normal, heavy-tailed, correlated, or with 5% disturbed values."""
    series = random.normal(0, 0.01, n)
    match kind:
        case "heavy tails":
            series = random.standard_t(3, n) * 0.01 / math.sqrt(3)
        case "disturbed":
            series += (random.random(n) < 0.05) * random.uniform(0.05, 0.3, n)
        case "correlated":
            for index in range(1, n):
                series[index] = 0.3 * series[index - 1] + math.sqrt(0.91) * series[index]
    return series


@pytest.mark.parametrize(("kind", "most"), [("normal", 1), ("heavy tails", 1), ("disturbed", 1), ("correlated", 6)])
def test_false_alarms_on_stationary_series(kind: str, most: int) -> None:
    # 150 series of 120 nights, each checked on eight of them; correlated noise is the hardest.
    random = np.random.default_rng(1)
    alarms = 0
    for _ in range(150):
        series = noise(kind, random, 120)
        alarms += any(change_points(series[:night]) for night in range(15, 121, 15))
    assert alarms <= most


@pytest.mark.parametrize(
    ("step", "kind", "share"), [(0.05, "normal", 0.9), (0.04, "normal", 0.8), (0.05, "disturbed", 0.75)]
)
def test_step_is_detected_within_five_nights(step: float, kind: str, share: float) -> None:
    random = np.random.default_rng(1)
    actual = 0
    for _ in range(100):
        series = noise(kind, random, 45)
        series[40:] += step
        changes = change_points(series)
        actual += bool(changes) and abs(changes[-1].position - 40) <= 1 and changes[-1].after > changes[-1].before
    assert actual >= share * 100
