"""Confidence intervals and tests for measurements, on numpy alone. All intervals are two-sided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927).

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
    """Percentile bootstrap (Efron 1979; Efron and Tibshirani 1993, section 13.3) over axis 0."""
    array = _finite(samples)
    generator = np.random.default_rng(seed)
    values = [statistic(array[generator.integers(0, len(array), len(array))]) for _ in range(_positive(resamples))]
    return _percentiles(np.asarray(values), confidence)


def clustered_bootstrap_intervals(
    clusters: Sequence[ArrayLike],
    statistics: Callable[[Floats], Sequence[float]],
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> list[tuple[float, float]]:
    """Percentile bootstrap of several statistics of the pooled samples, resampling whole clusters.

    Samples of one cluster (calls of one timing round, say) share what disturbed them, so they are drawn
    together (Davison and Hinkley 1997, section 3.8). Returns an interval for each value of ``statistics``.
    """
    arrays = [_finite(cluster) for cluster in clusters]
    if not arrays:
        raise ValueError("expected at least one cluster")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_positive(resamples)):
        chosen = generator.integers(0, len(arrays), len(arrays))
        values.append(statistics(np.concatenate([arrays[i] for i in chosen])))
    return [_percentiles(column, confidence) for column in np.asarray(values, dtype=np.float64).T]


def median_interval(samples: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics (Conover 1999, section 3.2).

    The interval is [x(k), x(n+1-k)] with the largest k for which 1 - 2 P(Binomial(n, 1/2) < k) is at least
    ``confidence``. Raises `ValueError` where even the extremes fall short, which at 95% is below six samples.
    """
    ordered = np.sort(_finite(samples))
    below = np.cumsum(_binomial_half(len(ordered)))
    k = int(np.searchsorted(below, (1 - confidence) / 2, side="right"))
    if k == 0:
        raise ValueError(f"{len(ordered)} samples are too few for a {confidence:.0%} interval of the median")
    return float(ordered[k - 1]), float(ordered[len(ordered) - k])


def paired_ratio_interval(
    baseline_rounds: Sequence[ArrayLike], candidate_rounds: Sequence[ArrayLike], confidence: float = 0.95
) -> Estimate:
    """How many times larger the baseline is than the candidate, from rounds that ran side by side.

    Round i of one is paired with round i of the other; the value is the median over rounds of the ratio of
    the two round medians, so that a drift which slows both leaves it alone. The interval is that of
    `median_interval`.
    """
    ratios = round_ratios(baseline_rounds, candidate_rounds)
    low, high = median_interval(ratios, confidence)
    return Estimate(float(np.median(ratios)), low, high)


def round_ratios(baseline_rounds: Sequence[ArrayLike], candidate_rounds: Sequence[ArrayLike]) -> Floats:
    """Median of each baseline round over the median of the candidate round beside it, [rounds]."""
    if len(baseline_rounds) != len(candidate_rounds):
        raise ValueError(f"rounds must pair: {len(baseline_rounds)} of the baseline and {len(candidate_rounds)} others")
    baseline = np.array([np.median(_finite(samples)) for samples in baseline_rounds])
    candidate = np.array([np.median(_finite(samples)) for samples in candidate_rounds])
    if (baseline <= 0).any() or (candidate <= 0).any():
        raise ValueError("expected positive samples")
    return np.asarray(baseline / candidate, dtype=np.float64)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that A and B are right equally often (McNemar 1947, binomial form).

    ``only_a`` counts the examples that only A gets right, ``only_b`` those that only B gets right.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"expected counts, found {only_a} and {only_b}")
    tail = float(_binomial_half(only_a + only_b)[: min(only_a, only_b) + 1].sum())
    return min(1.0, 2 * tail)


def _binomial_half(n: int) -> Floats:
    """P(Binomial(n, 1/2) = k) for k = 0..n."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.asarray(np.exp(logs[n] - logs - logs[::-1] - n * math.log(2)), dtype=np.float64)


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
