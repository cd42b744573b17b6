"""Tests of the roofline model, and of image augmentation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.roofline import Roof, TimeBound, bottleneck, least_time
from compress.stages.training.augmentation import random_crop, random_horizontal_flip

ROOF = Roof(bytes_per_s=10e9, fp32_per_s=100e9, int8_per_s=400e9)
AMOUNT = st.floats(1, 1e15)


def test_compute_is_the_limit_above_the_ridge_point() -> None:
    """1 GFLOP and 10 MB: 10 ms of arithmetic, 1 ms of memory."""
    assert least_time(ROOF, 1e9, 0, 10e6) == TimeBound(pytest.approx(0.010), pytest.approx(0.001))
    assert least_time(ROOF, 1e9, 0, 10e6).seconds == pytest.approx(0.010)


def test_both_classes_of_arithmetic_add_up() -> None:
    """1 GFLOP takes 10 ms and 2 GOP of 8 bits 5 ms."""
    assert least_time(ROOF, 1e9, 2e9, 0).compute_s == pytest.approx(0.015)


@given(AMOUNT, AMOUNT, AMOUNT)
def test_attainable_rate_matches_the_paper(operations: float, moved: float, factor: float) -> None:
    """Operations divided by the minimum time equal min(peak, bandwidth · intensity)."""
    roof = Roof(factor, 1e11, 4e11)
    attainable = min(roof.fp32_per_s, roof.bytes_per_s * operations / moved)
    assert operations / least_time(roof, operations, 0, moved).seconds == pytest.approx(attainable)


@pytest.mark.parametrize(
    ("compute", "memory", "measured", "side"),
    [
        (0.5, 0.2, 1.0, "compute"),
        (0.2, 0.5, 1.0, "memory"),
        (0.2, 0.13, 1.0, "overhead"),
        (0.2, 0.14, 1.0, "compute"),
        (0.0, 0.0, 1.0, "overhead"),
        (0.0, 1 / 3, 1.0, "memory"),
    ],
)
def test_limiting_resource(compute: float, memory: float, measured: float, side: str) -> None:
    assert bottleneck(compute, memory, measured) == side


@pytest.mark.parametrize("roof", [Roof(0, 1, 1), Roof(1, -1, 1), Roof(1, 1, 0)])
def test_zero_peak_or_bandwidth_is_refused(roof: Roof) -> None:
    with pytest.raises(ValueError, match="above 0"):
        least_time(roof, 1, 1, 1)


FILL = np.array([-1.0, -2.0], np.float32)


def images(count: int) -> np.ndarray:
    """Return images [count, 2, 3, 4] in which no value occurs twice."""
    return np.arange(count * 24, dtype=np.float32).reshape(count, 2, 3, 4)


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Shift pixel by pixel: (y, x) moves to (y + down, x + right); uncovered pixels become `FILL`."""
    channels, height, width = image.shape
    result = np.empty_like(image)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                inside = 0 <= y - down < height and 0 <= x - right < width
                result[channel, y, x] = image[channel, y - down, x - right] if inside else FILL[channel]
    return result


def test_crops_are_uniform_over_all_shifts():
    shown = images(2500)
    cropped = random_crop(shown, 2, FILL, np.random.default_rng(0))
    assert cropped.shape == shown.shape and cropped.dtype == np.float32
    counts = np.zeros((5, 5), int)
    for image, actual in zip(shown, cropped, strict=True):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if (actual == moved(image, down, right)).all()
        ]
        assert len(matches) == 1
        counts[matches[0][0] + 2, matches[0][1] + 2] += 1
    # 100 expected of each: chi-square with 24 degrees of freedom lies below 51.2 with probability 0.999.
    assert ((counts - 100) ** 2 / 100).sum() < 51.2


def test_flip_mirrors_the_requested_share_of_images():
    shown = images(2000)
    flipped = random_horizontal_flip(shown, 0.3, np.random.default_rng(0))
    mirrored = np.array([(actual == image[:, :, ::-1]).all() for image, actual in zip(shown, flipped, strict=True)])
    assert (flipped[~mirrored] == shown[~mirrored]).all()
    # Three standard deviations of a share of 0.3 among 2,000.
    assert abs(mirrored.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)


def test_input_images_are_not_modified():
    shown = images(8)
    random_crop(shown, 1, FILL, np.random.default_rng(0))
    random_horizontal_flip(shown, 0.9, np.random.default_rng(0))
    assert (shown == images(8)).all()
