"""How often two models give the same answer."""

from __future__ import annotations

import numpy as np

from compress.measurement import Measurement
from compress.numerics.statistics import wilson_interval


def agreement_row(same: np.ndarray, model: str, target: str) -> Measurement:
    """The share of examples [n] on which a model answers as the baseline does, with its Wilson interval."""
    count = int(same.sum())
    low, high = wilson_interval(count, len(same))
    share = count / len(same)
    return Measurement(
        model=model, metric="agreement", target=target, value=share, unit="ratio", low=low, high=high, n=len(same)
    )
