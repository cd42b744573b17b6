"""How two quantities differ that were measured apart, from the interval of each."""

from __future__ import annotations

import math
from statistics import NormalDist

from compress.numerics.statistics import Estimate


def difference_of_estimates(baseline: Estimate, candidate: Estimate) -> Estimate:
    """candidate - baseline, with the interval that their own independent ones imply.

    MOVER (Zou and Donner 2008): low = d - √((candidate - its low)² + (baseline's high - baseline)²), high
    likewise. From Wilson intervals of two shares it is method 10 of Newcombe 1998. Confidence is that of the two.
    """
    value = candidate.value - baseline.value
    below = math.hypot(candidate.value - candidate.low, baseline.high - baseline.value)
    above = math.hypot(candidate.high - candidate.value, baseline.value - baseline.low)
    return Estimate(value, value - below, value + above)


def widen(estimate: Estimate, confidence: float, wanted: float) -> Estimate:
    """The estimate with its interval taken from ``confidence`` to ``wanted``, both sides by the normal quantiles."""
    normal = NormalDist()
    scale = normal.inv_cdf((1 + wanted) / 2) / normal.inv_cdf((1 + confidence) / 2)
    value, low, high = estimate
    return Estimate(value, value - (value - low) * scale, value + (high - value) * scale)


def logarithm(estimate: Estimate) -> Estimate:
    """Natural logarithms of a positive estimate and its bounds. Raises `ValueError` for others."""
    if not 0 < estimate.low <= estimate.value <= estimate.high < math.inf:
        raise ValueError(f"expected 0 < low <= value <= high, found {estimate}")
    return Estimate(*map(math.log, estimate))


def relative(log_ratio: Estimate) -> Estimate:
    """From the logarithm of a ratio to the ratio less 1: ln 1.05 -> 0.05."""
    return Estimate(*map(math.expm1, log_ratio))


def allow_for(estimate: Estimate, half: float) -> Estimate:
    """The estimate with a further independent uncertainty of ± ``half`` at the same confidence."""
    value, low, high = estimate
    return Estimate(value, value - math.hypot(value - low, half), value + math.hypot(high - value, half))
