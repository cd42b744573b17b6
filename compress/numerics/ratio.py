"""Metrics that are a ratio of two sums, such as F1: confidence intervals and per-example contributions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Estimate


def ratio_interval(
    parts: ArrayLike, wholes: ArrayLike, seed: int, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """Return the sum of ``parts`` over the sum of ``wholes`` with its percentile bootstrap interval over examples.

    For word errors over words it is the interval of Bisani and Ney 2004.

    Args:
        parts: Numerator of each example [n].
        wholes: Denominator of each example [n].
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        level: Confidence level.

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
    rates = np.divide(sums[0], sums[1], out=np.full(resamples, value), where=sums[1] > 0)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


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
