"""How well queries find what belongs to them among embeddings. n: queries, m: texts of the corpus, d: dimensions."""

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


def ranks(queries: np.ndarray, corpus: np.ndarray, wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The rank, from 1, of the best text [m, d] that belongs to each query [n, d], by their product; [n] int64.

    Text j belongs to query i where ``given[j] == wanted[i]``: equal texts have one number, so that none of them counts
    as a mistake. A text that scores as high as the best one that belongs is counted before it. Every query must have a
    text that belongs to it.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for start, scores in _scores(queries, corpus):
        stop = start + len(scores)
        found[start:stop] = _ranks(scores, wanted[start:stop], given)
    return found


def nearest(queries: np.ndarray, corpus: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` texts [m, d] with the largest product with each query [n, d], best first; [n, count] int64."""
    parts = [top(scores, count) for _, scores in _scores(queries, corpus)]
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


def _scores(queries: np.ndarray, corpus: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(queries), _CHUNK):
        yield start, queries[start : start + _CHUNK] @ corpus.T


def _ranks(scores: np.ndarray, wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    return rank_among(scores, given[None, :] == wanted[:, None])
