"""PSNR, SSIM and the distance in a network's layers, against closed forms and loops over every window."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.plugins.diffusion.image_similarity import perceptual_distance, psnr, ssim


def _pictures(seed: int, count: int = 3, side: int = 14, channels: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).random((count, side, side, channels))


def _ssim_of_one(first: np.ndarray, second: np.ndarray, span: float) -> float:
    """Wang et al. (2004), equations 13 to 17, window by window, of one channel."""
    offsets = range(-5, 6)
    window = np.array([[math.exp(-(x * x + y * y) / (2 * 1.5**2)) for x in offsets] for y in offsets])
    window /= window.sum()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for row in range(first.shape[0] - 10):
        for column in range(first.shape[1] - 10):
            a, b = (picture[row : row + 11, column : column + 11] for picture in (first, second))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * covariance + c2) / (variance_a + variance_b + c2))
    return float(np.mean(values))


def test_ssim_is_that_of_every_window() -> None:
    first, second = _pictures(0), 0.7 * _pictures(0) + 0.3 * _pictures(1)
    expected = [
        np.mean([_ssim_of_one(a[..., channel], b[..., channel], 1.0) for channel in range(2)])
        for a, b in zip(first, second, strict=True)
    ]
    assert ssim(first, second) == pytest.approx(expected, abs=1e-12)


def test_ssim_of_even_pictures_is_the_luminance_alone() -> None:
    first, second = np.full((1, 11, 12, 1), 40.0), np.full((1, 11, 12, 1), 60.0)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 40 * 60 + c1) / (40**2 + 60**2 + c1)
    assert ssim(first, second, 255.0) == pytest.approx([expected])
    assert ssim(first, first, 255.0) == pytest.approx([1.0])


def test_psnr_by_hand() -> None:
    first = np.zeros((2, 4, 4, 1))
    second = np.stack([np.full((4, 4, 1), 0.1), np.zeros((4, 4, 1))])
    second[1, 0, 0] = 1.0  # one pixel of sixteen
    assert psnr(second, first) == pytest.approx([20.0, 10 * math.log10(16)])
    assert psnr(255 * second, 255 * first, 255.0) == pytest.approx([20.0, 10 * math.log10(16)])


def test_equal_pictures_are_as_near_as_rounding_can_tell() -> None:
    levels = np.arange(0, 256, 0.001) / 255
    rounding = np.square(np.round(levels * 255) / 255 - levels).mean()
    found = psnr(_pictures(0), _pictures(0))
    assert found == pytest.approx([10 * math.log10(1 / rounding)] * 3, abs=0.05)


def test_the_distance_in_layers_by_loops() -> None:
    generator = np.random.default_rng(2)
    shapes = [(3, 5, 4, 4), (3, 7, 2, 2), (3, 6)]
    first, second = ([generator.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = []
    for picture in range(3):
        total = 0.0
        for a, b in zip(first, second, strict=True):
            places = [(a[picture].reshape(a.shape[1], -1)[:, p], b[picture].reshape(a.shape[1], -1)[:, p])
                      for p in range(int(np.prod(a.shape[2:], initial=1)))]  # fmt: skip
            total += np.mean([np.sum((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2) for x, y in places])
        expected.append(total)
    assert perceptual_distance(first, second) == pytest.approx(expected)
    assert perceptual_distance(first, [3.0 * layer for layer in first]) == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pictures_that_do_not_pair_are_refused(measure: object) -> None:
    with pytest.raises(ValueError, match="pair"):
        measure(_pictures(0, count=3), _pictures(0, count=2))  # type: ignore[operator]


def test_a_picture_below_the_window_has_no_structure() -> None:
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(_pictures(0, side=10), _pictures(1, side=10))


def test_layers_of_two_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="same layers"):
        perceptual_distance([np.ones((1, 2))], [])
