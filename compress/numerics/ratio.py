"""Figures that are one sum over another, such as F1: how sure they are, and what each example adds to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Estimate


def ratio_interval(
    parts: ArrayLike, wholes: ArrayLike, seed: int, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """The sum of ``parts`` [n] over that of ``wholes`` [n], with its percentile bootstrap interval over examples.

    Of word errors over words it is that of Bisani and Ney 2004. Raises `ValueError` where the wholes sum to nothing.
    """
    counts = np.stack([np.asarray(parts, np.float64), np.asarray(wholes, np.float64)])
    if counts.ndim != 2 or not counts[1].sum() > 0:
        raise ValueError("expected a sum above 0 to divide by")
    n = counts.shape[1]
    value = float(counts[0].sum() / counts[1].sum())
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    sums = counts[:, drawn].sum(axis=-1)
    rates = np.divide(sums[0], sums[1], out=np.full(resamples, value), where=sums[1] > 0)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def linearized(parts: ArrayLike, wholes: ArrayLike) -> NDArray[np.float64]:
    """What each example adds to R = sum of parts / sum of wholes, [n]: R + (part - R whole) / mean of wholes.

    Their mean is R itself, and their variance over n that of R to the first order (Taylor linearization; Särndal,
    Swensson and Wretman 1992, section 5.5), so that two models' figures on the same examples can be paired. Raises
    `ValueError` where the wholes sum to nothing.
    """
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if not whole.sum() > 0:
        raise ValueError("expected a sum above 0 to divide by")
    ratio = part.sum() / whole.sum()
    found: NDArray[np.float64] = ratio + (part - ratio * whole) / whole.mean()
    return found
