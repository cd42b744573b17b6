"""Tests of the surrogate: Gaussian processes averaged over hyperparameters, against scikit-learn."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from compress.plugins.search import surrogate
from compress.plugins.search.surrogate import Surrogate


def test_predictions_equal_likelihood_weighted_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogate, "_NEGLIGIBLE", -math.inf)
    chance = np.random.default_rng(0)
    known, asked = chance.uniform(size=(9, 3)), chance.uniform(size=(5, 3))
    values, deviations = np.sin(4 * known[:, 0]) + known[:, 1], chance.uniform(0.05, 0.2, 9)
    centre, scale = values.mean(), values.std()
    means, spreads, likelihoods = [], [], []
    for length in surrogate._LENGTHS:
        for linear in surrogate._LINEAR:
            kernel = RBF(length, "fixed")
            if linear:
                kernel += ConstantKernel(linear, "fixed") * DotProduct(1.0, "fixed")
            theirs = GaussianProcessRegressor(kernel, alpha=(deviations / scale) ** 2 + 1e-6, optimizer=None)
            theirs.fit(known, (values - centre) / scale)
            mean, spread = theirs.predict(asked, return_std=True)
            means.append(centre + scale * mean)
            spreads.append(scale * spread)
            likelihoods.append(theirs.log_marginal_likelihood_value_)
    shares = softmax(likelihoods)
    assert shares.max() < 0.9, "no process may count alone"
    ours = Surrogate.fit(known, values, deviations)
    assert ours.mean(asked) == pytest.approx(shares @ np.array(means), abs=1e-6)
    chances = np.array([norm.sf(0.8, mean, spread) for mean, spread in zip(means, spreads, strict=True)])
    assert ours.probability_at_least(asked, np.full(5, 0.8)) == pytest.approx(shares @ chances, abs=1e-6)
    # Expected improvement is an integral over the mixture's density.
    better = np.linspace(0.8, 12, 200_001)
    each = np.array([np.trapezoid((better - 0.8) * norm.pdf(better, mean[0], spread[0]), better)
                     for mean, spread in zip(means, spreads, strict=True)])  # fmt: skip
    assert ours.expected_improvement(asked[:1], 0.8)[0] == pytest.approx(shares @ each, rel=1e-4)
