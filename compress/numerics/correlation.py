"""Correlations with their intervals by Fisher's transformation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.numerics.statistics import Estimate


def pearson(found: Sequence[float], wanted: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Pearson's r of n >= 4 pairs; artanh r is about normal with the variance 1 / (n - 3) (Fisher 1921)."""
    # It takes longer to import than a run without rated pairs may cost for it.
    from scipy import stats

    return _estimate(float(stats.pearsonr(found, wanted).statistic), 1 / (len(found) - 3), confidence)


def spearman(found: Sequence[float], wanted: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Spearman's rho of n >= 4 pairs, with the variance 1.06 / (n - 3) (Fieller, Hartley and Pearson 1957)."""
    from scipy import stats

    return _estimate(float(stats.spearmanr(found, wanted).statistic), 1.06 / (len(found) - 3), confidence)


def _estimate(value: float, variance: float, confidence: float) -> Estimate:
    from scipy.special import ndtri

    if abs(value) >= 1:
        return Estimate(value, value, value)
    width = float(ndtri((1 + confidence) / 2)) * math.sqrt(variance)
    middle = math.atanh(value)
    return Estimate(value, math.tanh(middle - width), math.tanh(middle + width))
