"""Ranges of 8 bits: exact ends, percentiles of numpy, and least errors found by trying every range."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from compress.numerics.activation_range import LEVELS, Histogram, find_range, round_to_levels, squared_error


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def heavy_tailed(count: int = 40_000) -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, count).astype(np.float32)


def test_ends_are_exact_and_counts_survive_growing():
    values = heavy_tailed()
    parts = np.array_split(np.sort(np.abs(values)) * np.sign(values), 7)
    grown, at_once = histogram_of(*parts), histogram_of(np.concatenate(parts))
    assert grown.low == np.concatenate(parts).min() and grown.high == np.concatenate(parts).max()
    assert grown.limit == at_once.limit and grown.counts.sum() == len(values)
    np.testing.assert_array_equal(grown.counts, at_once.counts)


def test_minmax_is_the_range_with_zero_in_it():
    assert find_range(histogram_of(np.array([2.0, 5.0])), "minmax") == (0.0, 5.0)
    assert find_range(histogram_of(np.array([-3.0, -1.0])), "minmax") == (-3.0, 0.0)


def test_percentile_is_numpys_within_a_bin():
    values = heavy_tailed()
    histogram = histogram_of(values)
    low, high = find_range(histogram, "percentile", 99.0)
    width = histogram.limit / 4096
    assert low == pytest.approx(np.percentile(values, 0.5), abs=1.5 * width)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=1.5 * width)


def test_mse_comes_near_the_best_of_every_range():
    values = heavy_tailed()
    low, high = find_range(histogram_of(values), "mse")

    def error(ends: tuple[float, float]) -> float:
        return float(np.square(round_to_levels(values, *ends) - values).mean())

    shares = np.linspace(0.2, 1, 33)
    best = min(error((a * values.min(), b * values.max())) for a in shares for b in shares)
    assert error((low, high)) < 1.05 * best
    assert error((low, high)) < 0.95 * error((values.min(), values.max()))


def test_entropy_cuts_an_outlier_off_and_keeps_what_is_even():
    even = np.linspace(-1, 1, 60_000)
    assert find_range(histogram_of(even), "entropy") == pytest.approx((-1, 1), abs=0.03)
    bell = np.random.default_rng(1).normal(size=60_000)
    low, high = find_range(histogram_of(bell, np.array([12.0])), "entropy")
    assert low < -3 and 3 < high < 6


def test_entropy_is_less_than_that_of_the_whole_range():
    # The divergence by scipy, over levels: what 256 levels of the range make of the values.
    values = heavy_tailed()

    def divergence(low: float, high: float) -> float:
        p, edges = np.histogram(np.clip(values, low, high), 4096, (values.min(), values.max()))
        centers = (edges[1:] + edges[:-1]) / 2
        level = np.rint(np.clip(centers, low, high) / ((high - low) / (LEVELS - 1))).astype(int)
        level -= level.min()
        mass, share = np.bincount(level, p), np.bincount(level, p > 0)
        q = np.where(p > 0, mass[level] / np.maximum(share[level], 1), 0)
        return float(entropy(p[p > 0], q[p > 0]))

    actual = find_range(histogram_of(values), "entropy")
    assert divergence(*actual) < divergence(float(values.min()), float(values.max()))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_zeros_alone_have_no_range(method: str):
    histogram = histogram_of(np.zeros(10))
    assert find_range(histogram, method) == (0.0, 0.0) and histogram.constant  # type: ignore[arg-type]


def test_squared_error_is_that_of_the_values():
    values = np.array([-1.0, -0.5, 0.0, 0.3, 2.5, 9.0])
    restored = np.array([-1.0, -0.5, 0.0, 0.3, 2.5, 4.1])
    # 255 steps of 0.02 from -1: 4.1 is the highest.
    assert round_to_levels(values, -1.0, 4.1) == pytest.approx(restored)
    assert squared_error(np.ones(6), values, -1.0, 4.1) == pytest.approx(4.9**2)
