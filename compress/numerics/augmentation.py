"""Images varied at random: shifted and mirrored, a whole batch at once."""

from __future__ import annotations

import numpy as np


def random_crop(images: np.ndarray, padding: int, fill: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A window of its own size from each of ``images`` [B, C, H, W], after ``padding`` pixels were put on every side.

    ``fill`` [C] is what the padding holds. Each window is drawn by itself, evenly among (2 padding + 1)^2 places.
    """
    count, channels, height, width = images.shape
    padded = np.empty((count, channels, height + 2 * padding, width + 2 * padding), images.dtype)
    padded[:] = fill[:, None, None]
    padded[:, :, padding : padding + height, padding : padding + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = generator.integers(0, 2 * padding + 1, (2, count))
    cropped: np.ndarray = windows[np.arange(count), :, top, left]
    return cropped


def random_horizontal_flip(images: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """``images`` [B, C, H, W], each mirrored left to right with ``probability``, drawn for each by itself."""
    mirrored = generator.random(len(images)) < probability
    flipped: np.ndarray = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    return flipped
