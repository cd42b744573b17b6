"""Macro F1 of tasks with classes, with scikit-learn as the reference."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from compress.tasks.classes import macro_f1_contributions


def _answers(seed: int, n: int, classes: int, accuracy: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    predicted = np.where(generator.random(n) < accuracy, labels, generator.integers(0, classes, n))
    return predicted, labels


@pytest.mark.parametrize(("n", "classes", "accuracy"), [(7, 3, 0.5), (500, 4, 0.8), (300, 90, 0.6), (40, 2, 1.0)])
def test_mean_of_contributions_is_macro_f1(n: int, classes: int, accuracy: float) -> None:
    predicted, labels = _answers(0, n, classes, accuracy)
    expected = f1_score(labels, predicted, average="macro", zero_division=0)
    assert macro_f1_contributions(predicted, labels).mean() == pytest.approx(expected, abs=1e-12)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    predicted, labels = np.array([0, 1, 2]), np.array([0, 1, 1])
    assert macro_f1_contributions(predicted, labels).mean() == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_variance_of_contributions_is_that_of_macro_f1_over_samples() -> None:
    n, scores, variances = 400, [], []
    for seed in range(600):
        predicted, labels = _answers(seed, n, 4, 0.7)
        contributions = macro_f1_contributions(predicted, labels)
        scores.append(f1_score(labels, predicted, average="macro"))
        variances.append(contributions.var(ddof=1) / n)
    # The sampled variance of 600 scores has a relative standard error of about 6%.
    assert np.mean(variances) == pytest.approx(np.var(scores, ddof=1), rel=0.2)
