"""Saturation of matrix products on processors that add pairs of 8-bit products in 16 bits.

x86 processors without VNNI multiply unsigned by signed bytes with VPMADDUBSW: the products of neighbours along the
summed axis are added in 16 bits with saturation, and only these sums are added in 32 bits. 255 * 127 * 2 is 64770,
and 16 bits hold at most 32767.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_LOWEST, _HIGHEST = -32768, 32767
_MOST = 128
"""Largest sum of two weights of one sign: 255 * 128 is the last multiple of 255 that 16 bits hold."""
_LEVELS = 127
_SCALES = 9
"""Number of scales that are tried for each column."""
_CHUNK_ELEMENTS = 4_000_000


def pairwise_saturating(activations: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the int32 product of uint8 [rows, inner] and int8 [inner, columns], and the number of saturated sums."""
    first, second = _pairs(activations.T)
    above, below = _pairs(weights)
    total = np.zeros((activations.shape[0], weights.shape[1]), np.int32)
    saturated = 0
    # Limit the memory for all pair sums.
    for part in _chunks(len(above), activations.shape[0] * weights.shape[1]):
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
    first, second = _pairs(integers)
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
    # Pad to an even number of rows.
    even = np.concatenate([weights, np.zeros((len(weights) % 2, weights.shape[1]), weights.dtype)])
    first, second = even[0::2], even[1::2]
    up: np.ndarray = np.maximum(first, 0) + np.maximum(second, 0)
    down: np.ndarray = np.maximum(-first, 0) + np.maximum(-second, 0)
    return up, down


def _pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return even and odd rows as int32; a last single row is paired with zeros."""
    wide = matrix.astype(np.int32)
    if len(wide) % 2:
        wide = np.concatenate([wide, np.zeros((1, *wide.shape[1:]), np.int32)])
    return wide[0::2], wide[1::2]


def _chunks(count: int, elements: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, elements))
    return (slice(start, start + size) for start in range(0, count, size))
