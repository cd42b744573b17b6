"""How near two pictures are to each other, pair by pair: by their pixels, their structure, and what a network sees.

Pictures are [n, height, width, channels] with levels from 0 to ``span``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Floats

SSIM_WINDOW = 11
"""Pixels along its side."""
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_LEVELS = 255
"""Steps of 8 bits."""
_EPSILON = 1e-10


def psnr(pictures: ArrayLike, reference: ArrayLike, span: float = 1.0) -> Floats:
    """Peak signal-to-noise ratio of each pair in decibels, [n]: 10 log10(span² / mean squared error).

    The error counts as at least 1/12 of a squared level of 8 bits, which rounding alone makes on the average: equal
    pictures have 58.9 dB in place of infinitely many. Raises `ValueError` for pictures that do not pair.
    """
    given, wanted = _pairs(pictures, reference)
    errors = np.square(given - wanted).reshape(len(given), -1).mean(axis=1)
    found: Floats = 10 * np.log10(span**2 / np.maximum(errors, (span / _LEVELS) ** 2 / 12))
    return found


def ssim(pictures: ArrayLike, reference: ArrayLike, span: float = 1.0) -> Floats:
    """Structural similarity of each pair, [n], the mean over channels (Wang et al. 2004, section III-B).

    Means, variances and covariance are those of a Gaussian window of 11 x 11 with a deviation of 1.5 pixels, at each
    place where it lies within the picture; K1 is 0.01, K2 0.03. Raises `ValueError` for pictures that do not pair or
    are smaller than the window.
    """
    given, wanted = _pairs(pictures, reference)
    if given.ndim != 4 or min(given.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"expected pictures of {SSIM_WINDOW} x {SSIM_WINDOW} pixels or more, found {list(given.shape)}"
        )
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    mean, other = _smooth(given), _smooth(wanted)
    variance, its = _smooth(given**2) - mean**2, _smooth(wanted**2) - other**2
    covariance = _smooth(given * wanted) - mean * other
    similarity = (2 * mean * other + c1) * (2 * covariance + c2)
    similarity /= (mean**2 + other**2 + c1) * (variance + its + c2)
    found: Floats = similarity.reshape(len(given), -1).mean(axis=1)
    return found


def perceptual_distance(layers: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> Floats:
    """How far two pictures are apart in a network's layers, [n] (Zhang et al. 2018, equation 1, all weights 1).

    ``layers`` are what each layer makes of the pictures, [n, channels, ...places]. At each place the channels are
    brought to length 1; the squared distance is averaged over places and summed over layers. It lies between 0 and 4
    times the number of layers. Raises `ValueError` for layers that do not pair.
    """
    if len(layers) != len(reference) or not layers:
        raise ValueError(f"expected the same layers of both, found {len(layers)} and {len(reference)}")
    total = np.zeros(len(layers[0]))
    for given, wanted in zip(layers, reference, strict=True):
        ours, theirs = _pairs(given, wanted)
        squared = np.square(_unit(ours) - _unit(theirs)).sum(axis=1)
        total += squared.reshape(len(ours), -1).mean(axis=1)
    return total


def _unit(layer: Floats) -> Floats:
    found: Floats = layer / (np.linalg.norm(layer, axis=1, keepdims=True) + _EPSILON)
    return found


def _smooth(pictures: Floats) -> Floats:
    """Weighted means under the window at each place that it fits, [n, height - 10, width - 10, channels]."""
    from scipy.ndimage import correlate1d

    half = SSIM_WINDOW // 2
    weights = np.exp(-np.square(np.arange(-half, half + 1)) / (2 * _SIGMA**2))
    weights /= weights.sum()
    found = correlate1d(correlate1d(pictures, weights, axis=1), weights, axis=2)
    inside: Floats = found[:, half:-half, half:-half]
    return inside


def _pairs(pictures: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    given, wanted = (np.asarray(each, dtype=np.float64) for each in (pictures, reference))
    if given.shape != wanted.shape or not given.size:
        raise ValueError(f"pictures must pair: {list(given.shape)} and {list(wanted.shape)}")
    return given, wanted
