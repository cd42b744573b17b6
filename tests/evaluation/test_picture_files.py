"""Pictures of a report: the very levels, and colours of differences by hand."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from compress.evaluation.image_files import encode_difference_png, encode_png


def _read(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_levels_are_kept_as_they_are() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (9, 7, 1), dtype=np.uint8)
    coloured = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert (_read(encode_png(gray)) == gray[..., 0]).all()
    assert (_read(encode_png(coloured)) == coloured).all()


def test_a_large_picture_is_scaled_down_by_means() -> None:
    large = np.zeros((256, 512, 1), dtype=np.uint8)
    large[:, 256:] = 200
    small = _read(encode_png(large))
    assert small.shape == (64, 128)
    assert (small[:, :64] == 0).all() and (small[:, 64:] == 200).all()


def test_lighter_is_red_and_darker_is_blue() -> None:
    reference = np.full((1, 4, 1), 100, dtype=np.uint8)
    after = np.array([[[100], [132], [36], [255]]], dtype=np.uint8)  # 0, half, whole and more than whole of 64 levels
    half = round(255 / 2)
    expected = [[255, 255, 255], [255, half, half], [0, 0, 255], [255, 0, 0]]
    assert _read(encode_difference_png(after, reference)).tolist() == [expected]
