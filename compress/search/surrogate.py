"""How likely a recipe is to keep its limits, by what others came to: Gaussian processes over the choices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import ndtr

Floats = NDArray[np.float64]
_LENGTHS, _LINEAR, _JITTER = (0.35, 0.7, 1.4), (0.0, 1.0, 4.0), 1e-6


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process with a linear and a squared-exponential kernel (Rasmussen and Williams 2006, section 2.2).

    Length and share of the linear part are those of the largest marginal likelihood on a small grid (section 5.4.1).
    """

    features: Floats
    centre: float
    scale: float
    length: float
    linear: float
    factor: Floats
    weights: Floats
    likelihood: float
    """Logarithm of the values' density, up to a constant of their number."""

    @classmethod
    def of(cls, features: Floats, values: Floats, deviations: Floats, spread: float = 0.0) -> Surrogate:
        """Fit ``values`` [n], of known standard deviations [n], at ``features`` [n, d] between 0 and 1.

        ``spread`` is what values differ by at least, one standard deviation, however alike those that are known are.
        """
        centre, scale = float(values.mean()), max(float(values.std()), spread) or 1.0
        targets, noise = (values - centre) / scale, (deviations / scale) ** 2
        best: Surrogate | None = None
        for length in _LENGTHS:
            for linear in _LINEAR:
                kernel = _kernel(features, features, length, linear)
                factor = cholesky(kernel + np.diag(noise + _JITTER), lower=True)
                weights = cho_solve((factor, True), targets)
                likelihood = -0.5 * float(targets @ weights) - float(np.log(np.diag(factor)).sum())
                likelihood -= len(values) * math.log(scale)
                if best is None or likelihood > best.likelihood:
                    best = cls(features, centre, scale, length, linear, factor, weights, likelihood)
        assert best is not None
        return best

    def mean(self, features: Floats) -> Floats:
        """What is expected [m] at ``features`` [m, d]."""
        found: Floats = self.centre + self.scale * (
            _kernel(features, self.features, self.length, self.linear) @ self.weights
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
        cross = _kernel(features, self.features, self.length, self.linear)
        mean = self.mean(features)
        own = 1.0 + self.linear * (1 + (features**2).sum(axis=1))
        explained = (cross.T * cho_solve((self.factor, True), cross.T)).sum(axis=0)
        deviation = np.hypot(self.scale * np.sqrt(np.maximum(own - explained, 1e-9)), more)
        found: Floats = ndtr((mean - bounds) / deviation)
        return found


def _kernel(one: Floats, other: Floats, length: float, linear: float) -> Floats:
    squares = ((one[:, None, :] - other[None, :, :]) ** 2).sum(axis=-1)
    found: Floats = np.exp(-squares / (2 * length**2)) + linear * (1 + one @ other.T)
    return found
