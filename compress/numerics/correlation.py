"""Correlations with confidence intervals by Fisher's transformation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.numerics.statistics import Estimate


def pearson(predictions: Sequence[float], targets: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return Pearson's r of n >= 4 pairs; artanh r is about normal with variance 1 / (n - 3) (Fisher 1921)."""
    # It takes longer to import than a run without rated pairs may cost for it.
    # Importing scipy.stats takes longer than a run without rated pairs should pay.
    from scipy import stats

    return _estimate(float(stats.pearsonr(predictions, targets).statistic), 1 / (len(predictions) - 3), confidence)


def spearman(predictions: Sequence[float], targets: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return Spearman's rho of n >= 4 pairs, with variance 1.06 / (n - 3) (Fieller, Hartley and Pearson 1957)."""
    from scipy import stats

    return _estimate(float(stats.spearmanr(predictions, targets).statistic), 1.06 / (len(predictions) - 3), confidence)


def _estimate(value: float, variance: float, confidence: float) -> Estimate:
    from scipy.special import ndtri

    # The transformation is infinite for a perfect correlation.
    if abs(value) >= 1:
        return Estimate(value, value, value)
    width = float(ndtri((1 + confidence) / 2)) * math.sqrt(variance)
    middle = math.atanh(value)
    return Estimate(value, math.tanh(middle - width), math.tanh(middle + width))
