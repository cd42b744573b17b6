"""Retrieval with embeddings: ranks of matching texts, also with quantized embeddings and fewer dimensions.

n: queries, m: texts of the corpus, d: dimensions. Precisions are those of sentence-transformers'
`quantize_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK = 512
"""Number of queries whose scores are held at a time."""


def normalized(embeddings: np.ndarray) -> np.ndarray:
    """Return rows [n, d] scaled to length 1, so that a product is a cosine; a row of zeros stays zero."""
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return np.asarray(np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 0))


def ranks(
    queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, itself: bool = False
) -> np.ndarray:
    """Return the rank, from 1, of the best matching text for each query by dot product, [n] int64.

    Equal texts share an id, so that none of them counts as a mistake. A text that scores as high as the best matching
    one is counted before it. A query without a matching text has the rank m + 1.

    Args:
        queries: Embeddings of queries [n, d].
        corpus: Embeddings of texts [m, d].
        wanted: Id of the matching texts of each query [n].
        given: Id of each text [m].
        itself: The corpus is the queries, and no query may find itself.
    """
    result = np.empty(len(queries), dtype=np.int64)
    for start, scores in _scores(queries, corpus, itself):
        stop = start + len(scores)
        belongs = given[None, :] == wanted[start:stop, None]
        # Masked scores (a query itself) do not count as matching.
        result[start:stop] = rank_among(scores, belongs & np.isfinite(scores))
    return result


def nearest(queries: np.ndarray, corpus: np.ndarray, count: int, itself: bool = False) -> np.ndarray:
    """Return the ``count`` texts with the largest products with each query, best first, [n, count] int64.

    Args:
        queries: Embeddings of queries [n, d].
        corpus: Embeddings of texts [m, d].
        count: Number of texts.
        itself: The corpus is the queries, and no query may find itself.
    """
    parts = [top(scores, min(count, len(corpus) - itself)) for _, scores in _scores(queries, corpus, itself)]
    return np.concatenate(parts)


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the columns of the ``count`` largest scores [n, m] of each row, best first; the first of equals."""
    count = min(count, scores.shape[1])
    # A stable order over all columns would cost more than the scores themselves.
    limit = np.partition(scores, -count, axis=1)[:, -count]
    out = np.empty((len(scores), count), dtype=np.int64)
    for row, (values, least) in enumerate(zip(scores, limit, strict=True)):
        # Ties with the last result are resolved by column.
        columns = np.flatnonzero(values >= least)
        out[row] = columns[np.argsort(-values[columns], kind="stable")][:count]
    return out


def rank_among(scores: np.ndarray, belongs: np.ndarray) -> np.ndarray:
    """Return the rank of the best matching candidate [n, k] by scores; k + 1 if no candidate matches."""
    # A query without a match has no best score.
    best = np.where(belongs, scores, -np.inf).max(axis=1)
    better: np.ndarray = ((scores >= best[:, None]) & ~belongs).sum(axis=1)
    return np.asarray(np.where(belongs.any(axis=1), better + 1, scores.shape[1] + 1))


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the share of the neighbours [n, k] of each query that both lists contain, [n]."""
    shared: np.ndarray = (first[:, :, None] == second[:, None, :]).any(axis=2)
    return np.asarray(shared.mean(axis=1))


def _scores(queries: np.ndarray, corpus: np.ndarray, itself: bool) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK] @ corpus.T
        yield start, _without_itself(scores, start, -np.inf) if itself else scores


def _without_itself(scores: np.ndarray, start: int, lowest: float) -> np.ndarray:
    """Set the score of each query with itself to ``lowest`` in place; rows are the queries from ``start`` on."""
    rows = np.arange(len(scores))
    scores[rows, start + rows] = lowest
    return scores


RESCORED = 4
"""Candidates per requested result that the coarse search passes on to exact scoring."""
_BYTE = 256


def ranges_of(embeddings: np.ndarray) -> np.ndarray:
    """Return the smallest and the largest value of each dimension of [m, d]; [2, d]."""
    return np.vstack([embeddings.min(axis=0), embeddings.max(axis=0)])


def to_int8(embeddings: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Quantize as `int8`: each dimension in 256 steps of its range [2, d]; [n, d] int8."""
    # sentence-transformers truncates in place of rounding.
    steps: np.ndarray = np.floor((embeddings - ranges[0]) / _steps(ranges))
    return (steps.clip(0, _BYTE - 1) - _BYTE // 2).astype(np.int8)


def from_int8(integers: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Return the middle of the step that each integer [m, d] represents."""
    middles: np.ndarray = (integers.astype(np.float32) + _BYTE // 2 + 0.5) * _steps(ranges) + ranges[0]
    return middles.astype(np.float32)


def to_ubinary(embeddings: np.ndarray) -> np.ndarray:
    """Quantize as `ubinary`: one bit per dimension, set if positive, highest bit first; [n, ceil(d / 8)] uint8."""
    return np.packbits(embeddings > 0, axis=-1)


def hamming(queries: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """Return the number of differing bits of packed embeddings [n, b] and [m, b]; [n, m] int32."""
    distances = np.zeros((len(queries), len(corpus)), dtype=np.int32)
    # Count differing bits byte by byte.
    for column in range(queries.shape[1]):
        distances += np.bitwise_count(queries[:, column, None] ^ corpus[None, :, column])
    return distances


def binary_ranks(
    queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, k: int, itself: bool = False
) -> np.ndarray:
    """Return the ranks of `ranks` up to ``k`` for a corpus stored as bits; texts that are not found rank above ``k``.

    The ``RESCORED`` x k nearest by Hamming distance are scored again by the product of the exact query with the bits
    as -1 and 1 (Yamada et al. 2021, section 3.2).

    Args:
        queries: Embeddings of queries [n, d].
        corpus: Embeddings of texts [m, d].
        wanted: Id of the matching texts of each query [n].
        given: Id of each text [m].
        k: Number of results.
        itself: The corpus is the queries, and no query may find itself.
    """
    packed = to_ubinary(corpus)
    signs = np.where(corpus > 0, np.float32(1), np.float32(-1))
    parts = []
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        near = -hamming(to_ubinary(queries[rows]), packed)
        near = _without_itself(near, start, np.iinfo(near.dtype).min) if itself else near
        # Coarse search by Hamming distance.
        candidates = top(near, min(RESCORED * k, len(corpus) - itself))
        # Exact query against the signs of the candidates.
        scores = np.einsum("nd,nkd->nk", queries[rows], signs[candidates])
        parts.append(rank_among(scores, given[candidates] == wanted[rows, None]))
    return np.concatenate(parts)


def quantized_ranks(
    queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray, k: int, itself: bool = False
) -> dict[str, np.ndarray]:
    """Return the ranks for a corpus stored as `int8`, whose queries stay exact, and those of `binary_ranks`.

    Args:
        queries: Embeddings of queries [n, d].
        corpus: Embeddings of texts [m, d].
        wanted: Id of the matching texts of each query [n].
        given: Id of each text [m].
        k: Number of results.
        itself: The corpus is the queries, and no query may find itself.
    """
    span = ranges_of(corpus)
    rounded = from_int8(to_int8(corpus, span), span)
    return {
        "int8": ranks(queries, rounded, wanted, given, itself),
        "binary": binary_ranks(queries, corpus, wanted, given, k, itself),
    }


def _steps(ranges: np.ndarray) -> np.ndarray:
    steps = (ranges[1] - ranges[0]) / (_BYTE - 1)
    return np.where(steps == 0, 1, steps)


def principal_rotation(embeddings: np.ndarray, dimensions: int) -> np.ndarray:
    """Return ``dimensions`` orthonormal rows [dimensions, d] that preserve most of the squared length of [n, d].

    This is principal component analysis without centering: retrieval uses dot products and cosines of the vectors
    themselves, not distances to a mean. The rows are the leading eigenvectors of the second moment Xᵀ X / n (Eckart and
    Young 1936), each signed so that its largest entry is positive.

    Raises:
        ValueError: For more dimensions than exist, or fewer embeddings than dimensions.
    """
    count, width = embeddings.shape
    if not 1 <= dimensions <= width:
        raise ValueError(f"{dimensions} of {width} dimensions cannot be kept")
    if count < dimensions:
        raise ValueError(f"{count} embeddings do not span {dimensions} dimensions")
    wide = embeddings.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide / count)
    # `eigh` returns eigenvalues in ascending order.
    rows = vectors[:, ::-1].T[:dimensions]
    signs = np.sign(rows[np.arange(dimensions), np.abs(rows).argmax(axis=1)])
    return np.asarray((rows * signs[:, None]).astype(np.float32))


def retained_share(embeddings: np.ndarray, rotation: np.ndarray) -> float:
    """Return the share of the squared length of embeddings [n, d] that remains after a rotation [k, d]."""
    total = float(np.square(embeddings, dtype=np.float64).sum())
    return float(np.square(embeddings @ rotation.T, dtype=np.float64).sum()) / total
