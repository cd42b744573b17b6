"""Two-sample tests: exact or calibrated p-values, effect sizes, and corrections for multiple testing.

Rows are the unit of observation and are independent of each other. A permutation test is exact for any
distribution: if both samples come from one source, every split of all rows is as likely as the observed one. Its
p-value counts the observed split too, (1 + as extreme) / (1 + permutations), and so is never 0 (Phipson and Smyth
2010). Once a p-value cannot become small any more, the remaining permutations are skipped (Besag and Clifford
1991).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from compress.numerics.statistics import Floats, IntervalEstimate

PERMUTATIONS = 4999
_AT_ONCE = 500
_ENOUGH = 50
"""Number of permutations as extreme as the observation after which sampling stops: the p-value is above 1% then."""
_MOST_PARTS = 1000
_SAME = 1e-7
_EXACT = 10_000
"""Product of both sizes up to which the Kolmogorov-Smirnov distribution is computed exactly."""


class Tested(NamedTuple):
    """Effect size of the difference of two samples, and its p-value."""

    effect: float
    p_value: float


def kolmogorov_smirnov(reference: ArrayLike, recent: ArrayLike) -> Tested:
    """Return the largest distance of the distribution functions of numbers [n] and [m], 0 to 1.

    The p-value is exact for small samples, else the asymptotic one (Hodges 1958); ties make it conservative.
    """
    from scipy.stats import ks_2samp

    reference_values, recent_values = _finite(reference), _finite(recent)
    # Exact computation is quadratic in the sizes.
    result = ks_2samp(
        reference_values,
        recent_values,
        method="exact" if len(reference_values) * len(recent_values) <= _EXACT else "asymp",
    )
    return Tested(float(result.statistic), min(1.0, float(result.pvalue)))


class Means(NamedTuple):
    """Growth of each column's mean in standard deviations of all rows, and its p-value corrected for all columns."""

    effects: Floats
    p_values: Floats


def grown_means(reference: ArrayLike, recent: ArrayLike, seed: int, permutations: int = PERMUTATIONS) -> Means:
    """Test whether the mean of any column grew, for rows [n, columns] and [m, columns].

    A column's p-value is the share of permutations whose *largest* growth over all columns reaches its own. It is
    corrected for the number of columns and their dependence (Westfall and Young 1993, chapter 2, single-step maxT). A
    constant column has an effect of 0 and a p-value of 1.

    Args:
        reference: Rows of the reference [n, columns].
        recent: Recent rows [m, columns].
        seed: Seed of the permutations.
        permutations: Maximum number of permutations.
    """
    reference_rows, recent_rows = (
        _finite(values).reshape(len(values), -1) for values in map(np.asarray, (reference, recent))
    )
    rows = np.concatenate([reference_rows, recent_rows])
    spread = rows.std(axis=0)
    # What is left of equal values by rounding is no spread.
    spread = np.where(spread > _SAME * np.abs(rows).max(axis=0), spread, 0.0)
    # Standardise columns; constant ones become 0.
    scaled = np.divide(rows - rows.mean(axis=0), spread, out=np.zeros_like(rows), where=spread > 0).astype(np.float32)
    n, m = len(reference_rows), len(recent_rows)

    def growth(chosen: np.ndarray) -> np.ndarray:
        # Columns add up to 0, so that what is not chosen is known too.
        return np.asarray((chosen @ scaled) * np.float32(1 / m + 1 / n))

    observed = growth(_own(n, m))[0]
    # Allow for rounding when a permutation is exactly as extreme.
    limit = observed - _slack(observed)
    p_values = _p_values(lambda chosen: growth(chosen).max(axis=1)[:, None] >= limit, n, m, seed, permutations)
    return Means(observed.astype(np.float64), np.where(spread > 0, p_values, 1.0))


def class_shares(
    reference: ArrayLike, recent: ArrayLike, classes: int, seed: int, permutations: int = PERMUTATIONS
) -> Tested:
    """Test whether classes [n] and [m], ids below ``classes``, have the same shares.

    The statistic is Pearson's chi-square of the table of both, with its permutation distribution, so that rare classes
    do no harm. The effect is Cohen's w, sqrt(chi-square / rows) (Cohen 1988, section 7.2): 0.1 is small, 0.3 medium,
    0.5 large.

    Args:
        reference: Class ids of the reference [n].
        recent: Recent class ids [m].
        classes: Number of classes.
        seed: Seed of the permutations.
        permutations: Maximum number of permutations.
    """
    reference_ids, recent_ids = (np.asarray(ids, dtype=np.int64) for ids in (reference, recent))
    # One-hot rows, so that a product counts classes.
    rows = np.eye(classes, dtype=np.float32)[np.concatenate([reference_ids, recent_ids])]
    total, n, m = rows.sum(axis=0), len(reference_ids), len(recent_ids)
    # Classes without a row contribute nothing.
    rows, total = rows[:, total > 0], total[total > 0]

    def chi_square(chosen: np.ndarray) -> np.ndarray:
        counts = chosen @ rows
        # Both rows of the table are as far from what is expected, and over n and over m this adds up.
        return np.asarray((np.square(counts - total * m / (n + m)) / (total * n * m / (n + m) ** 2)).sum(axis=1))

    observed = float(chi_square(_own(n, m))[0])
    return Tested(float(np.sqrt(observed / (n + m))), _p_value(chi_square, observed, n, m, seed, permutations))


def mean_discrepancy(gram: np.ndarray, n: int, seed: int, permutations: int = PERMUTATIONS) -> Tested:
    """Test whether two samples have the same distribution, given their kernel matrix [n + m, n + m].

    The statistic is the unbiased maximum mean discrepancy (Gretton et al. 2012, Lemma 6). The effect is its ratio to
    the mean of the kernel's diagonal minus that of all pairs, so that two samples of one point each have the effect 1.

    Args:
        gram: Kernel of all pairs of rows; the first ``n`` rows are the reference.
        n: Number of reference rows.
        seed: Seed of the permutations.
        permutations: Maximum number of permutations.
    """
    size = len(gram)
    m = size - n
    kernel = gram.astype(np.float32)
    # The unbiased estimate excludes pairs of a row with itself.
    np.fill_diagonal(kernel, 0)
    columns, whole = kernel.sum(axis=0), float(kernel.sum(dtype=np.float64))

    def discrepancy(chosen: np.ndarray) -> np.ndarray:
        within = np.einsum("pn,pn->p", chosen @ kernel, chosen)
        # Sums within the recent rows, across, and within the reference follow from column sums.
        across = chosen @ columns - within
        within_reference = whole - within - 2 * across
        return np.asarray(within / (m * (m - 1)) + within_reference / (n * (n - 1)) - 2 * across / (n * m))

    observed = float(discrepancy(_own(n, m))[0])
    spread = float(np.diag(gram).mean()) - whole / (size * (size - 1))
    effect = max(0.0, observed) / spread if spread > 0 else 0.0
    return Tested(effect, _p_value(discrepancy, observed, n, m, seed, permutations))


def gaussian_kernel(rows: np.ndarray) -> np.ndarray:
    """Return exp(-|x - y|² / 2 s²) of all pairs of rows [n, d], s their median distance.

    Gretton et al. 2012, section 8.
    """
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * (rows @ rows.T).astype(np.float64), 0)
    middle = float(np.median(distances[np.triu_indices(len(rows), 1)]))
    return np.asarray(np.exp(-distances / (middle or 1.0)))


def holm(p_values: ArrayLike) -> Floats:
    """Return p-values [k] of simultaneous tests, adjusted for the family-wise error rate.

    Among k true hypotheses, at least one is rejected at ``level`` with a probability of at most ``level``, whatever
    their dependence (Holm 1979): the i-th smallest is multiplied by k - i + 1, and never falls below the one before it.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    raised = np.minimum(1.0, values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(raised)
    return adjusted


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise ValueError("expected one or more finite values")
    return array


def _own(n: int, m: int) -> np.ndarray:
    """Return the mask of recent rows as a permutation, [1, n + m]."""
    return np.repeat(np.array([[0, 1]], dtype=np.float32), [n, m], axis=1)


@lru_cache(maxsize=12)
def _splits(n: int, m: int, seed: int) -> np.ndarray:
    """Return random selections of ``m`` of all rows, [_AT_ONCE, n + m] of 0 and 1."""
    random_keys = np.random.default_rng(seed).random((_AT_ONCE, n + m), dtype=np.float32)
    chosen = np.zeros((_AT_ONCE, n + m), dtype=np.float32)
    # The m largest of random keys are a random subset.
    np.put_along_axis(chosen, np.argpartition(random_keys, m - 1, axis=1)[:, :m], np.float32(1), axis=1)
    return chosen


def _p_values(reaches: Callable[[np.ndarray], np.ndarray], n: int, m: int, seed: int, permutations: int) -> Floats:
    """Return permutation p-values of k statistics.

    Args:
        reaches: Returns for some permutations whether each statistic is as extreme as observed, [some, k].
        n: Number of reference rows.
        m: Number of recent rows.
        seed: Seed of the permutations.
        permutations: Maximum number of permutations.
    """
    reached, done = np.zeros(1, dtype=np.int64), 0
    for number, start in enumerate(range(0, permutations, _AT_ONCE)):
        # Parts have seeds of their own, so that tests of the same sizes share them.
        chosen = _splits(n, m, seed * _MOST_PARTS + number)[: permutations - start]
        reached = reached + reaches(chosen).sum(axis=0)
        done += len(chosen)
        # The smallest p-value is above 1% by now.
        if reached.min() >= _ENOUGH:
            break
    return np.asarray((1 + reached) / (1 + done), dtype=np.float64)


def _p_value(
    statistic: Callable[[np.ndarray], np.ndarray], observed: float, n: int, m: int, seed: int, permutations: int
) -> float:
    """Return the permutation p-value of one statistic with an observed value.

    Args:
        statistic: Statistic of some permutations.
        observed: Observed value.
        n: Number of reference rows.
        m: Number of recent rows.
        seed: Seed of the permutations.
        permutations: Maximum number of permutations.
    """
    limit = observed - float(_slack(np.array(observed)))
    return float(_p_values(lambda chosen: (statistic(chosen) >= limit)[:, None], n, m, seed, permutations)[0])


def _slack(observed: np.ndarray) -> np.ndarray:
    """Return the tolerance for rounding errors of statistics in single precision."""
    return np.asarray(1e-5 * np.abs(observed) + 1e-9)


_STAKES = np.concatenate([part := np.geomspace(0.01, 0.5, 24), -part])
_EDGE = 1 - 1e-12
"""Mean that stands for outcomes that are all equal, slightly inside so that no stake loses everything."""
_HALVINGS = 20


def log_wealth(wins: int, losses: int, ties: int, mean: float) -> float:
    """Return the logarithm of the wealth of bets against ``mean`` being the mean of outcomes of 1, -1 and 0.

    A stake s turns 1 into prod(1 + s (outcome - mean)), which is fair for any distribution with that mean, also
    conditionally on earlier outcomes (Waudby-Smith and Ramdas 2024, section 4.1). Stakes of at most 1/2 in either
    direction cannot go into debt. They are mixed evenly (there: diversified Kelly betting), densely at 0, so that small
    differences pay.

    Args:
        wins: Number of outcomes 1.
        losses: Number of outcomes -1.
        ties: Number of outcomes 0.
        mean: Mean to refute.
    """
    logarithms = (
        wins * np.log1p(_STAKES * (1 - mean))
        + losses * np.log1p(_STAKES * (-1 - mean))
        + ties * np.log1p(-_STAKES * mean)
    )
    # Log-sum-exp of the mixture.
    largest = float(logarithms.max())
    return largest + math.log(float(np.exp(logarithms - largest).mean()))


def mean_sequence(wins: int, losses: int, ties: int, confidence: float = 0.95) -> IntervalEstimate:
    """Return the mean of outcomes of 1, -1 and 0 with its confidence sequence.

    The order of outcomes does not matter.

    Args:
        wins: Number of outcomes 1.
        losses: Number of outcomes -1.
        ties: Number of outcomes 0.
        confidence: Confidence level.

    Raises:
        ValueError: If there are no outcomes.
    """
    total = wins + losses + ties
    if total < 1 or min(wins, losses, ties) < 0:
        raise ValueError(f"expected counts of one or more outcomes, found {wins}, {losses} and {ties}")
    # The wealth refutes a mean once it reaches 1 / (1 - confidence).
    value, limit = (wins - losses) / total, -math.log(1 - confidence)

    def refuted(mean: float) -> bool:
        return log_wealth(wins, losses, ties, mean) >= limit

    return IntervalEstimate(value, _end(value, -_EDGE, refuted), _end(value, _EDGE, refuted))


def _end(inside: float, outside: float, refuted: Callable[[float], bool]) -> float:
    """Return the point at which means start to be refuted on the way to ``outside``.

    The means that are not refuted form an interval: the wealth of a stake is a product of linear functions with slopes
    of one sign, hence convex, and so is the sum.
    """
    if not refuted(outside):
        return math.copysign(1.0, outside)
    low, high = inside, outside
    # Bisection between a mean that is not refuted and one that is.
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def log_even_odds(below: int, above: int) -> float:
    """Return the logarithm of the wealth of bets against even odds: the beta mixture 2^n B(below + 1, above + 1).

    Robbins 1970, section 2; Howard, Ramdas, McAuliffe and Sekhon 2021, section 3.2, beta-binomial mixtures.
    """
    n = below + above
    return n * math.log(2) + math.lgamma(below + 1) + math.lgamma(above + 1) - math.lgamma(n + 2)


def median_sequence(values: Sequence[float], confidence: float = 0.95) -> IntervalEstimate:
    """Return the median of independent values with its confidence sequence, infinite while there are too few values.

    A value is below the median as often as above it: the positions that `log_even_odds` has not refuted are between two
    order statistics (Howard and Ramdas 2022, section 2). Values equal to the median count half on either side.
    """
    ordered, limit = np.sort(np.asarray(values, dtype=np.float64)), -math.log(1 - confidence)
    n = len(ordered)
    if not n:
        raise ValueError("expected one or more values")
    # Smallest number of values below the median that is not refuted.
    fewest = next((k for k in range(n // 2 + 1) if log_even_odds(k, n - k) < limit), n // 2)
    value = float(np.median(ordered))
    if not fewest:
        return IntervalEstimate(value, -np.inf, np.inf)
    return IntervalEstimate(value, float(ordered[fewest - 1]), float(ordered[n - fewest]))
