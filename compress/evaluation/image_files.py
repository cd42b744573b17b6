"""Generated images, and the difference of two, as small PNG files for a report."""

from __future__ import annotations

import base64
import io

import numpy as np

_SIDE = 128
"""Largest side of a report's images in pixels."""
_FULL = 64
"""Difference in levels that has full colour."""


def encode_png(levels: np.ndarray) -> str:
    """Return an image [height, width, channels] with levels of 0 to 255 as a PNG in Base64.

    A large image is scaled down.
    """
    from PIL import Image

    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def encode_difference_png(levels: np.ndarray, reference: np.ndarray) -> str:
    """Return the difference of two images: red where ``levels`` is lighter than ``reference``, blue where it is darker.

    It is white where both are equal, and has full colour from 64 levels on, by the mean over the channels.
    """
    difference = (levels.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / _FULL
    fading = np.rint(255 * (1 - np.clip(np.abs(difference), 0, 1)))
    white = np.full_like(fading, 255)
    colours = np.stack(
        [np.where(difference >= 0, white, fading), fading, np.where(difference >= 0, fading, white)], axis=-1
    )
    return encode_png(colours.astype(np.uint8))
