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
    both = ~(np.isnan(wanted) & np.isnan(given))
    if not both.any():
        return OutputAgreement(0.0, 0.0, 1.0)
    wanted, given = np.nan_to_num(wanted, nan=0.0), np.nan_to_num(given, nan=0.0)
    # Infinite alike, as in a mask, is no difference.
    finite = both & ~(np.isinf(wanted) & (wanted == given))
    if not finite.any():
        return OutputAgreement(0.0, 0.0, 1.0)
    difference = np.abs(wanted - given, where=finite, out=np.zeros_like(wanted))[finite]
    spread = float(wanted[finite].std()) or float(np.abs(wanted[finite]).max()) or 1.0
    return OutputAgreement(
        float(np.sqrt(np.square(difference).mean())) / spread,
        float(difference.max()) / spread,
        _mean_cosine(np.where(finite, wanted, 0), np.where(finite, given, 0)),
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
