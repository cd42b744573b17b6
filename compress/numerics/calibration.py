"""Calibration of a classifier's probabilities."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Floats, IntervalEstimate

BINS = 15
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
    confidence: ArrayLike,
    correct: ArrayLike,
    seed: int,
    bins: int = BINS,
    resamples: int = 1000,
    level: float = 0.95,
) -> IntervalEstimate:
    """Return `calibration_error` with a bootstrap interval that allows for its bias.

    Resampling adds the same noise that sampling added before, so the lower end reflects the upper percentile at the
    value, 2 v - q(high) (Davison and Hinkley 1997, section 5.2.1). It is 0 if calibrated probabilities would give an
    error as large (consistency resampling, Broecker and Smith 2007, section 3). The upper end is v + z s, with s the
    standard deviation of the resampled errors.

    Args:
        confidence: Probability of the predicted class [n].
        correct: Correctness of the prediction [n].
        seed: Seed of the resampling.
        bins: Number of bins.
        resamples: Number of bootstrap resamples.
        level: Confidence level.
    """
    confidences, outcomes = _paired(confidence, correct)
    value = calibration_error(confidences, outcomes, bins)
    gaps = np.zeros((len(confidences), bins))
    gaps[np.arange(len(confidences)), _places(confidences, bins)] = outcomes - confidences
    errors = np.abs(_resampled_sums(gaps, seed, resamples)).sum(axis=1) / len(confidences)
    last = float(np.quantile(errors, (1 + level) / 2))
    # Error of perfectly calibrated outcomes, by simulation.
    by_chance = float(np.quantile(_errors_if_calibrated(confidences, seed, bins, resamples), (1 + level) / 2))
    low = 0.0 if value <= by_chance else max(0.0, min(value, 2 * value - last))
    high = value + NormalDist().inv_cdf((1 + level) / 2) * float(errors.std())
    return IntervalEstimate(value, low, min(1.0, high))


def brier_scores(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Return squared distances of probabilities [n, classes] from the label (Brier 1950, equation 2), 0 to 2.

    For two classes it is twice the squared error of one probability, which often has the same name.
    """
    array, ids = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    one_hot = np.zeros_like(array)
    one_hot[np.arange(len(ids)), ids] = 1.0
    return np.asarray(((array - one_hot) ** 2).sum(axis=-1), dtype=np.float64)


def mean_interval(samples: ArrayLike, seed: int, resamples: int = 1000, level: float = 0.95) -> IntervalEstimate:
    """Return the mean with its percentile bootstrap interval, computed for all resamples at once.

    Args:
        samples: Values [n].
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples.
        level: Confidence level.
    """
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError("expected one or more finite samples")
    means = _resampled_sums(array[:, None], seed, resamples)[:, 0] / len(array)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value = float(array.mean())
    return IntervalEstimate(value, min(value, float(low)), max(value, float(high)))


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


def _errors_if_calibrated(confidences: Floats, seed: int, bins: int, resamples: int) -> Floats:
    """Return errors of outcomes that are correct as often as ``confidences`` predict, [resamples].

    The number of correct rows in each bin is approximated by a normal distribution.

    Args:
        confidences: Confidences [n].
        seed: Seed of the simulation.
        bins: Number of bins.
        resamples: Number of simulated data sets.
    """
    spread = np.bincount(_places(confidences, bins), weights=confidences * (1 - confidences), minlength=bins)
    normal = np.random.default_rng(seed).standard_normal((resamples, bins))
    errors: Floats = np.abs(normal * np.sqrt(np.maximum(spread, 0))).sum(axis=1) / len(confidences)
    return errors


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
