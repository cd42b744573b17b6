"""Drawn pictures, and how two differ, as small PNG files that a report holds."""

from __future__ import annotations

import base64
import io

import numpy as np

_SIDE = 128
"""Pixels that a report's pictures have along a side at most."""
_FULL = 64
"""Levels of difference that are drawn in full colour."""


def png_of(levels: np.ndarray) -> str:
    """A picture [height, width, channels] in levels of 0 to 255, scaled down where it is large, in Base64."""
    from PIL import Image

    image = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def difference_of(levels: np.ndarray, reference: np.ndarray) -> str:
    """Where ``levels`` is lighter than ``reference``, red; where it is darker, blue; white where both are the same.

    64 levels are full colour, by the mean over the channels.
    """
    apart = (levels.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / _FULL
    rest = np.rint(255 * (1 - np.clip(np.abs(apart), 0, 1)))
    white = np.full_like(rest, 255)
    colours = np.stack([np.where(apart >= 0, white, rest), rest, np.where(apart >= 0, rest, white)], axis=-1)
    return png_of(colours.astype(np.uint8))
