"""Search among embeddings: how well queries find what belongs to them, in few bits and in fewer dimensions too.

n: queries, m: texts of the corpus, d: dimensions. Precisions are as sentence-transformers' `quantize_embeddings` has
them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK = 512
"""Queries whose scores are held at once."""


def normalized(embeddings: np.ndarray) -> np.ndarray:
    """Each row [n, d] at length 1, so that a product is a cosine; a row of zeros stays one."""
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    found: np.ndarray = np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 0)
    return found


def ranks(
    queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, itself: bool = False
) -> np.ndarray:
    """The rank, from 1, of the best text [m, d] that belongs to each query [n, d], by their product; [n] int64.

    Text j belongs to query i where ``given[j] == wanted[i]``: equal texts have one number, so that none of them counts
    as a mistake. A text that scores as high as the best one that belongs is counted before it. With ``itself`` the
    corpus is the queries, and none finds itself. A query to which nothing belongs has rank m + 1.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for start, scores in _scores(queries, corpus, itself):
        stop = start + len(scores)
        belongs = given[None, :] == wanted[start:stop, None]
        found[start:stop] = rank_among(scores, belongs & np.isfinite(scores))
    return found


def nearest(queries: np.ndarray, corpus: np.ndarray, count: int, itself: bool = False) -> np.ndarray:
    """The ``count`` texts [m, d] with the largest product with each query [n, d], best first; [n, count] int64.

    With ``itself`` the corpus is the queries, and none is near itself.
    """
    parts = [top(scores, min(count, len(corpus) - itself)) for _, scores in _scores(queries, corpus, itself)]
    return np.concatenate(parts)


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns of the ``count`` largest scores [n, m] of each row, best first; of equal ones the first columns."""
    count = min(count, scores.shape[1])
    # A stable order over all columns would cost more than the scores themselves.
    limit = np.partition(scores, -count, axis=1)[:, -count]
    out = np.empty((len(scores), count), dtype=np.int64)
    for row, (values, least) in enumerate(zip(scores, limit, strict=True)):
        places = np.flatnonzero(values >= least)
        out[row] = places[np.argsort(-values[places], kind="stable")][:count]
    return out


def rank_among(scores: np.ndarray, belongs: np.ndarray) -> np.ndarray:
    """As `ranks`, of candidates [n, k] with their scores; a query none of whose candidates belongs has rank k + 1."""
    best = np.where(belongs, scores, -np.inf).max(axis=1)
    before: np.ndarray = ((scores >= best[:, None]) & ~belongs).sum(axis=1)
    found: np.ndarray = np.where(belongs.any(axis=1), before + 1, scores.shape[1] + 1)
    return found


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of the neighbours [n, k] of each query that both have, [n]."""
    shared: np.ndarray = (first[:, :, None] == second[:, None, :]).any(axis=2)
    share: np.ndarray = shared.mean(axis=1)
    return share


def _scores(queries: np.ndarray, corpus: np.ndarray, itself: bool) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ corpus.T
        yield start, _without_itself(scores, start, -np.inf) if itself else scores


def _without_itself(scores: np.ndarray, start: int, lowest: float) -> np.ndarray:
    """Scores [n, m] of the queries from ``start`` on, in place, with the least of all for what each of them is."""
    rows = np.arange(len(scores))
    scores[rows, start + rows] = lowest
    return scores


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


def binary_ranks(
    queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, k: int, itself: bool = False
) -> np.ndarray:
    """Ranks of `ranks`, up to ``k``, when the corpus is kept in bits; what is not found has more than ``k``.

    The ``RESCORED`` x k nearest by Hamming distance are scored again: exact query times bits as -1 and 1 (Yamada et
    al. 2021, section 3.2). ``itself`` is as in `ranks`.
    """
    packed = to_ubinary(corpus)
    signs = np.where(corpus > 0, np.float32(1), np.float32(-1))
    found = []
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        near = -hamming(to_ubinary(queries[rows]), packed)
        near = _without_itself(near, start, np.iinfo(near.dtype).min) if itself else near
        candidates = top(near, min(RESCORED * k, len(corpus) - itself))
        scores = np.einsum("nd,nkd->nk", queries[rows], signs[candidates])
        found.append(rank_among(scores, given[candidates] == wanted[rows, None]))
    return np.concatenate(found)


def _steps(ranges: np.ndarray) -> np.ndarray:
    steps = (ranges[1] - ranges[0]) / (_BYTE - 1)
    return np.where(steps == 0, 1, steps)


def principal_rotation(embeddings: np.ndarray, dimensions: int) -> np.ndarray:
    """Of embeddings [n, d], the ``dimensions`` orthonormal rows [dimensions, d] that keep most of their squared length.

    Principal component analysis without centering: dot products and cosines, which retrieval reads, are of the vectors
    themselves and not of their distance to a mean. The rows are the leading eigenvectors of the second moment
    Xᵀ X / n (Eckart and Young 1936); each is signed so that its largest entry is positive. Raises `ValueError` for more
    dimensions than there are, or fewer embeddings than dimensions.
    """
    count, width = embeddings.shape
    if not 1 <= dimensions <= width:
        raise ValueError(f"{dimensions} of {width} dimensions cannot be kept")
    if count < dimensions:
        raise ValueError(f"{count} embeddings do not span {dimensions} dimensions")
    wide = embeddings.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide / count)
    rows = vectors[:, ::-1].T[:dimensions]
    signs = np.sign(rows[np.arange(dimensions), np.abs(rows).argmax(axis=1)])
    rotation: np.ndarray = (rows * signs[:, None]).astype(np.float32)
    return rotation


def kept_share(embeddings: np.ndarray, rotation: np.ndarray) -> float:
    """Which share of the squared length of embeddings [n, d] is left after a rotation [k, d]."""
    before = float(np.square(embeddings, dtype=np.float64).sum())
    return float(np.square(embeddings @ rotation.T, dtype=np.float64).sum()) / before
