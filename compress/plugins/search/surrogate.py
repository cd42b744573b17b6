"""Gaussian process regression that averages over hyperparameters, and the importance of parameters by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import logsumexp, ndtr, softmax

from compress.plugins.search.space import Point, SearchParameter

Floats = NDArray[np.float64]
_LENGTHS, _LINEAR, _JITTER = (0.35, 0.7, 1.4), (0.0, 1.0, 4.0), 1e-6
_ROOT = math.sqrt(2 * math.pi)
_LESSER, _DOUBT = (1.0, 0.5, 0.25), 0.5
"""Scales of minor features, the usual one first, and the penalty of the others on the log-likelihood."""
_NEGLIGIBLE = math.log(0.01)
"""Logarithm of the likelihood ratio below which a process is dropped."""


@dataclass(frozen=True)
class _Process:
    """A Gaussian process with a linear and a squared-exponential kernel (Rasmussen and Williams 2006, section 2.2)."""

    features: Floats
    """Coordinates [n, d], each times its scale."""
    scales: Floats
    centre: float
    scale: float
    length: float
    linear: float
    factor: Floats
    weights: Floats
    likelihood: float
    """Logarithm of the density of the values, up to a constant that depends on their number."""

    def mean(self, features: Floats) -> Floats:
        cross = _kernel(features * self.scales, self.features, self.length, self.linear)
        mean: Floats = self.centre + self.scale * (cross @ self.weights)
        return mean

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """Return means [m] and standard deviations [m]."""
        cross = _kernel(features * self.scales, self.features, self.length, self.linear)
        # The kernel of a point with itself: 1 for the squared-exponential part, plus the linear part.
        prior_variance = 1.0 + self.linear * (1 + ((features * self.scales) ** 2).sum(axis=1))
        explained = (cross.T * cho_solve((self.factor, True), cross.T)).sum(axis=0)
        mean: Floats = self.centre + self.scale * (cross @ self.weights)
        return mean, self.scale * np.sqrt(np.maximum(prior_variance - explained, 1e-9))

    def leave_one_out_errors(self) -> Floats:
        # The errors follow from the inverse kernel without fitting again (equation 5.12).
        inverse = cho_solve((self.factor, True), np.eye(len(self.weights)))
        errors: Floats = self.scale * self.weights / np.diag(inverse)
        return errors


@dataclass(frozen=True)
class Surrogate:
    """Gaussian processes with several hyperparameters, averaged by their likelihood.

    The average is more stable than the maximum likelihood of few values, which may change with one more (Snoek
    et al. 2012, section 3.2). Hyperparameters are length scale, share of the linear kernel and scale of minor
    features, on a small grid; predictive densities follow Rasmussen and Williams 2006, section 5.2.
    """

    processes: tuple[_Process, ...]
    shares: Floats
    likelihood: float
    """Logarithm of the density of the values under all processes, up to a constant that depends on their number."""

    @classmethod
    def fit(
        cls, features: Floats, values: Floats, deviations: Floats, spread: float = 0.0,
        lesser: Sequence[bool] | None = None,
    ) -> Surrogate:  # fmt: skip
        """Fit values of known noise.

        Args:
            features: Coordinates [n, d], each between about 0 and 1.
            values: Measured values [n].
            deviations: Standard deviation of each value [n].
            spread: Least standard deviation between values, however alike the measured ones are.
            lesser: For each feature [d], whether it is assumed to matter less until the values contradict that.

        Returns:
            The fitted processes.
        """
        mask = np.zeros(features.shape[1], bool) if lesser is None else np.array(lesser)
        centre, scale = float(values.mean()), max(float(values.std()), spread) or 1.0
        targets, noise = (values - centre) / scale, (deviations / scale) ** 2
        processes = list[_Process]()
        # A smaller scale of a minor feature lets it change the prediction less.
        for part in _LESSER if mask.any() else (1.0,):
            scales = np.where(mask, part, 1.0)
            scaled, doubt = features * scales, 0.0 if part == 1.0 else _DOUBT
            # Fit one process for each combination of hyperparameters.
            for length, linear in product(_LENGTHS, _LINEAR):
                kernel = _kernel(scaled, scaled, length, linear)
                # Fit by Cholesky factorization (Rasmussen and Williams 2006, algorithm 2.1).
                factor = cholesky(kernel + np.diag(noise + _JITTER), lower=True)
                weights = cho_solve((factor, True), targets)
                likelihood = -0.5 * float(targets @ weights) - float(np.log(np.diag(factor)).sum())
                # Undo the scaling of the targets, so that likelihoods of different scales can be compared.
                likelihood -= len(values) * math.log(scale) + doubt
                processes.append(_Process(scaled, scales, centre, scale, length, linear, factor, weights, likelihood))
        likelihoods = np.array([process.likelihood for process in processes])
        # Processes that are far less likely than the best one are dropped.
        relevant = np.flatnonzero(likelihoods > likelihoods.max() + _NEGLIGIBLE)
        total = float(logsumexp(likelihoods)) - math.log(len(likelihoods))
        return cls(tuple(processes[index] for index in relevant), softmax(likelihoods[relevant]), total)

    def mean(self, features: Floats) -> Floats:
        """Return the expected values [m] at ``features`` [m, d]."""
        return self._averaged(process.mean(features) for process in self.processes)

    def leave_one_out_errors(self) -> Floats:
        """Return each value minus its prediction from the others [n] (section 5.4.2, equation 5.12)."""
        return self._averaged(process.leave_one_out_errors() for process in self.processes)

    def probability_at_least(self, features: Floats, bounds: Floats, more: float = 0.0) -> Floats:
        """Return the probability [m] that values reach a bound.

        Args:
            features: Coordinates [m, d].
            bounds: Bounds [m].
            more: Standard deviation that is added to that of the processes.

        Returns:
            Probabilities [m].
        """
        predictions = (process.predict(features) for process in self.processes)
        return self._averaged(ndtr((mean - bounds) / np.hypot(deviations, more)) for mean, deviations in predictions)

    def expected_improvement(self, features: Floats, best: float | Floats) -> Floats:
        """Return the expected improvement [m] over ``best`` at ``features`` [m, d] (Jones et al. 1998, eq. 15)."""
        improvements = list[Floats]()
        for mean, deviations in (process.predict(features) for process in self.processes):
            difference = mean - best
            standardized = difference / deviations
            improvements.append(difference * ndtr(standardized) + deviations * np.exp(-0.5 * standardized**2) / _ROOT)
        return np.maximum(self._averaged(improvements), 0.0)

    def _averaged(self, predictions: Iterable[Floats]) -> Floats:
        average: Floats = self.shares @ np.stack(list(predictions))
        return average


def _kernel(left: Floats, right: Floats, length: float, linear: float) -> Floats:
    squares = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=-1)
    kernel: Floats = np.exp(-squares / (2 * length**2)) + linear * (1 + left @ right.T)
    return kernel


_FEWEST, _SPARE = 6, 2
"""Least number of recipes, and least excess over the number of parameters that were tried with two values."""
_LEAST_PREDICTED_SHARE = 0.3
"""Least share of the variance of left-out recipes that the process has to predict."""
_MOST = 20_000


@dataclass(frozen=True)
class ParameterImportance:
    """Share of the variance that each parameter explains alone; None for one that was tried with one value.

    ``shares`` is None where too few recipes are known, and ``note`` states the reason.
    """

    shares: tuple[float | None, ...] | None
    note: str


def analyze_importance(
    parameters: Sequence[SearchParameter], points: Sequence[Point], values: Floats
) -> ParameterImportance:
    """Return the share of the variance of the values over the whole space that each parameter explains alone.

    This is a functional analysis of variance (Hutter, Hoos and Leyton-Brown 2014, section 3) of the mean of a
    Gaussian process instead of a forest. There is no result where the process cannot predict left-out recipes
    (Rasmussen and Williams 2006, section 5.4.2).
    """
    varied = [column for column in range(len(parameters)) if len({point[column] for point in points}) > 1]
    needed = max(_FEWEST, len(varied) + _SPARE)
    if len(points) < needed:
        return ParameterImportance(
            None, f"too few to say: {len(points)} recipes were trained in full, {needed} are needed"
        )
    if not varied or float(np.ptp(values)) < 1e-12:
        return ParameterImportance(None, "nothing to say: all recipes that were trained in full have the same value")
    ranks = [np.array(parameter.ranks()) for parameter in parameters]
    coordinates = np.stack([ranks[column][[point[column] for point in points]] for column in varied], axis=1)
    # The measurements have nearly no noise. A small deviation keeps the fit stable.
    surrogate = Surrogate.fit(coordinates, values, np.full(len(values), 1e-3 * float(values.std())))
    errors = surrogate.leave_one_out_errors()
    predicted_share = 1 - float((errors**2).sum() / ((values - values.mean()) ** 2).sum())
    if predicted_share < _LEAST_PREDICTED_SHARE:
        return ParameterImportance(
            None,
            f"too few to say: of {len(points)} recipes, each predicted by the others, {max(predicted_share, 0):.0%} of "
            f"the variance is explained, {_LEAST_PREDICTED_SHARE:.0%} are needed",
        )
    # Average the predicted values over all other parameters to get the effect of each alone.
    # The grid has every combination of values, or a sample of very many.
    sizes = [len(parameters[column].values) for column in varied]
    if math.prod(sizes) <= _MOST:
        grid = np.array(list(product(*map(range, sizes))))
    else:
        grid = np.random.default_rng(0).integers(0, sizes, (_MOST, len(sizes)))
    means = surrogate.mean(np.stack([ranks[column][grid[:, at]] for at, column in enumerate(varied)], axis=1))
    total_variance = float(means.var())
    shares: list[float | None] = [None] * len(parameters)
    for position, column in enumerate(varied):
        # A sampled grid does not contain every value equally often.
        counts = np.bincount(grid[:, position])
        marginal_means = np.bincount(grid[:, position], weights=means)[counts > 0] / counts[counts > 0]
        weights = counts[counts > 0] / len(grid)
        shares[column] = (
            float((weights * (marginal_means - means.mean()) ** 2).sum()) / total_variance if total_variance else 0.0
        )
    # Main effects sum to 1 without interactions.
    interaction = max(1 - sum(share for share in shares if share is not None), 0.0)
    return ParameterImportance(
        tuple(shares),
        f"by {len(points)} recipes, of which each is predicted by the others to {predicted_share:.0%} of the variance; "
        f"{interaction:.0%} is due to interactions of choices",
    )
