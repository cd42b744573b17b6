"""Random crops and flips, against every window and mirror image cut out by hand."""

from __future__ import annotations

import numpy as np

from compress.stages.training.augmentation import random_crop, random_horizontal_flip

FILL = np.array([-1.0, -2.0], np.float32)


def images(count: int) -> np.ndarray:
    """[count, 2, 3, 4], no value twice."""
    return np.arange(count * 24, dtype=np.float32).reshape(count, 2, 3, 4)


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pixel by pixel: what was at (y, x) stands at (y + down, x + right), and what comes in is `FILL`."""
    channels, height, width = image.shape
    result = np.empty_like(image)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                inside = 0 <= y - down < height and 0 <= x - right < width
                result[channel, y, x] = image[channel, y - down, x - right] if inside else FILL[channel]
    return result


def test_a_crop_is_one_of_all_shifts_and_each_comes_equally_often():
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


def test_a_flip_mirrors_columns_of_the_share_asked_for():
    shown = images(2000)
    flipped = random_horizontal_flip(shown, 0.3, np.random.default_rng(0))
    mirrored = np.array([(actual == image[:, :, ::-1]).all() for image, actual in zip(shown, flipped, strict=True)])
    assert (flipped[~mirrored] == shown[~mirrored]).all()
    # Three standard deviations of a share of 0.3 among 2,000.
    assert abs(mirrored.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 2000)


def test_what_is_given_stays_as_it_is():
    shown = images(8)
    random_crop(shown, 1, FILL, np.random.default_rng(0))
    random_horizontal_flip(shown, 0.9, np.random.default_rng(0))
    assert (shown == images(8)).all()
