"""Smoothing factors of SmoothQuant (Xiao et al. 2023): large input channels shrink and their weights grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SMALLEST = 1e-5


def smoothing_factors(largest: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return s_j for inputs of magnitude ``largest`` [channels] and weights [channels, outputs] that share them."""
    sizes = np.maximum.reduce([np.abs(weight).max(axis=1) for weight in weights])
    live = (largest > _SMALLEST) & (sizes > _SMALLEST)
    factors = np.where(live, largest, 1.0) ** alpha / np.where(live, sizes, 1.0) ** (1 - alpha)
    return np.where(live, factors, 1.0).astype(np.float32)
