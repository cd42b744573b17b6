"""What a tensor is known by whatever it is called: norms of its rows and of its columns, or a vector's values.

Rounding hardly moves norms, transposing exchanges them, and matrices that stand side by side have them one after the
other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compress.plugins.diff.dequantize import Weight
from compress.plugins.diff.pairs import Pair

_ALIKE = 0.8
"""Correlation of two profiles from which they may be of one tensor."""
_SURE = 0.97
"""From which one of rows and columns says so alone: the others may have been put into another order."""
FEWEST = 8
"""Numbers that tell a tensor from another."""


@dataclass(frozen=True)
class Profile:
    """Fingerprint of a tensor: norms of its ``rows`` and along its last axis, or the values of a vector."""

    rows: np.ndarray
    columns: np.ndarray | None
    constant: bool

    @classmethod
    def of(cls, weight: Weight) -> Profile:
        """Compute the fingerprint by reading the whole tensor in chunks of rows."""
        shape = weight.shape
        if sum(size > 1 for size in shape) < 2:
            values = np.concatenate([part.ravel() for part in weight.chunks()])
            return cls(values, None, bool(values.size == 0 or np.ptp(values) == 0))
        if len(shape) > 2:
            whole = np.concatenate(list(weight.chunks())).reshape(shape)
            others = tuple(range(1, len(shape)))
            rows, columns = np.square(whole).sum(axis=others), np.square(whole).sum(axis=tuple(range(len(shape) - 1)))
        else:
            parts = [np.square(part) for part in weight.chunks()]
            rows, columns = (
                np.concatenate([part.sum(axis=1) for part in parts]),
                sum(part.sum(axis=0) for part in parts),
            )
        return cls(np.sqrt(rows), np.sqrt(columns), bool(not np.any(rows)))


def likely(before: Weight, mine: Profile, after: Weight, theirs: Profile) -> Iterator[tuple[float, Pair]]:
    """(how alike, pair) in each layout in which one tensor may be the other, or a part of it."""
    if mine.columns is None:
        if theirs.columns is None and len(mine.rows) <= len(theirs.rows):
            yield from _vectors(before, mine, after, theirs)
        return
    if theirs.columns is None:
        return
    layouts = ((theirs.rows, theirs.columns, False), (theirs.columns, theirs.rows, True))
    for rows, columns, turned in layouts:
        if turned and len(after.shape) > 2 and math.prod(after.shape) != math.prod(before.shape):
            continue
        other = math.prod(after.shape) // max(len(rows), 1)
        if other != before.flat[1] or len(rows) < len(mine.rows):
            continue
        across = correlation(mine.columns, columns) if len(columns) == len(mine.columns) else 0.0
        if len(rows) == len(mine.rows):
            along = correlation(mine.rows, rows)
            telling = [one for one, side in ((across, columns), (along, rows)) if len(side) >= FEWEST]
            if telling and (min(telling) >= _ALIKE or max(telling) >= _SURE):
                yield sum(telling) / len(telling), _pair(before, after, turned, 0, len(rows), len(rows))
        elif len(mine.rows) >= FEWEST:
            start, along = _best_place(mine.rows, rows)
            if along >= _SURE:
                yield along, _pair(before, after, turned, start, len(mine.rows), len(rows))


def _pair(before: Weight, after: Weight, turned: bool, start: int, count: int, of: int) -> Pair:
    return Pair(before, after, "content", turned, start, None if count == of else count)


def _vectors(before: Weight, mine: Profile, after: Weight, theirs: Profile) -> Iterator[tuple[float, Pair]]:
    count = len(mine.rows)
    if mine.constant:
        if theirs.constant and len(theirs.rows) == count and np.array_equal(mine.rows[:1], theirs.rows[:1]):
            yield 0.5, Pair(before, after, "content")
        return
    if count < 2:
        return
    start, along = _best_place(mine.rows, theirs.rows)
    close = np.linalg.norm(theirs.rows[start : start + count] - mine.rows) <= 0.2 * np.linalg.norm(mine.rows)
    if along >= _SURE and (close or count >= FEWEST):
        yield along, _pair(before, after, False, start, count, len(theirs.rows))


def _best_place(mine: np.ndarray, theirs: np.ndarray) -> tuple[int, float]:
    """Where in ``theirs`` a stretch is most like ``mine``, and how much."""
    if len(theirs) == len(mine):
        return 0, correlation(mine, theirs)
    step = math.gcd(len(mine), len(theirs))
    starts = range(0, len(theirs) - len(mine) + 1, step)
    found = [correlation(mine, theirs[start : start + len(mine)]) for start in starts]
    best = int(np.argmax(found))
    return starts[best], found[best]


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's, 0 where either is constant; of fewer than 3 numbers, 1 where they are nearly equal."""
    if len(left) < 3:
        return float(np.allclose(left, right, rtol=0.05, atol=1e-6))
    one, other = left - left.mean(), right - right.mean()
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms > 1e-12 * np.linalg.norm(left) * np.linalg.norm(right) else 0.0


def rows_alike(before: Weight, after: Weight) -> float:
    """The median of the rows' correlations."""
    old, new = (np.concatenate(list(one.chunks())) for one in (before, after))
    old, new = (one - one.mean(axis=1, keepdims=True) for one in (old, new))
    norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
    return float(np.median(np.divide((old * new).sum(axis=1), norms, out=np.zeros_like(norms), where=norms > 0)))
