"""Embeddings in few bits, and search among them, as sentence-transformers' `quantize_embeddings` defines precisions.

n: queries, m: texts of the corpus, d: dimensions.
"""

from __future__ import annotations

import numpy as np

from compress.numerics.retrieval import rank_among, top

RESCORED = 4
"""For each place that is asked for, so many candidates of the coarse search are scored again with the exact query."""
_BYTE = 256


def ranges_of(embeddings: np.ndarray) -> np.ndarray:
    """The smallest and the largest value of each dimension of [m, d]; [2, d]."""
    return np.vstack([embeddings.min(axis=0), embeddings.max(axis=0)])


def to_int8(embeddings: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """`int8`: each dimension in 256 steps of its range [2, d]; [n, d] int8."""
    steps: np.ndarray = np.floor((embeddings - ranges[0]) / _steps(ranges))
    return (steps.clip(0, _BYTE - 1) - _BYTE // 2).astype(np.int8)


def from_int8(integers: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """The middle of the step that each integer [m, d] stands for."""
    middles: np.ndarray = (integers.astype(np.float32) + _BYTE // 2 + 0.5) * _steps(ranges) + ranges[0]
    return middles.astype(np.float32)


def to_ubinary(embeddings: np.ndarray) -> np.ndarray:
    """`ubinary`: a bit for each dimension, set where it is positive, from the highest on; [n, ceil(d / 8)] uint8."""
    return np.packbits(embeddings > 0, axis=-1)


def hamming(queries: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """Bits in which packed embeddings [n, b] and [m, b] differ; [n, m] int32."""
    distances = np.zeros((len(queries), len(corpus)), dtype=np.int32)
    for column in range(queries.shape[1]):
        distances += np.bitwise_count(queries[:, column, None] ^ corpus[None, :, column])
    return distances


def binary_ranks(queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, k: int) -> np.ndarray:
    """Ranks of `retrieval.ranks`, up to ``k``, when the corpus is kept in bits; what is not found has more than ``k``.

    The ``RESCORED`` x k nearest by Hamming distance are scored again: exact query times bits as -1 and 1 (Yamada et
    al. 2021, section 3.2).
    """
    packed = to_ubinary(corpus)
    signs = np.where(corpus > 0, np.float32(1), np.float32(-1))
    found = []
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        candidates = top(-hamming(to_ubinary(queries[rows]), packed), RESCORED * k)
        scores = np.einsum("nd,nkd->nk", queries[rows], signs[candidates])
        found.append(rank_among(scores, given[candidates] == wanted[rows, None]))
    return np.concatenate(found)


def _steps(ranges: np.ndarray) -> np.ndarray:
    steps = (ranges[1] - ranges[0]) / (_BYTE - 1)
    return np.where(steps == 0, 1, steps)
