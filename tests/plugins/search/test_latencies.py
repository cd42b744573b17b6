"""Sums over kernels, corrected by whole models, against lines that are known."""

from __future__ import annotations

import numpy as np
import pytest

from compress.plugins.search.latency_estimator import KernelSum, fit_correction


def line(call: float, scale: float, each: float) -> list[tuple[KernelSum, float]]:
    """Models that lie on it."""
    sums = [KernelSum(ms, megabytes) for ms in (0.1, 0.2, 0.4, 0.8) for megabytes in (0.5, 1.0, 3.0, 6.0)]
    return [(kernel_sum, call + scale * kernel_sum.milliseconds + each * kernel_sum.megabytes) for kernel_sum in sums]


def test_a_line_through_whole_models_is_found() -> None:
    assert fit_correction(line(0.02, 1.25, 0.02)) == pytest.approx([0.02, 1.25, 0.02], abs=0.01)


def test_one_model_moves_what_it_tells_and_no_more() -> None:
    kernel_sum = KernelSum(0.3, 1.0)
    correction = fit_correction([(kernel_sum, 0.42)])
    assert kernel_sum.terms @ correction == pytest.approx(0.42, rel=0.03)
    assert 1.1 < correction[1] < 1.4


def test_nothing_timed_leaves_what_was_known_before() -> None:
    assert fit_correction([]) == pytest.approx([0.005, 1.1, 0.01])


def test_it_is_the_least_of_the_squares_with_the_ridge() -> None:
    """Against the normal equations, models that lie on no line."""
    models = [
        (kernel_sum, ms * factor)
        for (kernel_sum, ms), factor in zip(line(0.02, 1.2, 0.01), (1.0, 1.1, 0.9, 1.2), strict=False)
    ]
    rows = np.array([kernel_sum.terms / ms / 0.05 for kernel_sum, ms in models])
    ridge = np.diag([1 / 0.02**2, 1 / 0.2**2, 1 / 0.015**2])
    right = rows.T @ np.full(len(rows), 1 / 0.05) + ridge @ [0.005, 1.1, 0.01]
    assert fit_correction(models) == pytest.approx(np.linalg.solve(rows.T @ rows + ridge, right), rel=1e-6)
