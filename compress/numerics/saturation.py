"""What an instruction that adds pairs of 8-bit products in 16 bits makes of a product of matrices.

x86 processors without VNNI multiply unsigned by signed bytes with VPMADDUBSW: products of neighbours along the summed
axis are added in 16 bits with saturation, and only those sums are added in 32 bits. 255 * 127 * 2 is 64770, and 32767
is the most that 16 bits hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_LOWEST, _HIGHEST = -32768, 32767
_MOST = 128
"""What two weights of one sign may be together: 255 * 128 is the last multiple of 255 that 16 bits hold."""
_LEVELS = 127
_SCALES = 9
"""How many are tried for each column."""
_CHUNK_ELEMENTS = 4_000_000


def pairwise_saturating(activations: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, int]:
    """The product of uint8 [rows, inner] and int8 [inner, columns] as int32, and how many pair sums were cut off."""
    first, second = _pairs(activations.T)
    above, below = _pairs(weights)
    total = np.zeros((activations.shape[0], weights.shape[1]), np.int32)
    cut = 0
    for part in _chunks(len(above), activations.shape[0] * weights.shape[1]):
        sums = np.einsum("kr,kc->krc", first[part], above[part]) + np.einsum("kr,kc->krc", second[part], below[part])
        kept = np.clip(sums, _LOWEST, _HIGHEST)
        cut += int(np.count_nonzero(kept != sums))
        total += kept.sum(axis=0, dtype=np.int32)
    return total, cut


def pairs_at_risk(weights: np.ndarray) -> float:
    """The share of the pairs of int8 ``weights`` [inner, columns] whose sum some uint8 activations would cut off."""
    up, down = _sums_of_one_sign(weights.astype(np.int32))
    return float(((255 * up > _HIGHEST) | (255 * down > -_LOWEST)).mean())


def without_saturation(weights: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 of float ``weights`` [inner, columns] that no uint8 activations make saturate, and their scales.

    ``scales`` [columns], or [1] for all, are those of the full range. The ones returned are of least squared error
    between these and the scales at which every pair fits; of a pair that doesn't fit yet the excess is cut off.
    Where nothing is at risk both stay.
    """
    above, below = _sums_of_one_sign(weights)
    reach = np.maximum(above, below).max(axis=0) / (_MOST * scales)
    reach = np.maximum(reach if scales.size > 1 else reach.max(keepdims=True), 1)
    best, least = scales, np.full(scales.shape, np.inf)
    found = np.zeros(weights.shape, np.int8)
    for share in np.linspace(0, 1, _SCALES):
        tried = (scales * reach**share).astype(scales.dtype)
        integers = cut_pairs((weights / tried).round().clip(-_LEVELS, _LEVELS).astype(np.int8))
        error = np.square(weights - integers * tried, dtype=np.float64).sum(axis=0)
        better = error < least if scales.size > 1 else error.sum(keepdims=True) < least
        least = np.where(better, error if scales.size > 1 else error.sum(keepdims=True), least)
        best, found = np.where(better, tried, best), np.where(better, integers, found)
    return found, best


def cut_pairs(integers: np.ndarray) -> np.ndarray:
    """int8 ``integers`` [inner, columns] with each pair that some uint8 activations would cut off made smaller.

    Both of a pair give half of what they are too much together, the larger the odd one.
    """
    first, second = _pairs(integers)
    together = np.where(first * second > 0, np.abs(first) + np.abs(second), 0)
    excess = np.maximum(together - _MOST, 0)
    larger = np.abs(first) >= np.abs(second)
    mine = np.where(larger, excess - excess // 2, excess // 2)
    cut = np.empty((2 * len(first), integers.shape[1]), np.int8)
    cut[0::2] = first - np.sign(first) * mine
    cut[1::2] = second - np.sign(second) * (excess - mine)
    return cut[: len(integers)]


def _sums_of_one_sign(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pair of neighbours can reach up and down, [pairs, columns]."""
    even = np.concatenate([weights, np.zeros((len(weights) % 2, weights.shape[1]), weights.dtype)])
    first, second = even[0::2], even[1::2]
    up: np.ndarray = np.maximum(first, 0) + np.maximum(second, 0)
    down: np.ndarray = np.maximum(-first, 0) + np.maximum(-second, 0)
    return up, down


def _pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Even and odd rows as int32; an odd one out is paired with zeros."""
    wide = matrix.astype(np.int32)
    if len(wide) % 2:
        wide = np.concatenate([wide, np.zeros((1, *wide.shape[1:]), np.int32)])
    return wide[0::2], wide[1::2]


def _chunks(count: int, elements: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, elements))
    return (slice(start, start + size) for start in range(0, count, size))
