"""How two models differ: on the same examples, of which outcomes belong together, or measured apart;
and whether a difference is worse, better, the same, or not yet known."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Estimate, Floats, bootstrap_interval

Statistic = Callable[[Floats, Floats], float]


def paired_difference(baseline: ArrayLike, candidate: ArrayLike, confidence: float = 0.9) -> Estimate:
    """The candidate's share of successes less the baseline's, from outcomes of 0 or 1 [n] of the same examples.

    The interval is that of `difference_of_shares`. Raises `ValueError` for lengths that differ, no example at
    all, or an outcome that is neither 0 nor 1.
    """
    only_baseline, only_candidate = discordant(baseline, candidate)
    return difference_of_shares(only_baseline, only_candidate, np.asarray(baseline).size, confidence)


def discordant(baseline: ArrayLike, candidate: ArrayLike) -> tuple[int, int]:
    """How many examples only the baseline and only the candidate gets right. Raises as `paired_difference`."""
    before, after = _paired(baseline, candidate)
    if not (np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()):
        raise ValueError("expected outcomes of 0 or 1")
    return int((before > after).sum()), int((after > before).sum())


def difference_of_shares(only_baseline: int, only_candidate: int, n: int, confidence: float = 0.9) -> Estimate:
    """(only_candidate - only_baseline) / n with its adjusted Wald interval (Agresti and Min 2005, section 2).

    Half an observation is added to each cell of the 2 x 2 table: with b, c = only_baseline + 1/2,
    only_candidate + 1/2 and N = n + 2, the interval is (c - b) / N ± z √(b + c - (c - b)² / N) / N. At 90% it
    says *worse* of two equally good models at most 5 times in 100, down to a handful of examples on which they
    differ; the tests count that out. Raises `ValueError` for counts that no table has.
    """
    if min(only_baseline, only_candidate) < 0 or n < 1 or only_baseline + only_candidate > n:
        raise ValueError(f"expected counts of at most n >= 1, found {only_baseline} and {only_candidate} of {n}")
    z, total = _quantile(confidence), n + 2
    value = (only_candidate - only_baseline) / n
    centre = (only_candidate - only_baseline) / total
    half = z * math.sqrt(only_baseline + only_candidate + 1 - (only_candidate - only_baseline) ** 2 / total) / total
    # The adjustment draws the centre to 0, never so far that the interval may leave the estimate out.
    return Estimate(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def mcnemar_mid_p(only_a: int, only_b: int) -> float:
    """Two-sided mid-p value that A and B are right equally often (Fagerland, Lydersen and Laake 2013).

    McNemar's exact p-value counts what was observed in full and so errs on the side of no
    difference; here half of it counts. Raises `ValueError` for negative counts.
    """
    return min(1.0, 2 * min(mcnemar_mid_p_one_sided(only_a, only_b), mcnemar_mid_p_one_sided(only_b, only_a)))


def mcnemar_mid_p_one_sided(only_a: int, only_b: int) -> float:
    """Mid-p value against *A is right more often than B*: P(X > only_a) + P(X = only_a) / 2, X ~ Binomial(n, 1/2).

    n counts the examples on which just one of the two is right. Raises `ValueError` for negative counts.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"expected counts, found {only_a} and {only_b}")
    n = only_a + only_b
    # By symmetry P(X >= a) = P(X <= n - a) = P(X <= b); whole numbers keep it exact.
    below = sum(math.comb(n, k) for k in range(only_b))
    return float((2 * below + math.comb(n, only_b)) / (1 << (n + 1)))


def paired_bootstrap(
    baseline: ArrayLike,
    candidate: ArrayLike,
    statistic: Statistic,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.9,
) -> Estimate:
    """``statistic(baseline, candidate)`` with its percentile bootstrap interval over whole examples (axis 0).

    An example is drawn with both of its values, so that what makes it hard for both cancels (Efron and Tibshirani
    1993, section 13.3). Raises `ValueError` for lengths that differ, no example, or values that are not finite.
    """
    before, after = _paired(baseline, candidate)

    def of_chosen(chosen: Floats) -> float:
        rows = chosen.astype(np.int64)
        return statistic(before[rows], after[rows])

    low, high = bootstrap_interval(np.arange(len(before)), of_chosen, seed, resamples, confidence)
    value = float(statistic(before, after))
    return Estimate(value, min(value, low), max(value, high))


def _paired(baseline: ArrayLike, candidate: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    before, after = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (baseline, candidate))
    if len(before) != len(after):
        raise ValueError(f"examples must pair: {len(before)} of the baseline and {len(after)} of the candidate")
    if not before.size:
        raise ValueError("expected at least one example")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("values hold NaN or infinity")
    return before, after


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, found {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def difference_of_estimates(baseline: Estimate, candidate: Estimate) -> Estimate:
    """candidate - baseline, with the interval that their own independent ones imply.

    MOVER (Zou and Donner 2008): low = d - √((candidate - its low)² + (baseline's high - baseline)²), high
    likewise. From Wilson intervals of two shares it is method 10 of Newcombe 1998. Confidence is that of the two.
    """
    value = candidate.value - baseline.value
    below = math.hypot(candidate.value - candidate.low, baseline.high - baseline.value)
    above = math.hypot(candidate.high - candidate.value, baseline.value - baseline.low)
    return Estimate(value, value - below, value + above)


def widen(estimate: Estimate, confidence: float, wanted: float) -> Estimate:
    """The estimate with its interval taken from ``confidence`` to ``wanted``, both sides by the normal quantiles."""
    normal = NormalDist()
    scale = normal.inv_cdf((1 + wanted) / 2) / normal.inv_cdf((1 + confidence) / 2)
    value, low, high = estimate
    return Estimate(value, value - (value - low) * scale, value + (high - value) * scale)


def logarithm(estimate: Estimate) -> Estimate:
    """Natural logarithms of a positive estimate and its bounds. Raises `ValueError` for others."""
    if not 0 < estimate.low <= estimate.value <= estimate.high < math.inf:
        raise ValueError(f"expected 0 < low <= value <= high, found {estimate}")
    return Estimate(*map(math.log, estimate))


def relative(log_ratio: Estimate) -> Estimate:
    """From the logarithm of a ratio to the ratio less 1: ln 1.05 -> 0.05."""
    return Estimate(*map(math.expm1, log_ratio))


def allow_for(estimate: Estimate, half: float) -> Estimate:
    """The estimate with a further independent uncertainty of ± ``half`` at the same confidence."""
    value, low, high = estimate
    return Estimate(value, value - math.hypot(value - low, half), value + math.hypot(high - value, half))


Verdict = Literal["better", "same", "worse", "can't tell"]
"""What a comparison says of one metric."""


def decide(loss: Estimate, margin: float) -> Verdict:
    """The verdict on a change whose positive direction is the bad one; ``margin`` is the smallest that matters.

    *worse* if the interval excludes 0 and the estimate reaches the margin, *better* likewise on the other side,
    *same* if the whole interval lies within the margin on both sides (equivalence by two one-sided tests,
    Schuirmann 1987), else *can't tell*. With a margin of 0 any change that the interval shows counts, and *same*
    is an interval of width 0. Raises `ValueError` for a negative margin or values that are no interval.
    """
    if not margin >= 0:
        raise ValueError(f"expected a margin of at least 0, found {margin}")
    if not loss.low <= loss.value <= loss.high:
        raise ValueError(f"expected low <= value <= high, found {loss}")
    if loss.low > 0 and loss.value >= margin:
        return "worse"
    if loss.high < 0 and loss.value <= -margin:
        return "better"
    if (-margin < loss.low and loss.high < margin) or loss.low == loss.high == 0:
        return "same"
    return "can't tell"


def samples_to_settle(loss: Estimate, margin: float, n: int) -> int | None:
    """How many samples beyond ``n`` should turn *can't tell* into a verdict, if the estimate stays where it is.

    The interval narrows with the square root of the samples. It has to get narrower than the distance to 0 if
    the estimate reaches the margin, and than the distance to the margin otherwise. ``None`` where no number of samples
    would do (the estimate is at the margin itself, or at 0 with a margin of 0); 0 where it is settled already.
    """
    if decide(loss, margin) != "can't tell":
        return 0
    half = max(loss.high - loss.value, loss.value - loss.low)
    wanted = abs(loss.value) if abs(loss.value) >= margin else margin - abs(loss.value)
    if wanted <= 0 or not math.isfinite(half / wanted):
        return None
    return max(1, math.ceil(n * (half / wanted) ** 2) - n)
