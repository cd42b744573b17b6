"""Which range of an activation 8 bits should cover: a histogram that grows as values come, and ways to cut it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]

_BINS = 8192
_HALF = _BINS // 2
_FEWEST = 0.2
_STEPS = 41
"""Ranges that are tried: 0.2 to 1 of the whole in steps of a fiftieth."""
LEVELS = 256


@dataclass
class Histogram:
    """Of all values seen, in bins of equal width over [-limit, limit]; the limit doubles where values exceed it.

    ``low`` and ``high`` are exact, whatever the bins.
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
        if self.limit == 0.0 and largest > 0:
            self.limit = float(2.0 ** np.ceil(np.log2(largest)))
        while largest > self.limit > 0:
            self._double()
        if self.limit == 0.0:
            self.counts[_HALF] += values.size
            return
        places = (values.ravel() * (_HALF / self.limit)).astype(np.float32)
        self.counts += np.bincount(np.clip(np.floor(places) + _HALF, 0, _BINS - 1).astype(np.int64), minlength=_BINS)

    def _double(self) -> None:
        """Two bins become one, about the middle."""
        merged = np.zeros(_BINS)
        merged[_HALF // 2 : _HALF // 2 + _HALF] = self.counts.reshape(_HALF, 2).sum(axis=1)
        self.counts, self.limit = merged, 2 * self.limit

    def centers(self) -> np.ndarray:
        """The middle of each bin, within what was seen."""
        middles = (np.arange(_BINS) + 0.5 - _HALF) * (self.limit / _HALF)
        within: np.ndarray = np.clip(middles, self.low, self.high)
        return within

    @property
    def constant(self) -> bool:
        """Whether all values are the same."""
        return self.low == self.high


def find_range(histogram: Histogram, method: RangeMethod, percentile: float = 99.99) -> tuple[float, float]:
    """Lowest and highest value that the integers should stand for; 0 always lies between.

    ``minmax`` takes all; ``percentile`` leaves out half of ``100 - percentile`` in a hundred on either side;
    ``mse`` has the least squared error of rounding and clipping; ``entropy`` the least Kullback-Leibler divergence of
    the rounded histogram from the whole (Migacz 2017, "8-bit inference with TensorRT").
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if method == "minmax" or histogram.limit == 0.0:
        return low, high
    if method == "percentile":
        return _percentile(histogram, percentile, low, high)
    used = np.flatnonzero(histogram.counts)
    counts, centers = histogram.counts[used[0] : used[-1] + 1], histogram.centers()[used[0] : used[-1] + 1]
    error = squared_error if method == "mse" else _divergence
    shares = np.linspace(1.0, _FEWEST, _STEPS)
    best = (low, high)
    # One end after the other, twice: the ends hardly depend on each other.
    for _ in range(2):
        for end in (0, 1):
            tried = [tuple(np.where(np.arange(2) == end, np.multiply(s, (low, high)), best)) for s in shares]
            best = min(tried, key=lambda ends: error(counts, centers, float(ends[0]), float(ends[1])))
    return float(best[0]), float(best[1])


def _percentile(histogram: Histogram, percentile: float, low: float, high: float) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    cut = (100.0 - percentile) / 200.0
    edges = (np.arange(_BINS + 1) - _HALF) * (histogram.limit / _HALF)
    lowest = float(edges[np.searchsorted(share, cut, side="right")])
    highest = float(edges[np.searchsorted(share, 1.0 - cut) + 1])
    return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))


def round_to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values`` as 256 levels from ``low`` to ``high`` give them back, 0 among the levels."""
    scale = (high - low) / (LEVELS - 1)
    if scale == 0:
        return np.zeros_like(values)
    zero = np.rint(-low / scale)
    levels: np.ndarray = (np.clip(np.rint(values / scale) + zero, 0, LEVELS - 1) - zero) * scale
    return levels


def squared_error(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """Sum of squared differences that the levels from ``low`` to ``high`` make to a histogram's values."""
    return float(counts @ np.square(round_to_levels(centers, low, high) - centers))


def _divergence(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """KL of what the levels can tell apart from the clipped histogram, both over the histogram's bins."""
    inside = (centers >= low) & (centers <= high)
    if not inside.any():
        return np.inf
    clipped = counts[inside].copy()
    clipped[0] += counts[centers < low].sum()
    clipped[-1] += counts[centers > high].sum()
    levels = np.rint((centers[inside] - low) / max((high - low) / (LEVELS - 1), np.finfo(float).tiny)).astype(int)
    filled = counts[inside] > 0
    mass = np.bincount(levels, counts[inside], minlength=LEVELS)
    share = np.bincount(levels, filled, minlength=LEVELS)
    spread = np.where(filled, mass[levels] / np.maximum(share[levels], 1), 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & (q == 0)].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(counts.sum()))
