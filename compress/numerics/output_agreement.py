"""How near the outputs of one model are to those of another, in units that don't depend on what they mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class OutputAgreement(NamedTuple):
    """``rms`` and ``largest`` difference over the standard deviation of what is expected; ``cosine``: mean over calls.

    Where all that is expected is one value, differences are over its magnitude.
    """

    rms: float
    largest: float
    cosine: float


def output_agreement(expected: np.ndarray, found: np.ndarray) -> OutputAgreement:
    """Of outputs [calls, n] each; NaN stands for what a smaller output lacks, and is 0 where the other has a number."""
    width = max(expected.shape[1], found.shape[1])
    wanted, given = (_widened(array.astype(np.float64), width) for array in (expected, found))
    counted = ~(np.isnan(wanted) & np.isnan(given))
    wanted, given = (np.where(np.isnan(array), 0.0, array) for array in (wanted, given))
    # Infinite alike, as in a mask, is no difference; infinite in one alone is an infinite one.
    counted &= ~(np.isinf(wanted) & (wanted == given))
    if not counted.any():
        return OutputAgreement(0.0, 0.0, 1.0)
    difference = np.abs(wanted[counted] - given[counted])
    known = wanted[counted & np.isfinite(wanted)]
    spread = (float(known.std()) or float(np.abs(known).max()) or 1.0) if known.size else 1.0
    return OutputAgreement(
        float(np.sqrt(np.square(difference).mean())) / spread,
        float(difference.max()) / spread,
        _mean_cosine(np.where(counted, wanted, 0.0), np.where(counted, given, 0.0))
        if np.isfinite(difference).all()
        else 0,
    )


def _widened(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=np.nan)


def _mean_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Of the rows; two of nothing but zeros are alike."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    alike = (left == right).all(axis=1)
    products = (left * right).sum(axis=1)
    cosines = np.where(alike, 1.0, np.divide(products, norms, where=norms > 0, out=np.zeros_like(norms)))
    return float(cosines.mean())
