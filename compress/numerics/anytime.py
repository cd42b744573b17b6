"""Tests that may be looked at after every observation, and ended whenever one likes.

A wealth that starts at 1 and on average stays what it is reaches 1 / level with a probability of at most ``level``, at
whatever time (Ville 1939). What a bet at fair odds makes of such a wealth refutes the odds; the odds that were never
refuted are a confidence sequence: it holds at all times at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from compress.numerics.statistics import Estimate

_STAKES = np.concatenate([part := np.geomspace(0.01, 0.5, 24), -part])
_EDGE = 1 - 1e-12
"""The mean of outcomes that are all alike, but that no stake is lost whole against."""
_HALVINGS = 20


def log_wealth(wins: int, losses: int, ties: int, mean: float) -> float:
    """Logarithm of the wealth that outcomes of 1, -1 and 0 leave to bets against their mean being ``mean``.

    A stake s makes prod(1 + s (outcome - mean)) of 1, which is fair whatever the outcomes' distribution, as long as
    their mean is that, also given those before (Waudby-Smith and Ramdas 2024, section 4.1). Stakes up to 1/2 either way
    owe nothing; they are mixed evenly (there: diversified Kelly betting), dense at 0, so that small differences pay.
    """
    logarithms = (
        wins * np.log1p(_STAKES * (1 - mean))
        + losses * np.log1p(_STAKES * (-1 - mean))
        + ties * np.log1p(-_STAKES * mean)
    )
    largest = float(logarithms.max())
    return largest + math.log(float(np.exp(logarithms - largest).mean()))


def mean_sequence(wins: int, losses: int, ties: int, confidence: float = 0.95) -> Estimate:
    """The mean of outcomes of 1, -1 and 0 with its confidence sequence, from how many there were of each.

    It doesn't matter in which order they came. Raises `ValueError` for none at all.
    """
    total = wins + losses + ties
    if total < 1 or min(wins, losses, ties) < 0:
        raise ValueError(f"expected counts of one or more outcomes, found {wins}, {losses} and {ties}")
    value, limit = (wins - losses) / total, -math.log(1 - confidence)

    def refuted(mean: float) -> bool:
        return log_wealth(wins, losses, ties, mean) >= limit

    return Estimate(value, _end(value, -_EDGE, refuted), _end(value, _EDGE, refuted))


def _end(inside: float, outside: float, refuted: Callable[[float], bool]) -> float:
    """Where means begin to be refuted on the way to ``outside``.

    What is not refuted is an interval: a stake's wealth is a product of lines that all fall with the mean, or all rise,
    and so is convex, and so is their sum.
    """
    if not refuted(outside):
        return math.copysign(1.0, outside)
    low, high = inside, outside
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def log_even_odds(below: int, above: int) -> float:
    """Logarithm of the wealth of bets against even odds: the beta mixture of all odds, 2^n B(below + 1, above + 1).

    Robbins 1970, section 2; Howard, Ramdas, McAuliffe and Sekhon 2021, section 3.2, beta-binomial mixtures.
    """
    n = below + above
    return n * math.log(2) + math.lgamma(below + 1) + math.lgamma(above + 1) - math.lgamma(n + 2)


def median_sequence(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median of independent values with its confidence sequence, infinite while too few are known.

    A value lies below the median as often as above it: the places that `log_even_odds` has not refuted are between two
    order statistics (Howard and Ramdas 2022, section 2). Values equal to the median count half on either side.
    """
    ordered, limit = np.sort(np.asarray(values, dtype=np.float64)), -math.log(1 - confidence)
    n = len(ordered)
    if not n:
        raise ValueError("expected one or more values")
    fewest = next((k for k in range(n // 2 + 1) if log_even_odds(k, n - k) < limit), n // 2)
    value = float(np.median(ordered))
    if not fewest:
        return Estimate(value, -np.inf, np.inf)
    return Estimate(value, float(ordered[fewest - 1]), float(ordered[n - fewest]))
