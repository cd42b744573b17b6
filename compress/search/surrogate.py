"""How likely a recipe is to keep its limits, by what others came to: Gaussian processes over the choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import ndtr

Floats = NDArray[np.float64]
_LENGTHS, _LINEAR, _JITTER = (0.35, 0.7, 1.4), (0.0, 1.0, 4.0), 1e-6
_ROOT = math.sqrt(2 * math.pi)
_LESSER, _DOUBT = (0.25, 0.5, 1.0), 0.5
"""Scales of features that are taken to matter less, the usual one first, and by how much likelier another has to be."""


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process with a linear and a squared-exponential kernel (Rasmussen and Williams 2006, section 2.2).

    Length, share of the linear part and the scale of features that matter less are those of the largest marginal
    likelihood on a small grid (section 5.4.1).
    """

    features: Floats
    """As they were given, each times its scale."""
    scales: Floats
    centre: float
    scale: float
    length: float
    linear: float
    factor: Floats
    weights: Floats
    likelihood: float
    """Logarithm of the values' density, up to a constant of their number."""

    @classmethod
    def of(
        cls, features: Floats, values: Floats, deviations: Floats, spread: float = 0.0,
        lesser: Sequence[bool] | None = None,
    ) -> Surrogate:  # fmt: skip
        """Fit ``values`` [n], of known standard deviations [n], at ``features`` [n, d] between 0 and 1.

        ``spread`` is what values differ by at least, one standard deviation, however alike those that are known are.
        ``lesser`` [d] says which features are taken to matter less than the others, until values say otherwise.
        """
        mask = np.zeros(features.shape[1], bool) if lesser is None else np.array(lesser)
        parts = _LESSER if mask.any() else (1.0,)
        usual, *others = (
            cls._scaled(features, values, deviations, spread, np.where(mask, part, 1.0)) for part in parts
        )
        return max([usual, *(one for one in others if one.likelihood > usual.likelihood + _DOUBT)],
                   key=lambda one: one.likelihood)  # fmt: skip

    @classmethod
    def _scaled(cls, features: Floats, values: Floats, deviations: Floats, spread: float, scales: Floats) -> Surrogate:
        centre, scale = float(values.mean()), max(float(values.std()), spread) or 1.0
        targets, noise = (values - centre) / scale, (deviations / scale) ** 2
        features = features * scales
        best: Surrogate | None = None
        for length in _LENGTHS:
            for linear in _LINEAR:
                kernel = _kernel(features, features, length, linear)
                factor = cholesky(kernel + np.diag(noise + _JITTER), lower=True)
                weights = cho_solve((factor, True), targets)
                likelihood = -0.5 * float(targets @ weights) - float(np.log(np.diag(factor)).sum())
                likelihood -= len(values) * math.log(scale)
                if best is None or likelihood > best.likelihood:
                    best = cls(features, scales, centre, scale, length, linear, factor, weights, likelihood)
        assert best is not None
        return best

    def mean(self, features: Floats) -> Floats:
        """What is expected [m] at ``features`` [m, d]."""
        found: Floats = self.centre + self.scale * (
            _kernel(features * self.scales, self.features, self.length, self.linear) @ self.weights
        )
        return found

    def left_out_errors(self) -> Floats:
        """Value less what is expected of it, [n], where each is left out in turn (section 5.4.2, equation 5.12)."""
        inverse = cho_solve((self.factor, True), np.eye(len(self.weights)))
        found: Floats = self.scale * self.weights / np.diag(inverse)
        return found

    def at_least(self, features: Floats, bounds: Floats, more: float = 0.0) -> Floats:
        """The probability [m] that the values at ``features`` [m, d] reach ``bounds`` [m].

        ``more`` is a standard deviation that comes on top of the process's own.
        """
        found: Floats = ndtr((self.mean(features) - bounds) / np.hypot(self._deviations(features), more))
        return found

    def improvement(self, features: Floats, best: float | Floats) -> Floats:
        """By how much [m] values at ``features`` [m, d] are expected to exceed ``best`` (Jones et al. 1998, eq. 15)."""
        more, deviations = self.mean(features) - best, self._deviations(features)
        away = more / deviations
        found: Floats = more * ndtr(away) + deviations * np.exp(-0.5 * away**2) / _ROOT
        return np.maximum(found, 0.0)

    def _deviations(self, features: Floats) -> Floats:
        """Standard deviations [m] of what is expected."""
        scaled = features * self.scales
        cross = _kernel(scaled, self.features, self.length, self.linear)
        own = 1.0 + self.linear * (1 + (scaled**2).sum(axis=1))
        explained = (cross.T * cho_solve((self.factor, True), cross.T)).sum(axis=0)
        found: Floats = self.scale * np.sqrt(np.maximum(own - explained, 1e-9))
        return found


def _kernel(one: Floats, other: Floats, length: float, linear: float) -> Floats:
    squares = ((one[:, None, :] - other[None, :, :]) ** 2).sum(axis=-1)
    found: Floats = np.exp(-squares / (2 * length**2)) + linear * (1 + one @ other.T)
    return found
