"""Anytime-valid tests: they may be evaluated after every observation and stopped at any time.

A wealth that starts at 1 and is constant in expectation reaches 1 / level with a probability of at most ``level``
at any time (Ville 1939). Bets at fair odds that gain such a wealth refute the odds. The odds that were never
refuted form a confidence sequence, which holds at all times simultaneously.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from compress.numerics.statistics import Estimate

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


def mean_sequence(wins: int, losses: int, ties: int, confidence: float = 0.95) -> Estimate:
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

    return Estimate(value, _end(value, -_EDGE, refuted), _end(value, _EDGE, refuted))


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


def median_sequence(values: Sequence[float], confidence: float = 0.95) -> Estimate:
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
        return Estimate(value, -np.inf, np.inf)
    return Estimate(value, float(ordered[fewest - 1]), float(ordered[n - fewest]))
