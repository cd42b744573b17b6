"""Choice of the range of an activation that 8-bit integers represent, from a growing histogram of its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

RangeMethod = Literal["minmax", "percentile", "mse"]

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
            # Double the limit by merging pairs of bins around the middle.
            merged = np.zeros(_BINS)
            merged[_HALF // 2 : _HALF // 2 + _HALF] = self.counts.reshape(_HALF, 2).sum(axis=1)
            self.counts, self.limit = merged, 2 * self.limit
        if self.limit == 0.0:
            self.counts[_HALF] += values.size
            return
        positions = (values.ravel() * (_HALF / self.limit)).astype(np.float32)
        self.counts += np.bincount(np.clip(np.floor(positions) + _HALF, 0, _BINS - 1).astype(np.int64), minlength=_BINS)

    def centers(self) -> np.ndarray:
        """Return the middle of each bin, clipped to the observed values."""
        middles = (np.arange(_BINS) + 0.5 - _HALF) * (self.limit / _HALF)
        return np.asarray(np.clip(middles, self.low, self.high))

    @property
    def constant(self) -> bool:
        """Return True if all values are equal."""
        return self.low == self.high


def find_range(histogram: Histogram, method: RangeMethod, percentile: float = 99.99) -> tuple[float, float]:
    """Return the lowest and highest value that the integers represent; 0 is always inside.

    Args:
        histogram: Observed values.
        method: ``minmax`` covers all values. ``percentile`` leaves out half of ``100 - percentile`` percent on either
            side. ``mse`` minimises the squared error of rounding and clipping.
        percentile: Percentage of values that ``percentile`` covers.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if method == "minmax" or histogram.limit == 0.0:
        return low, high
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        tail = (100.0 - percentile) / 200.0
        edges = (np.arange(_BINS + 1) - _HALF) * (histogram.limit / _HALF)
        lowest = float(edges[np.searchsorted(share, tail, side="right")])
        highest = float(edges[np.searchsorted(share, 1.0 - tail) + 1])
        return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))
    # Ignore empty bins at both ends.
    used = np.flatnonzero(histogram.counts)
    counts, centers = histogram.counts[used[0] : used[-1] + 1], histogram.centers()[used[0] : used[-1] + 1]
    shares = np.linspace(1.0, _FEWEST, _STEPS)
    best = (low, high)
    # One end after the other, twice: the ends hardly depend on each other.
    for _ in range(2):
        for end in (0, 1):
            candidates = [tuple(np.where(np.arange(2) == end, np.multiply(s, (low, high)), best)) for s in shares]
            best = min(candidates, key=lambda ends: squared_error(counts, centers, float(ends[0]), float(ends[1])))
    return float(best[0]), float(best[1])


def round_to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return ``values`` rounded to 256 levels from ``low`` to ``high``, with 0 among the levels."""
    scale = (high - low) / (LEVELS - 1)
    if scale == 0:
        return np.zeros_like(values)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, LEVELS - 1) - zero) * scale)


def squared_error(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """Return the sum of squared rounding and clipping errors of a histogram's values.

    Args:
        counts: Number of values in each bin.
        centers: Value of each bin.
        low: Lowest value of the levels.
        high: Highest value of the levels.
    """
    return float(counts @ np.square(round_to_levels(centers, low, high) - centers))


_SMALLEST = 1e-5


def smoothing_factors(largest: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return s_j for inputs of magnitude ``largest`` [channels] and weights [channels, outputs] that share them."""
    sizes = np.maximum.reduce([np.abs(weight).max(axis=1) for weight in weights])
    live = (largest > _SMALLEST) & (sizes > _SMALLEST)
    factors = np.where(live, largest, 1.0) ** alpha / np.where(live, sizes, 1.0) ** (1 - alpha)
    return np.where(live, factors, 1.0).astype(np.float32)


_LOWEST, _HIGHEST = -32768, 32767
_MOST = 128
"""Largest sum of two weights of one sign: 255 * 128 is the last multiple of 255 that 16 bits hold."""
_LEVELS = 127
_SCALES = 9
"""Number of scales that are tried for each column."""
_CHUNK_ELEMENTS = 4_000_000


def pairwise_saturating(activations: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the int32 product of uint8 [rows, inner] and int8 [inner, columns], and the number of saturated sums."""
    first, second = _pairs(activations.T.astype(np.int32))
    above, below = _pairs(weights.astype(np.int32))
    total = np.zeros((activations.shape[0], weights.shape[1]), np.int32)
    saturated = 0
    # Limit the memory for all pair sums.
    size = max(1, _CHUNK_ELEMENTS // max(1, activations.shape[0] * weights.shape[1]))
    for start in range(0, len(above), size):
        part = slice(start, start + size)
        sums = np.einsum("kr,kc->krc", first[part], above[part]) + np.einsum("kr,kc->krc", second[part], below[part])
        clipped = np.clip(sums, _LOWEST, _HIGHEST)
        saturated += int(np.count_nonzero(clipped != sums))
        total += clipped.sum(axis=0, dtype=np.int32)
    return total, saturated


def pairs_at_risk(weights: np.ndarray) -> float:
    """Return the share of pairs of int8 ``weights`` [inner, columns] that saturate for some uint8 activations."""
    up, down = _sums_of_one_sign(weights.astype(np.int32))
    return float(((255 * up > _HIGHEST) | (255 * down > -_LOWEST)).mean())


def without_saturation(weights: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize float ``weights`` [inner, columns] to int8 that never saturate, and return them with their scales.

    ``scales`` [columns], or [1] for all, are those of the full range. The returned ones minimise the squared error
    between these and the scales at which every pair fits; the excess of a pair that does not fit is cut off. If nothing
    can saturate, both are unchanged.
    """
    above, below = _sums_of_one_sign(weights)
    # Factor by which each column's scale must grow so that every pair fits.
    reach = np.maximum(above, below).max(axis=0) / (_MOST * scales)
    reach = np.maximum(reach if scales.size > 1 else reach.max(keepdims=True), 1)
    best, least = scales, np.full(scales.shape, np.inf)
    result = np.zeros(weights.shape, np.int8)
    # Try scales between the given one and the safe one; cut the excess of pairs.
    for share in np.linspace(0, 1, _SCALES):
        candidate = (scales * reach**share).astype(scales.dtype)
        integers = cut_pairs((weights / candidate).round().clip(-_LEVELS, _LEVELS).astype(np.int8))
        error = np.square(weights - integers * candidate, dtype=np.float64).sum(axis=0)
        better = error < least if scales.size > 1 else error.sum(keepdims=True) < least
        least = np.where(better, error if scales.size > 1 else error.sum(keepdims=True), least)
        best, result = np.where(better, candidate, best), np.where(better, integers, result)
    return result, best


def cut_pairs(integers: np.ndarray) -> np.ndarray:
    """Return int8 ``integers`` [inner, columns] with every pair that could saturate reduced.

    Both weights of a pair give half of their joint excess, the larger one the odd unit.
    """
    first, second = _pairs(integers.astype(np.int32))
    # Only weights of equal sign add up.
    together = np.where(first * second > 0, np.abs(first) + np.abs(second), 0)
    excess = np.maximum(together - _MOST, 0)
    larger = np.abs(first) >= np.abs(second)
    reduction = np.where(larger, excess - excess // 2, excess // 2)
    cut = np.empty((2 * len(first), integers.shape[1]), np.int8)
    cut[0::2] = first - np.sign(first) * reduction
    cut[1::2] = second - np.sign(second) * (excess - reduction)
    return cut[: len(integers)]


def _sums_of_one_sign(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest sums of positive and of negative weights of each pair of neighbours, [pairs, columns]."""
    first, second = _pairs(weights)
    return np.maximum(first, 0) + np.maximum(second, 0), np.maximum(-first, 0) + np.maximum(-second, 0)


def _pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return even and odd rows; a last single row is paired with zeros."""
    even = np.pad(matrix, ((0, len(matrix) % 2), (0, 0)))
    return even[0::2], even[1::2]
