"""What an instruction that adds pairs of 8-bit products in 16 bits makes of a product of matrices.

x86 processors without VNNI multiply unsigned by signed bytes with VPMADDUBSW: products of neighbours along the summed
axis are added in 16 bits with saturation, and only those sums are added in 32 bits. 255 * 127 * 2 is 64770, and 32767
is the most that 16 bits hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_LOWEST, _HIGHEST = -32768, 32767
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
    above, below = _pairs(weights)
    most = 255 * (np.maximum(above, 0) + np.maximum(below, 0))
    least = 255 * (np.minimum(above, 0) + np.minimum(below, 0))
    return float(((most > _HIGHEST) | (least < _LOWEST)).mean())


def _pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Even and odd rows as int32; an odd one out is paired with zeros."""
    wide = matrix.astype(np.int32)
    if len(wide) % 2:
        wide = np.concatenate([wide, np.zeros((1, *wide.shape[1:]), np.int32)])
    return wide[0::2], wide[1::2]


def _chunks(count: int, elements: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(1, elements))
    return (slice(start, start + size) for start in range(0, count, size))
