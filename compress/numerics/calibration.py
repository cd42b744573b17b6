"""Calibration of a classifier's probabilities."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Floats, IntervalEstimate, around

BINS = 15
_LEVEL = 0.95
"""Confidence level of intervals."""
_CHUNK = 4_000_000
"""Number of resampled rows held at a time."""


class Bin(NamedTuple):
    """Rows with a confidence in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def softmax(logits: ArrayLike) -> Floats:
    """Return probabilities over the last axis [n, classes] in float64. Raises `ValueError` for NaN and infinity."""
    array = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("logits hold NaN or infinity")
    # Subtracting the maximum avoids overflow.
    powers = np.exp(array - array.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float64)


def calibration_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Return the non-empty bins of a reliability diagram with bins of equal width."""
    confidences, outcomes = _paired(confidence, correct)
    bin_ids = _places(confidences, bins)
    result = []
    for bin_id in np.unique(bin_ids):
        rows = bin_ids == bin_id
        means = float(confidences[rows].mean()), float(outcomes[rows].mean())
        result.append(Bin(bin_id / bins, (bin_id + 1) / bins, int(rows.sum()), *means))
    return result


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3): sum of rows/n |accuracy - confidence|.

    Noise alone makes it larger than 0 (Kumar et al. 2019, section 4), by about sqrt(bins / n).

    Args:
        confidence: Probability of the predicted class [n].
        correct: Correctness of the prediction [n].
        bins: Number of bins.
    """
    confidences, outcomes = _paired(confidence, correct)
    gaps = np.bincount(_places(confidences, bins), weights=outcomes - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def calibration_error_interval(
    confidence: ArrayLike, correct: ArrayLike, seed: int, resamples: int = 1000
) -> IntervalEstimate:
    """Return `calibration_error` with a bootstrap interval at 95% that allows for its bias.

    Resampling adds the same noise that sampling added before, so the lower end reflects the upper percentile at the
    value, 2 v - q(high) (Davison and Hinkley 1997, section 5.2.1). It is 0 if calibrated probabilities would give an
    error as large (consistency resampling, Broecker and Smith 2007, section 3). The upper end is v + z s, with s the
    standard deviation of the resampled errors.

    Args:
        confidence: Probability of the predicted class [n].
        correct: Correctness of the prediction [n].
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
    """
    confidences, outcomes = _paired(confidence, correct)
    value, count = calibration_error(confidences, outcomes), len(confidences)
    places = _places(confidences, BINS)
    gaps = np.zeros((count, BINS))
    gaps[np.arange(count), places] = outcomes - confidences
    errors = np.abs(_resampled_sums(gaps, seed, resamples)).sum(axis=1) / count
    # Simulate outcomes that are correct as often as the confidences predict: normal numbers of correct rows in a bin.
    spread = np.bincount(places, weights=confidences * (1 - confidences), minlength=BINS)
    normal = np.random.default_rng(seed).standard_normal((resamples, BINS))
    chance_errors = np.abs(normal * np.sqrt(np.maximum(spread, 0))).sum(axis=1) / count
    last, by_chance = (float(np.quantile(values, (1 + _LEVEL) / 2)) for values in (errors, chance_errors))
    low = 0.0 if value <= by_chance else max(0.0, min(value, 2 * value - last))
    high = value + NormalDist().inv_cdf((1 + _LEVEL) / 2) * float(errors.std())
    return IntervalEstimate(value, low, min(1.0, high))


def brier_scores(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Return squared distances of probabilities [n, classes] from the label (Brier 1950, equation 2), 0 to 2.

    For two classes it is twice the squared error of one probability, which often has the same name.
    """
    array, ids = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    one_hot = np.zeros_like(array)
    one_hot[np.arange(len(ids)), ids] = 1.0
    return np.asarray(((array - one_hot) ** 2).sum(axis=-1), dtype=np.float64)


def mean_interval(samples: ArrayLike, seed: int) -> IntervalEstimate:
    """Return the mean of samples [n] with its percentile bootstrap interval at 95% from a thousand resamples."""
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError("expected one or more finite samples")
    means = _resampled_sums(array[:, None], seed, 1000)[:, 0] / len(array)
    return around(float(array.mean()), means)


def _resampled_sums(values: Floats, seed: int, resamples: int) -> Floats:
    """Return column sums of ``values`` [n, k] over rows sampled with replacement, [resamples, k]."""
    n = len(values)
    generator = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // n)
    parts = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        sampled = generator.integers(0, n, (count, n), dtype=np.int32)
        # Offset the indices of each resample, so that one bincount counts all of them.
        sampled += (np.arange(count, dtype=np.int32) * n)[:, None]
        parts.append(np.bincount(sampled.ravel(), minlength=count * n).reshape(count, n) @ values)
    return np.concatenate(parts)


def _places(confidences: Floats, bins: int) -> NDArray[np.int64]:
    """Return the bin of each confidence: (0, 1/bins] is 0 and so on; 0 itself is in the first."""
    # A confidence at an edge, such as 0.6 of 15 bins, must not leave its bin by rounding.
    return np.clip(np.ceil(np.round(confidences * bins, 9)).astype(np.int64) - 1, 0, bins - 1)


def _paired(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    confidences = np.asarray(confidence, dtype=np.float64)
    outcomes = np.asarray(correct, dtype=np.float64)
    if confidences.ndim != 1 or confidences.shape != outcomes.shape or not len(confidences):
        raise ValueError(f"expected one confidence an outcome, found {confidences.shape} and {outcomes.shape}")
    if not ((confidences >= 0) & (confidences <= 1 + 1e-9)).all():
        raise ValueError("expected confidences from 0 to 1")
    return confidences, outcomes
