"""Agreement of two models' outputs, in units independent of the outputs' meaning."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class OutputAgreement(NamedTuple):
    """RMS and largest difference divided by the standard deviation of the expected outputs, and the mean cosine.

    If the expected outputs are all equal, differences are divided by their magnitude.
    """

    rms: float
    largest: float
    cosine: float


def output_agreement(expected: np.ndarray, actual: np.ndarray) -> OutputAgreement:
    """Compare outputs [calls, n]; NaN pads a smaller output and counts as 0 where the other has a number."""
    # Outputs may have different lengths, such as generated sequences.
    width = max(expected.shape[1], actual.shape[1])
    reference, output = (
        np.pad(array.astype(np.float64), ((0, 0), (0, width - array.shape[1])), constant_values=np.nan)
        for array in (expected, actual)
    )
    counted = ~(np.isnan(reference) & np.isnan(output))
    reference, output = (np.where(np.isnan(array), 0.0, array) for array in (reference, output))
    # Equal infinities, as in a mask, are no difference.
    counted &= ~(np.isinf(reference) & (reference == output))
    if not counted.any():
        return OutputAgreement(0.0, 0.0, 1.0)
    difference = np.abs(reference[counted] - output[counted])
    finite_reference = reference[counted & np.isfinite(reference)]
    spread, cosine = 1.0, 0.0
    if finite_reference.size:
        # Constant references have no spread; use their magnitude.
        spread = float(finite_reference.std()) or float(np.abs(finite_reference).max()) or 1.0
    if np.isfinite(difference).all():
        cosine = _mean_cosine(np.where(counted, reference, 0.0), np.where(counted, output, 0.0))
    rms = float(np.sqrt(np.square(difference).mean()))
    return OutputAgreement(rms / spread, float(difference.max()) / spread, cosine)


def _mean_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Return the mean cosine of the rows; two rows of zeros count as equal."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    # Rows of zeros have no direction; equal ones agree.
    alike = (left == right).all(axis=1)
    products = (left * right).sum(axis=1)
    cosines = np.where(alike, 1.0, np.divide(products, norms, where=norms > 0, out=np.zeros_like(norms)))
    return float(cosines.mean())
