"""How likely a recipe is to keep its limits, by what others came to: Gaussian processes over the choices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import logsumexp, ndtr, softmax

Floats = NDArray[np.float64]
_LENGTHS, _LINEAR, _JITTER = (0.35, 0.7, 1.4), (0.0, 1.0, 4.0), 1e-6
_ROOT = math.sqrt(2 * math.pi)
_LESSER, _DOUBT = (1.0, 0.5, 0.25), 0.5
"""Scales of features that are taken to matter less, the usual one first, and how much less likely others are held."""
_NEGLIGIBLE = math.log(0.01)
"""How likely a process has to be, beside the likeliest, to count."""


@dataclass(frozen=True)
class _Process:
    """A Gaussian process with a linear and a squared-exponential kernel (Rasmussen and Williams 2006, section 2.2)."""

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

    def mean(self, features: Floats) -> Floats:
        return self._mean(self._cross(features))

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """The mean, and standard deviations [m]."""
        cross = self._cross(features)
        own = 1.0 + self.linear * (1 + ((features * self.scales) ** 2).sum(axis=1))
        explained = (cross.T * cho_solve((self.factor, True), cross.T)).sum(axis=0)
        return self._mean(cross), self.scale * np.sqrt(np.maximum(own - explained, 1e-9))

    def _cross(self, features: Floats) -> Floats:
        return _kernel(features * self.scales, self.features, self.length, self.linear)

    def _mean(self, cross: Floats) -> Floats:
        found: Floats = self.centre + self.scale * (cross @ self.weights)
        return found

    def leave_one_out_errors(self) -> Floats:
        inverse = cho_solve((self.factor, True), np.eye(len(self.weights)))
        found: Floats = self.scale * self.weights / np.diag(inverse)
        return found


@dataclass(frozen=True)
class Surrogate:
    """Gaussian processes of several lengths, shares of the linear part and scales, each counting by its likelihood.

    Averaged, since the likeliest of few values changes with one more (Snoek et al. 2012, section 3.2); over a small
    grid, with the predictive density of each of its processes (Rasmussen and Williams 2006, section 5.2).
    """

    processes: tuple[_Process, ...]
    shares: Floats
    likelihood: float
    """Logarithm of the values' density under all of them, up to a constant of their number."""

    @classmethod
    def fit(
        cls, features: Floats, values: Floats, deviations: Floats, spread: float = 0.0,
        lesser: Sequence[bool] | None = None,
    ) -> Surrogate:  # fmt: skip
        """Fit ``values`` [n], of known standard deviations [n], at ``features`` [n, d] between 0 and 1.

        ``spread`` is what values differ by at least, one standard deviation, however alike those that are known are.
        ``lesser`` [d] says which features are taken to matter less than the others, until values say otherwise.
        """
        mask = np.zeros(features.shape[1], bool) if lesser is None else np.array(lesser)
        centre, scale = float(values.mean()), max(float(values.std()), spread) or 1.0
        targets, noise = (values - centre) / scale, (deviations / scale) ** 2
        found = list[_Process]()
        for part in _LESSER if mask.any() else (1.0,):
            scales = np.where(mask, part, 1.0)
            scaled, doubt = features * scales, 0.0 if part == 1.0 else _DOUBT
            for length, linear in product(_LENGTHS, _LINEAR):
                kernel = _kernel(scaled, scaled, length, linear)
                factor = cholesky(kernel + np.diag(noise + _JITTER), lower=True)
                weights = cho_solve((factor, True), targets)
                likelihood = -0.5 * float(targets @ weights) - float(np.log(np.diag(factor)).sum())
                likelihood -= len(values) * math.log(scale) + doubt
                found.append(_Process(scaled, scales, centre, scale, length, linear, factor, weights, likelihood))
        every = np.array([one.likelihood for one in found])
        counting = tuple(one for one in found if one.likelihood > every.max() + _NEGLIGIBLE)
        shares = softmax([one.likelihood for one in counting])
        return cls(counting, shares, float(logsumexp(every)) - math.log(len(every)))

    def mean(self, features: Floats) -> Floats:
        """What is expected [m] at ``features`` [m, d]."""
        return self._averaged(one.mean(features) for one in self.processes)

    def leave_one_out_errors(self) -> Floats:
        """Value less what is expected of it, [n], where each is left out in turn (section 5.4.2, equation 5.12)."""
        return self._averaged(one.leave_one_out_errors() for one in self.processes)

    def probability_at_least(self, features: Floats, bounds: Floats, more: float = 0.0) -> Floats:
        """The probability [m] that the values at ``features`` [m, d] reach ``bounds`` [m].

        ``more`` is a standard deviation that comes on top of the processes' own.
        """
        each = (one.predict(features) for one in self.processes)
        return self._averaged(ndtr((mean - bounds) / np.hypot(deviations, more)) for mean, deviations in each)

    def expected_improvement(self, features: Floats, best: float | Floats) -> Floats:
        """By how much [m] values at ``features`` [m, d] are expected to exceed ``best`` (Jones et al. 1998, eq. 15)."""
        found = list[Floats]()
        for mean, deviations in (one.predict(features) for one in self.processes):
            more = mean - best
            away = more / deviations
            found.append(more * ndtr(away) + deviations * np.exp(-0.5 * away**2) / _ROOT)
        return np.maximum(self._averaged(found), 0.0)

    def _averaged(self, each: Iterable[Floats]) -> Floats:
        found: Floats = self.shares @ np.stack(list(each))
        return found


def _kernel(one: Floats, other: Floats, length: float, linear: float) -> Floats:
    squares = ((one[:, None, :] - other[None, :, :]) ** 2).sum(axis=-1)
    found: Floats = np.exp(-squares / (2 * length**2)) + linear * (1 + one @ other.T)
    return found
