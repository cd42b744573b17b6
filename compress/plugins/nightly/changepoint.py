"""Change points in the level of a short, noisy series: one value per night, tens or hundreds of nights.

Weak changes are found first, and changes that chance may explain are removed again, in the order of MongoDB's and
Otava's change detection (Fleming et al. 2023, "Hunter"). The first step is the exact least-squares segmentation by
dynamic programming, whose minimum PELT finds too (Killick, Fearnhead and Eckley 2012). Quadratic time is no problem
for a few hundred values.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from compress.numerics.statistics import Floats

SHORTEST = 3
"""Minimum number of values at a level."""
_WEAK_PENALTY = 2.0
_OUTLIER_SCALES = 3.0
_NORMAL_MAD = 0.6744897501960817
_ROUNDING = 1e-12


class ChangePoint(NamedTuple):
    """A change of level.

    ``position`` is the index of the first value at the new level; ``before`` and ``after`` are the medians of the two
    adjacent segments; ``p_value`` belongs to Student's t test of the two means.
    """

    position: int
    before: float
    after: float
    p_value: float


def change_points(values: ArrayLike, significance: float = 1e-5, by_luck: float = 0.01) -> list[ChangePoint]:
    """Return the changes of level in ``values`` [n], in order; none below six values.

    A change must pass two tests. Student's t with the pooled variance of all levels must reach ``significance``, which
    is small because every split of every night is tested. And the change must persist: so few of the longer side's
    values lie beyond the middle of the two levels that chance would put as many as the shorter side has into a stretch
    of its length, anywhere in the series, with a probability of at most ``by_luck``. The second test rejects two or
    three disturbed nights in a row if disturbed nights are common. Isolated outliers are clipped before the t test
    (Hampel 1974), so that they do not hide a change.

    Raises:
        ValueError: If values are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError("expected a list of finite values")
    if len(array) < 2 * SHORTEST:
        return []
    # A low penalty finds every weak change; the tests remove the wrong ones.
    scale = noise_scale(array)
    calm = without_outliers(array, scale)
    penalty = _WEAK_PENALTY * scale**2 * math.log(len(array))
    bounds = [0, *segment(calm, penalty), len(array)]
    # Join the two levels with the least certain change until every remaining change passes the tests.
    correlation = autocorrelation(calm)
    while len(bounds) > 2:
        tests = [t_test(calm, bounds, index, correlation) for index in range(1, len(bounds) - 1)]
        lucks = [_luck(array, *bounds[index : index + 3]) for index in range(len(bounds) - 2)]
        doubts = [max(p / significance, luck / by_luck) for p, luck in zip(tests, lucks, strict=True)]
        # Remove the least certain change and test again, since its neighbours are longer now.
        worst = int(np.argmax(doubts))
        if doubts[worst] <= 1:
            levels = [float(np.median(array[first:last])) for first, last in pairwise(bounds)]
            return [ChangePoint(bounds[i + 1], levels[i], levels[i + 1], p) for i, p in enumerate(tests)]
        del bounds[worst + 1]
    return []


def autocorrelation(values: Floats) -> float:
    """Return the correlation of neighbouring values' noise from medians that steps do not affect, within 0 and 0.9.

    median |x[i+2] - x[i]|² / median |x[i+1] - x[i]|² - 1 (Chakar et al. 2017, for an AR(1) process). It is shrunk
    towards 0 by n / (n + 60): few values estimate it badly, and a wrong estimate would hide changes.
    """
    lag_one, lag_two = (float(np.median(np.abs(values[lag:] - values[:-lag]))) for lag in (1, 2))
    if lag_one == 0:
        return 0.0
    return min(max((lag_two / lag_one) ** 2 - 1, 0.0), 0.9) * len(values) / (len(values) + 60)


def noise_scale(values: Floats) -> float:
    """Return the noise's standard deviation from the median absolute first difference, which steps do not affect.

    median |x[i+1] - x[i]| / (0.6745 √2) for normal noise. It is never below the rounding error of equal values.
    """
    differences = np.abs(np.diff(values))
    least = _ROUNDING * float(np.abs(values).max())
    return max(float(np.median(differences)) / (_NORMAL_MAD * math.sqrt(2)), least)


def without_outliers(values: Floats, scale: float) -> Floats:
    """Clip values to within three scales of the median of the five values around them (Hampel's filter).

    At the ends these are the first or last five. A level that three of five values share passes unchanged.
    """
    width = min(2 * SHORTEST - 1, len(values))
    # Windows are shifted inwards at both ends.
    starts = np.clip(np.arange(len(values)) - width // 2, 0, len(values) - width)
    around = np.median(np.lib.stride_tricks.sliding_window_view(values, width)[starts], axis=1)
    reach = _OUTLIER_SCALES * scale
    return np.asarray(np.clip(values, around - reach, around + reach), dtype=np.float64)


def segment(values: Floats, penalty: float) -> list[int]:
    """Return the first indices of the second and later segments of the best segmentation.

    It minimises squared deviations plus ``penalty`` per segment: F(t) = min over s <= t - 3 of F(s) + sum (x - mean)²
    over s..t + penalty. The result is exact; each segment has three values or more.
    """
    n = len(values)
    centred = values - values.mean()
    # Prefix sums give the squared deviations of any segment in constant time.
    sums, squares = (np.concatenate([[0.0], np.cumsum(power)]) for power in (centred, centred**2))
    best = np.full(n + 1, math.inf)
    best[0] = 0.0
    previous = np.zeros(n + 1, dtype=np.int64)
    for end in range(SHORTEST, n + 1):
        starts = np.arange(end - SHORTEST + 1)
        # Sum of squares minus n times the squared mean.
        deviations = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
        costs = best[starts] + np.maximum(deviations, 0.0) + penalty
        # Of equal costs the latest start would make needless segments.
        previous[end] = int(np.argmin(costs))
        best[end] = costs[previous[end]]
    starts_of_segments: list[int] = []
    # Walk back from the end to the first segment.
    start = int(previous[n])
    while start > 0:
        starts_of_segments.append(start)
        start = int(previous[start])
    return starts_of_segments[::-1]


def t_test(values: Floats, bounds: list[int], place: int, correlation: float = 0.0) -> float:
    """Return the two-sided p-value that the segments before and after ``bounds[place]`` have the same mean.

    t = (m1 - m2) / (s √(1/n1 + 1/n2)) with s² the variance within all segments and n - segments degrees of freedom.
    With a correlation r of neighbours the error of a mean is √((1 + r) / (1 - r)) times as large (Zwiers and von Storch
    1995).

    Args:
        values: Values [n].
        bounds: Bounds of the segments, with 0 and n.
        place: Index of the tested bound.
        correlation: Correlation of neighbouring values.
    """
    parts = [values[first:last] for first, last in pairwise(bounds)]
    freedom = len(values) - len(parts)
    within = math.sqrt(sum(float(((part - part.mean()) ** 2).sum()) for part in parts) / freedom)
    left, right = parts[place - 1], parts[place]
    error = max(within, _ROUNDING * float(np.abs(values).max())) * math.sqrt(1 / len(left) + 1 / len(right))
    error *= math.sqrt((1 + correlation) / (1 - correlation))
    if error == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(float(left.mean() - right.mean())) / error, freedom))


def _luck(values: Floats, first: int, middle: int, last: int) -> float:
    """Return the chance that a stretch of the shorter side's length lies beyond the middle as often, anywhere.

    Args:
        values: Values [n].
        first: Start of the segment before the change.
        middle: Index of the change.
        last: End of the segment after the change.
    """
    shorter, longer = sorted((values[first:middle], values[middle:last]), key=len)
    centre = (float(np.median(shorter)) + float(np.median(longer))) / 2
    above = np.median(shorter) > centre
    beyond = [int(((side > centre) if above else (side < centre)).sum()) for side in (shorter, longer)]
    # Laplace's rule keeps the share above 0.
    share = (beyond[1] + 1) / (len(longer) + 2)
    return min(1.0, len(values) * float(stats.binom.sf(beyond[0] - 1, len(shorter), share)))
