"""Differences of outputs against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from compress.numerics.output_agreement import output_agreement


def test_differences_are_over_the_spread_of_what_is_expected() -> None:
    expected = np.array([[1.0, -1.0], [1.0, -1.0]])
    actual = np.array([[1.5, -1.0], [1.0, -2.0]])
    rms, largest, cosine = output_agreement(expected, actual)
    # The standard deviation is 1; differences are 0.5, 0, 0 and 1.
    assert rms == pytest.approx(np.sqrt(1.25 / 4))
    assert largest == pytest.approx(1.0)
    assert cosine == pytest.approx((2.5 / np.sqrt(2 * 3.25) + 3 / np.sqrt(2 * 5)) / 2)
    assert output_agreement(10 * expected, 10 * actual) == pytest.approx((rms, largest, cosine))
    assert output_agreement(expected, expected) == (0.0, 0.0, 1.0)


def test_a_constant_is_measured_by_its_magnitude_and_nothing_is_alike() -> None:
    assert output_agreement(np.full((2, 3), 4.0), np.full((2, 3), 5.0)).rms == pytest.approx(0.25)
    assert output_agreement(np.zeros((1, 2)), np.zeros((1, 2))) == (0.0, 0.0, 1.0)
    assert output_agreement(np.zeros((1, 2)), np.ones((1, 2))).cosine == 0.0


def test_outputs_of_other_sizes_lack_numbers_and_infinite_masks_agree() -> None:
    longer = output_agreement(np.array([[1.0, -1.0, np.nan]]), np.array([[1.0, -1.0, 2.0]]))
    assert longer.largest == pytest.approx(2.0 / np.array([1.0, -1.0, 0.0]).std())
    assert output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0]])).largest == pytest.approx(1.0)
    masked = output_agreement(np.array([[-np.inf, 1.0, -1.0]]), np.array([[-np.inf, 1.0, -0.5]]))
    assert masked.largest == pytest.approx(0.5)
    lost = output_agreement(np.array([[1.0, -1.0]]), np.array([[1.0, np.inf]]))
    assert lost == (np.inf, np.inf, 0.0)
