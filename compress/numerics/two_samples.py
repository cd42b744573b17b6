"""Whether two samples come from one source: tests that are exact or calibrated, effect sizes, and their correction.

Rows are the unit throughout: those of one sample are independent of each other, whatever each is made of. A test by
permutations is exact for samples of any distribution: where both come from one source, any split of all rows is as
likely as the one that was found. Its p-value counts that one too, (1 + as extreme) / (1 + permutations), and so is not
0 (Phipson and Smyth 2010). Where a p-value can't become small any more, the rest of the permutations is left out (Besag
and Clifford 1991).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from compress.numerics.statistics import Floats

PERMUTATIONS = 4999
_AT_ONCE = 500
_ENOUGH = 50
"""Permutations as extreme as what was found, after which there are no more: a p-value above 1% is known well enough."""
_MOST_PARTS = 1000
_SAME = 1e-7
_EXACT = 10_000
"""Up to such a product of both sizes Kolmogorov and Smirnov's distribution is counted out."""


class Tested(NamedTuple):
    """How far apart two samples are, and how often chance alone would part them as much."""

    effect: float
    p_value: float


def kolmogorov_smirnov(reference: ArrayLike, recent: ArrayLike) -> Tested:
    """The greatest distance of both distribution functions, 0 to 1, of numbers [n] and [m].

    Exact for small samples, else by its limit (Hodges 1958); values that are equal make it cautious.
    """
    from scipy.stats import ks_2samp

    before, now = _finite(reference), _finite(recent)
    found = ks_2samp(before, now, method="exact" if len(before) * len(now) <= _EXACT else "asymp")
    return Tested(float(found.statistic), min(1.0, float(found.pvalue)))


class Means(NamedTuple):
    """Of each column: how much the mean grew in standard deviations of all rows, and its p-value among all columns."""

    effects: Floats
    p_values: Floats


def grown_means(reference: ArrayLike, recent: ArrayLike, seed: int, permutations: int = PERMUTATIONS) -> Means:
    """Whether the mean of any column grew, of rows [n, columns] and [m, columns].

    A column's p-value is the share of permutations whose *largest* growth of all columns reaches its own: corrected for
    the number of columns, and for how they hang together (Westfall and Young 1993, chapter 2, single-step maxT). A
    column that is constant has an effect of 0 and a p-value of 1.
    """
    before, now = (_finite(values).reshape(len(values), -1) for values in map(np.asarray, (reference, recent)))
    rows = np.concatenate([before, now])
    spread = rows.std(axis=0)
    # What is left of equal values by rounding is no spread.
    spread = np.where(spread > _SAME * np.abs(rows).max(axis=0), spread, 0.0)
    scaled = np.divide(rows - rows.mean(axis=0), spread, out=np.zeros_like(rows), where=spread > 0).astype(np.float32)
    n, m = len(before), len(now)

    def growth(chosen: np.ndarray) -> np.ndarray:
        # Columns add up to 0, so that what is not chosen is known too.
        found: np.ndarray = (chosen @ scaled) * np.float32(1 / m + 1 / n)
        return found

    own = growth(_own(n, m))[0]
    limit = own - _slack(own)
    p_values = _p_values(lambda chosen: growth(chosen).max(axis=1)[:, None] >= limit, n, m, seed, permutations)
    return Means(own.astype(np.float64), np.where(spread > 0, p_values, 1.0))


def class_shares(
    reference: ArrayLike, recent: ArrayLike, classes: int, seed: int, permutations: int = PERMUTATIONS
) -> Tested:
    """Whether classes [n] and [m], ids below ``classes``, come in the same shares.

    Pearson's chi-square of the table of both, its distribution by permutations, so that rare classes do no harm. The
    effect is Cohen's w, sqrt(chi-square / rows) (Cohen 1988, section 7.2): 0.1 is small, 0.3 medium, 0.5 large.
    """
    before, now = (np.asarray(ids, dtype=np.int64) for ids in (reference, recent))
    rows = np.eye(classes, dtype=np.float32)[np.concatenate([before, now])]
    total, n, m = rows.sum(axis=0), len(before), len(now)
    rows, total = rows[:, total > 0], total[total > 0]

    def chi_square(chosen: np.ndarray) -> np.ndarray:
        counts = chosen @ rows
        # Both rows of the table are as far from what is expected, and over n and over m this adds up.
        found: np.ndarray = (np.square(counts - total * m / (n + m)) / (total * n * m / (n + m) ** 2)).sum(axis=1)
        return found

    own = float(chi_square(_own(n, m))[0])
    return Tested(float(np.sqrt(own / (n + m))), _p_value(chi_square, own, n, m, seed, permutations))


def mean_discrepancy(gram: np.ndarray, n: int, seed: int, permutations: int = PERMUTATIONS) -> Tested:
    """Whether two samples have the same distribution in all their dimensions, by their kernel [n + m, n + m].

    The first ``n`` rows are the reference. The statistic is the unbiased maximum mean discrepancy (Gretton et al. 2012,
    Lemma 6), the effect its share of the mean of the kernel within samples less that of all pairs, so that 1 are
    samples of two points.
    """
    size = len(gram)
    m = size - n
    kernel = gram.astype(np.float32)
    np.fill_diagonal(kernel, 0)
    columns, whole = kernel.sum(axis=0), float(kernel.sum(dtype=np.float64))

    def discrepancy(chosen: np.ndarray) -> np.ndarray:
        within = np.einsum("pn,pn->p", chosen @ kernel, chosen)
        across = chosen @ columns - within
        rest = whole - within - 2 * across
        found: np.ndarray = within / (m * (m - 1)) + rest / (n * (n - 1)) - 2 * across / (n * m)
        return found

    own = float(discrepancy(_own(n, m))[0])
    spread = float(np.diag(gram).mean()) - whole / (size * (size - 1))
    effect = max(0.0, own) / spread if spread > 0 else 0.0
    return Tested(effect, _p_value(discrepancy, own, n, m, seed, permutations))


def gaussian_kernel(rows: np.ndarray) -> np.ndarray:
    """exp(-|x - y|² / 2 s²) of all pairs of rows [n, d], s their median distance (Gretton et al. 2012, section 8)."""
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * (rows @ rows.T).astype(np.float64), 0)
    middle = float(np.median(distances[np.triu_indices(len(rows), 1)]))
    found: np.ndarray = np.exp(-distances / (middle or 1.0))
    return found


def holm(p_values: ArrayLike) -> Floats:
    """p-values [k] that were looked at together, each raised so that one at most ``level`` is true of all of them.

    Of k true hypotheses one is then refuted in at most ``level`` of all cases, however they depend on each other (Holm
    1979): the i-th smallest is multiplied by k - i + 1, and never falls below the one before it.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.minimum(1.0, values[order] * (len(values) - np.arange(len(values))))
    found = np.empty_like(values)
    found[order] = np.maximum.accumulate(raised)
    return found


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError("expected one or more finite values")
    return array


def _own(n: int, m: int) -> np.ndarray:
    """Which rows are recent, as a permutation of its own, [1, n + m]."""
    return np.repeat(np.array([[0, 1]], dtype=np.float32), [n, m], axis=1)


@lru_cache(maxsize=12)
def _splits(n: int, m: int, seed: int) -> np.ndarray:
    """Some ways to choose ``m`` of all rows, [_AT_ONCE, n + m] of 0 and 1."""
    drawn = np.random.default_rng(seed).random((_AT_ONCE, n + m), dtype=np.float32)
    chosen = np.zeros((_AT_ONCE, n + m), dtype=np.float32)
    np.put_along_axis(chosen, np.argpartition(drawn, m - 1, axis=1)[:, :m], np.float32(1), axis=1)
    return chosen


def _p_values(reaches: Callable[[np.ndarray], np.ndarray], n: int, m: int, seed: int, permutations: int) -> Floats:
    """Of what permutations may reach, [k], as ``reaches`` says of some of them, [some, k]."""
    reached, done = np.zeros(1, dtype=np.int64), 0
    for number, start in enumerate(range(0, permutations, _AT_ONCE)):
        # Parts have seeds of their own, so that tests of the same sizes share them.
        chosen = _splits(n, m, seed * _MOST_PARTS + number)[: permutations - start]
        reached = reached + reaches(chosen).sum(axis=0)
        done += len(chosen)
        if reached.min() >= _ENOUGH:
            break
    return np.asarray((1 + reached) / (1 + done), dtype=np.float64)


def _p_value(
    statistic: Callable[[np.ndarray], np.ndarray], own: float, n: int, m: int, seed: int, permutations: int
) -> float:
    limit = own - float(_slack(np.array(own)))
    return float(_p_values(lambda chosen: (statistic(chosen) >= limit)[:, None], n, m, seed, permutations)[0])


def _slack(own: np.ndarray) -> np.ndarray:
    """What rounding may take from a permutation that is as extreme: sums are in single precision."""
    found: np.ndarray = 1e-5 * np.abs(own) + 1e-9
    return found
