"""Two-sided confidence intervals for measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class IntervalEstimate(NamedTuple):
    """Value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927).

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), with p = successes / n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, found {successes} of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula gives 0 and 1 exactly; rounding must not leave them outside.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + spread) / scale)
    return low, high


def bootstrap_interval(
    samples: ArrayLike,
    statistic: Callable[[Floats], float],
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval over axis 0 (Efron 1979; Efron and Tibshirani 1993, section 13.3).

    Args:
        samples: Samples [n, ...].
        statistic: Function of resampled samples.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level.
    """
    array = _finite(samples)
    generator = np.random.default_rng(seed)
    values = [statistic(array[generator.integers(0, len(array), len(array))]) for _ in range(_positive(resamples))]
    return _percentiles(np.asarray(values), confidence)


def nested_quantile_intervals(
    groups: Sequence[Sequence[ArrayLike]],
    quantiles: Sequence[float],
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> list[tuple[float, float]]:
    """Return bootstrap intervals of ``quantiles`` of pooled samples, resampling groups and clusters within them.

    Samples of one cluster (such as calls of one timing round) share disturbances, and so do clusters of one group
    (rounds of one process). Both are resampled as a whole, with replacement (Davison and Hinkley 1997, section 3.8).
    With a single group only clusters are resampled.

    Args:
        groups: Samples by group and cluster.
        quantiles: Quantiles between 0 and 1.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level.

    Returns:
        An interval for each quantile.
    """
    arrays = [[_finite(cluster) for cluster in group] for group in groups]
    if not arrays or not all(arrays):
        raise ValueError("expected at least one group, and one cluster in each")
    generator = np.random.default_rng(seed)
    group_counts = generator.multinomial(len(arrays), np.full(len(arrays), 1 / len(arrays)), _positive(resamples))
    # k drawings of a group, each of all its clusters with replacement, are together one drawing of k times as many.
    counts = np.concatenate(
        [
            generator.multinomial(times * len(group), np.full(len(group), 1 / len(group)))
            for times, group in zip(group_counts.T, arrays, strict=True)
        ],
        axis=1,
    )
    clusters = [cluster for group in arrays for cluster in group]
    pooled = np.concatenate(clusters)
    # Sort once: resamples only change the counts of clusters.
    order = np.argsort(pooled, kind="stable")
    ordered, owner = pooled[order], np.repeat(np.arange(len(clusters)), [len(cluster) for cluster in clusters])[order]
    values = np.empty((len(counts), len(quantiles)))
    # The samples stay sorted: a resample only changes how often each of them counts.
    for row, count in enumerate(counts):
        # Position in the resample of each sorted sample.
        reached = np.cumsum(count[owner])
        targets = np.ceil(np.asarray(quantiles) * reached[-1])
        values[row] = ordered[np.searchsorted(reached, np.maximum(targets, 1))]
    return [_percentiles(column, confidence) for column in values.T]


def t_interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of the mean of samples [n], n >= 2: m ± t s / √n ("Student" 1908)."""
    from scipy.special import stdtrit

    array = _finite(samples)
    if len(array) < 2:
        raise ValueError(f"expected two samples or more, found {array.tolist()}")
    half = float(stdtrit(len(array) - 1, (1 + confidence) / 2) * array.std(ddof=1) / math.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def geometric_interval(samples: ArrayLike, confidence: float = 0.95) -> IntervalEstimate:
    """Return the geometric mean of positive samples [n], n >= 2, with the t interval of the mean of their logarithms.

    exp(m ± t s / √n), with m and s the mean and standard deviation of the logarithms and t the quantile at n - 1
    degrees of freedom ("Student" 1908).
    """
    array = _finite(samples)
    if len(array) < 2 or (array <= 0).any():
        raise ValueError(f"expected two positive samples or more, found {array[:3].tolist()}")
    logs = np.log(array)
    low, high = t_interval(logs, confidence)
    return IntervalEstimate(math.exp(float(logs.mean())), math.exp(low), math.exp(high))


def median_interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the distribution-free interval of the median from order statistics (Conover 1999, section 3.2).

    The interval is [x(k), x(n+1-k)] with the largest k for which 1 - 2 P(Binomial(n, 1/2) < k) is at least
    ``confidence``. Raises `ValueError` if even the extremes are too narrow, which at 95% means fewer than six samples.
    """
    from scipy.special import bdtr

    ordered = np.sort(_finite(samples))
    # Binomial distribution of the number of samples below the median.
    below = bdtr(np.arange(len(ordered) + 1), len(ordered), 0.5)
    k = int(np.searchsorted(below, (1 - confidence) / 2, side="right"))
    if k == 0:
        raise ValueError(f"{len(ordered)} samples are too few for a {confidence:.0%} interval of the median")
    return float(ordered[k - 1]), float(ordered[len(ordered) - k])


def _percentiles(values: Floats, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _finite(samples: ArrayLike) -> Floats:
    array = np.atleast_1d(np.asarray(samples, dtype=np.float64))
    if array.size == 0:
        raise ValueError("expected at least one sample")
    if not np.isfinite(array).all():
        raise ValueError("samples hold NaN or infinity")
    return array


def _positive(resamples: int) -> int:
    if resamples < 1:
        raise ValueError(f"expected at least one resample, found {resamples}")
    return resamples


def around(value: float, resampled: Floats, confidence: float = 0.95) -> IntervalEstimate:
    """Return a value with the percentile interval of its resampled values, widened to include the value."""
    low, high = _percentiles(resampled, confidence)
    return IntervalEstimate(value, min(value, low), max(value, high))


def ratio_interval(parts: ArrayLike, wholes: ArrayLike, seed: int, resamples: int = 1000) -> IntervalEstimate:
    """Return the sum of ``parts`` over the sum of ``wholes`` with its percentile bootstrap interval at 95%.

    Examples are resampled. For word errors over words it is the interval of Bisani and Ney 2004.

    Args:
        parts: Numerator of each example [n].
        wholes: Denominator of each example [n].
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.

    Raises:
        ValueError: If the denominators sum to 0.
    """
    counts = np.stack([np.asarray(parts, np.float64), np.asarray(wholes, np.float64)])
    if counts.ndim != 2 or not counts[1].sum() > 0:
        raise ValueError("expected a sum above 0 to divide by")
    n = counts.shape[1]
    value = float(counts[0].sum() / counts[1].sum())
    sampled = np.random.default_rng(seed).integers(0, n, (resamples, n))
    sums = counts[:, sampled].sum(axis=-1)
    # A resample without any denominator gets the overall value.
    return around(value, np.divide(sums[0], sums[1], out=np.full(resamples, value), where=sums[1] > 0))


def linearized(parts: ArrayLike, wholes: ArrayLike) -> NDArray[np.float64]:
    """Return each example's contribution to R = sum of parts / sum of wholes: R + (part - R whole) / mean of wholes.

    Their mean is R, and their variance over n is that of R to first order (Taylor linearization; Särndal, Swensson and
    Wretman 1992, section 5.5), so that metrics of two models on the same examples can be paired. Raises `ValueError` if
    the wholes sum to 0.
    """
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if not whole.sum() > 0:
        raise ValueError("expected a sum above 0 to divide by")
    ratio = part.sum() / whole.sum()
    contributions: NDArray[np.float64] = ratio + (part - ratio * whole) / whole.mean()
    return contributions


def pearson(predictions: Sequence[float], targets: Sequence[float], confidence: float = 0.95) -> IntervalEstimate:
    """Return Pearson's r of n >= 4 pairs; artanh r is about normal with variance 1 / (n - 3) (Fisher 1921)."""
    # Importing scipy.stats takes longer than a run without rated pairs should pay.
    from scipy import stats

    return _estimate(float(stats.pearsonr(predictions, targets).statistic), 1 / (len(predictions) - 3), confidence)


def spearman(predictions: Sequence[float], targets: Sequence[float], confidence: float = 0.95) -> IntervalEstimate:
    """Return Spearman's rho of n >= 4 pairs, with variance 1.06 / (n - 3) (Fieller, Hartley and Pearson 1957)."""
    from scipy import stats

    return _estimate(float(stats.spearmanr(predictions, targets).statistic), 1.06 / (len(predictions) - 3), confidence)


def _estimate(value: float, variance: float, confidence: float) -> IntervalEstimate:
    from scipy.special import ndtri

    # The transformation is infinite for a perfect correlation.
    if abs(value) >= 1:
        return IntervalEstimate(value, value, value)
    width = float(ndtri((1 + confidence) / 2)) * math.sqrt(variance)
    middle = math.atanh(value)
    return IntervalEstimate(value, math.tanh(middle - width), math.tanh(middle + width))
