"""Differences of two models, paired by example or independent, and verdicts: worse, better, same or inconclusive."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Floats, IntervalEstimate, bootstrap_interval

Statistic = Callable[[Floats, Floats], float]


def paired_difference(baseline: ArrayLike, candidate: ArrayLike, confidence: float = 0.9) -> IntervalEstimate:
    """Return the candidate's success rate minus the baseline's, from outcomes of 0 or 1 [n] on the same examples.

    The interval is that of `difference_of_shares`. Raises `ValueError` for unequal lengths, no example, or an outcome
    that is neither 0 nor 1.
    """
    only_baseline, only_candidate = discordant(baseline, candidate)
    return difference_of_shares(only_baseline, only_candidate, np.asarray(baseline).size, confidence)


def discordant(baseline: ArrayLike, candidate: ArrayLike) -> tuple[int, int]:
    """Return the numbers of examples that only the baseline and only the candidate gets right.

    Raises `ValueError` as `paired_difference` does.
    """
    baseline_outcomes, candidate_outcomes = _paired(baseline, candidate)
    if not (np.isin(baseline_outcomes, (0.0, 1.0)).all() and np.isin(candidate_outcomes, (0.0, 1.0)).all()):
        raise ValueError("expected outcomes of 0 or 1")
    return int((baseline_outcomes > candidate_outcomes).sum()), int((candidate_outcomes > baseline_outcomes).sum())


def difference_of_shares(only_baseline: int, only_candidate: int, n: int, confidence: float = 0.9) -> IntervalEstimate:
    """Return (only_candidate - only_baseline) / n with its adjusted Wald interval (Agresti and Min 2005, section 2).

    Half an observation is added to each cell of the 2 x 2 table: with b, c = only_baseline + 1/2, only_candidate + 1/2
    and N = n + 2, the interval is (c - b) / N ± z √(b + c - (c - b)² / N) / N. At 90% it calls the better of two
    equally good models *worse* at most 5 times in 100, down to a handful of discordant examples; the tests verify that
    by enumeration.

    Args:
        only_baseline: Examples that only the baseline gets right.
        only_candidate: Examples that only the candidate gets right.
        n: Number of all examples.
        confidence: Confidence level.

    Raises:
        ValueError: If no table has these counts.
    """
    if min(only_baseline, only_candidate) < 0 or n < 1 or only_baseline + only_candidate > n:
        raise ValueError(f"expected counts of at most n >= 1, found {only_baseline} and {only_candidate} of {n}")
    # Half an observation per cell adds two observations in total.
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, found {confidence}")
    z, total = NormalDist().inv_cdf((1 + confidence) / 2), n + 2
    value = (only_candidate - only_baseline) / n
    centre = (only_candidate - only_baseline) / total
    half = z * math.sqrt(only_baseline + only_candidate + 1 - (only_candidate - only_baseline) ** 2 / total) / total
    # The adjustment draws the centre to 0, never so far that the interval may leave the estimate out.
    return IntervalEstimate(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def mcnemar_mid_p(only_a: int, only_b: int) -> float:
    """Return the two-sided mid-p value that A and B are right equally often (Fagerland, Lydersen and Laake 2013).

    McNemar's exact p-value counts the observed table in full and is therefore conservative; here half of it counts.
    Raises `ValueError` for negative counts.
    """
    return min(1.0, 2 * min(mcnemar_mid_p_one_sided(only_a, only_b), mcnemar_mid_p_one_sided(only_b, only_a)))


def mcnemar_mid_p_one_sided(only_a: int, only_b: int) -> float:
    """Return the mid-p value against *A is right more often than B*.

    P(X > only_a) + P(X = only_a) / 2, X ~ Binomial(n, 1/2), where n is the number of examples on which exactly one of
    the two is right. Raises `ValueError` for negative counts.
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
) -> IntervalEstimate:
    """Return ``statistic(baseline, candidate)`` with its percentile bootstrap interval over examples (axis 0).

    An example is resampled with both of its values, so that difficulty shared by both cancels (Efron and Tibshirani
    1993, section 13.3).

    Args:
        baseline: Values of the baseline [n, ...].
        candidate: Values of the candidate [n, ...].
        statistic: Function of resampled values of both.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level.

    Raises:
        ValueError: For unequal lengths, no example, or values that are not finite.
    """
    baseline_values, candidate_values = _paired(baseline, candidate)

    def of_chosen(chosen: Floats) -> float:
        rows = chosen.astype(np.int64)
        return statistic(baseline_values[rows], candidate_values[rows])

    # Resample indices, so that both values of an example stay together.
    low, high = bootstrap_interval(np.arange(len(baseline_values)), of_chosen, seed, resamples, confidence)
    value = float(statistic(baseline_values, candidate_values))
    return IntervalEstimate(value, min(value, low), max(value, high))


def _paired(baseline: ArrayLike, candidate: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (baseline, candidate))
    if len(first) != len(second):
        raise ValueError(f"examples must pair: {len(first)} of the baseline and {len(second)} of the candidate")
    if not first.size:
        raise ValueError("expected at least one example")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("values hold NaN or infinity")
    return first, second


def difference_of_estimates(baseline: IntervalEstimate, candidate: IntervalEstimate) -> IntervalEstimate:
    """Return candidate - baseline with the interval implied by their independent intervals.

    MOVER (Zou and Donner 2008): low = d - √((candidate - its low)² + (baseline's high - baseline)²), high likewise.
    From Wilson intervals of two proportions it is method 10 of Newcombe 1998. The confidence is that of the two.
    """
    value = candidate.value - baseline.value
    below = math.hypot(candidate.value - candidate.low, baseline.high - baseline.value)
    above = math.hypot(candidate.high - candidate.value, baseline.value - baseline.low)
    return IntervalEstimate(value, value - below, value + above)


def widen(estimate: IntervalEstimate, confidence: float, wanted: float) -> IntervalEstimate:
    """Return the estimate with its interval rescaled from ``confidence`` to ``wanted`` by normal quantiles."""
    normal = NormalDist()
    # Widths are proportional to normal quantiles.
    scale = normal.inv_cdf((1 + wanted) / 2) / normal.inv_cdf((1 + confidence) / 2)
    value, low, high = estimate
    return IntervalEstimate(value, value - (value - low) * scale, value + (high - value) * scale)


def logarithm(estimate: IntervalEstimate) -> IntervalEstimate:
    """Return the natural logarithms of a positive estimate and its bounds. Raises `ValueError` for other values."""
    if not 0 < estimate.low <= estimate.value <= estimate.high < math.inf:
        raise ValueError(f"expected 0 < low <= value <= high, found {estimate}")
    return IntervalEstimate(*map(math.log, estimate))


def relative(log_ratio: IntervalEstimate) -> IntervalEstimate:
    """Convert the logarithm of a ratio to the ratio minus 1: ln 1.05 -> 0.05."""
    return IntervalEstimate(*map(math.expm1, log_ratio))


def allow_for(estimate: IntervalEstimate, half: float) -> IntervalEstimate:
    """Return the estimate with a further independent uncertainty of ± ``half`` at the same confidence."""
    value, low, high = estimate
    return IntervalEstimate(value, value - math.hypot(value - low, half), value + math.hypot(high - value, half))


Verdict = Literal["better", "same", "worse", "can't tell"]
"""Result of a comparison of one metric."""


def decide(loss: IntervalEstimate, margin: float) -> Verdict:
    """Return the verdict on a change for which positive is worse; ``margin`` is the smallest relevant change.

    *worse* if the interval excludes 0 and the estimate reaches the margin; *better* likewise on the other side; *same*
    if the whole interval is within the margin on both sides (equivalence by two one-sided tests, Schuirmann 1987);
    otherwise *can't tell*. With a margin of 0 every significant change counts, and *same* needs an interval of width 0.

    Raises:
        ValueError: For a negative margin or an invalid interval.
    """
    if not margin >= 0:
        raise ValueError(f"expected a margin of at least 0, found {margin}")
    if not loss.low <= loss.value <= loss.high:
        raise ValueError(f"expected low <= value <= high, found {loss}")
    # A change must be both significant and large enough.
    if loss.low > 0 and loss.value >= margin:
        return "worse"
    if loss.high < 0 and loss.value <= -margin:
        return "better"
    # Equivalence: the whole interval is within the margin.
    if (-margin < loss.low and loss.high < margin) or loss.low == loss.high == 0:
        return "same"
    return "can't tell"


def samples_to_settle(loss: IntervalEstimate, margin: float, n: int) -> int | None:
    """Return the number of samples beyond ``n`` that should turn *can't tell* into a verdict if the estimate stays.

    The interval narrows with the square root of the number of samples. It must become narrower than the distance to 0
    if the estimate reaches the margin, and than the distance to the margin otherwise. ``None`` if no number of samples
    suffices (the estimate is at the margin, or at 0 with a margin of 0); 0 if there is a verdict already.
    """
    if decide(loss, margin) != "can't tell":
        return 0
    # Use the wider side of the interval.
    half = max(loss.high - loss.value, loss.value - loss.low)
    required_half_width = abs(loss.value) if abs(loss.value) >= margin else margin - abs(loss.value)
    if required_half_width <= 0 or not math.isfinite(half / required_half_width):
        return None
    return max(1, math.ceil(n * (half / required_half_width) ** 2) - n)
