"""Choice of the range of an activation that 8-bit integers represent, from a growing histogram of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]

_BINS = 8192
_HALF = _BINS // 2
_FEWEST = 0.2
_STEPS = 41
"""Number of ranges that are tried: from 0.2 to 1 of the whole range in steps of 0.02."""
LEVELS = 256


@dataclass
class Histogram:
    """Counts of all values in bins of equal width over [-limit, limit]; the limit doubles when values exceed it.

    ``low`` and ``high`` are the exact extremes, independent of the bins.
    """

    low: float = np.inf
    high: float = -np.inf
    limit: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS))

    def add(self, values: np.ndarray) -> None:
        """Count ``values`` of any shape, which must be finite."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        # Start with a power of two, so that doubling keeps bins aligned.
        if self.limit == 0.0 and largest > 0:
            self.limit = float(2.0 ** np.ceil(np.log2(largest)))
        while largest > self.limit > 0:
            self._double()
        if self.limit == 0.0:
            self.counts[_HALF] += values.size
            return
        positions = (values.ravel() * (_HALF / self.limit)).astype(np.float32)
        self.counts += np.bincount(np.clip(np.floor(positions) + _HALF, 0, _BINS - 1).astype(np.int64), minlength=_BINS)

    def _double(self) -> None:
        """Double the limit by merging pairs of bins around the middle."""
        merged = np.zeros(_BINS)
        merged[_HALF // 2 : _HALF // 2 + _HALF] = self.counts.reshape(_HALF, 2).sum(axis=1)
        self.counts, self.limit = merged, 2 * self.limit

    def centers(self) -> np.ndarray:
        """Return the middle of each bin, clipped to the observed values."""
        middles = (np.arange(_BINS) + 0.5 - _HALF) * (self.limit / _HALF)
        clipped: np.ndarray = np.clip(middles, self.low, self.high)
        return clipped

    @property
    def constant(self) -> bool:
        """Return True if all values are equal."""
        return self.low == self.high


def find_range(histogram: Histogram, method: RangeMethod, percentile: float = 99.99) -> tuple[float, float]:
    """Return the lowest and highest value that the integers represent; 0 is always inside.

    Args:
        histogram: Observed values.
        method: ``minmax`` covers all values. ``percentile`` leaves out half of ``100 - percentile`` percent on either
            side. ``mse`` minimises the squared error of rounding and clipping. ``entropy`` minimises the
            Kullback-Leibler divergence of the rounded from the whole histogram (Migacz 2017, "8-bit inference with
            TensorRT").
        percentile: Percentage of values that ``percentile`` covers.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if method == "minmax" or histogram.limit == 0.0:
        return low, high
    if method == "percentile":
        return _percentile(histogram, percentile, low, high)
    # Ignore empty bins at both ends.
    used = np.flatnonzero(histogram.counts)
    counts, centers = histogram.counts[used[0] : used[-1] + 1], histogram.centers()[used[0] : used[-1] + 1]
    error = squared_error if method == "mse" else _divergence
    shares = np.linspace(1.0, _FEWEST, _STEPS)
    best = (low, high)
    # One end after the other, twice: the ends hardly depend on each other.
    for _ in range(2):
        for end in (0, 1):
            candidates = [tuple(np.where(np.arange(2) == end, np.multiply(s, (low, high)), best)) for s in shares]
            best = min(candidates, key=lambda ends: error(counts, centers, float(ends[0]), float(ends[1])))
    return float(best[0]), float(best[1])


def _percentile(histogram: Histogram, percentile: float, low: float, high: float) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (100.0 - percentile) / 200.0
    edges = (np.arange(_BINS + 1) - _HALF) * (histogram.limit / _HALF)
    lowest = float(edges[np.searchsorted(share, tail, side="right")])
    highest = float(edges[np.searchsorted(share, 1.0 - tail) + 1])
    return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))


def round_to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return ``values`` rounded to 256 levels from ``low`` to ``high``, with 0 among the levels."""
    scale = (high - low) / (LEVELS - 1)
    if scale == 0:
        return np.zeros_like(values)
    zero = np.rint(-low / scale)
    levels: np.ndarray = (np.clip(np.rint(values / scale) + zero, 0, LEVELS - 1) - zero) * scale
    return levels


def squared_error(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """Return the sum of squared rounding and clipping errors of a histogram's values.

    Args:
        counts: Number of values in each bin.
        centers: Value of each bin.
        low: Lowest value of the levels.
        high: Highest value of the levels.
    """
    return float(counts @ np.square(round_to_levels(centers, low, high) - centers))


def _divergence(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """Return the KL divergence of the histogram rounded to levels from the clipped histogram, over the same bins."""
    inside = (centers >= low) & (centers <= high)
    if not inside.any():
        return np.inf
    clipped = counts[inside].copy()
    # Clipped values count at the ends of the range.
    clipped[0] += counts[centers < low].sum()
    clipped[-1] += counts[centers > high].sum()
    levels = np.rint((centers[inside] - low) / max((high - low) / (LEVELS - 1), np.finfo(float).tiny)).astype(int)
    filled = counts[inside] > 0
    mass = np.bincount(levels, counts[inside], minlength=LEVELS)
    share = np.bincount(levels, filled, minlength=LEVELS)
    # Each level distributes its mass evenly over its non-empty bins.
    spread = np.where(filled, mass[levels] / np.maximum(share[levels], 1), 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    both = (p > 0) & (q > 0)
    # Bins that the levels cannot represent get a large penalty.
    lost = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(counts.sum()))
