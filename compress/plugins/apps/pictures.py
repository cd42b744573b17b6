"""Pictures for a self-test that are nobody's data: drawn from formulas, small as PNG, and hard to resize alike."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.data.media import Mode

if TYPE_CHECKING:
    from PIL import Image

_SKY, _SUN, _HILLS = ((96, 148, 214), (250, 214, 165)), (255, 240, 190), ((84, 120, 92), (52, 92, 70), (34, 62, 54))


@functools.cache
def pictures() -> Sequence[bytes]:
    """PNG files: a landscape, a fruit with a soft edge, tiles, an upright gray one, noise, and one of six pixels.

    There are colours and gray, transparency, sizes above and below any model's, sides that are no multiples, and
    patterns as fine as a pixel, which every filter but the right one turns into something else.
    """
    arrays = (_landscape(400, 300), _fruit(200), _tiles(480, 360), _stripes(97, 301), _noise(61, 43), _noise(3, 2))
    return tuple(map(_png, arrays))


def noise(width: int, height: int, mode: Mode) -> Image.Image:
    """Drawn anew, the same each time."""
    from PIL import Image

    return Image.fromarray(_noise(width, height)).convert(mode)


def _noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), np.uint8)


def _landscape(width: int, height: int) -> np.ndarray:
    """A sky, a sun, and hills of sines; edges are means of 3 by 3 points."""
    y, x = np.mgrid[0 : 3 * height, 0 : 3 * width] / (3 * height)
    row = (np.floor(y * height) / height)[..., None]
    found = (1 - row) * np.array(_SKY[0]) + row * np.array(_SKY[1])
    found[np.hypot(x - 0.95, y - 0.38) < 0.12] = _SUN
    for number, colour in enumerate(_HILLS):
        ridge = 0.55 + 0.15 * number + 0.07 * np.sin(x * (5 - number) + 2.3 * number) + 0.02 * np.sin(17 * x + number)
        found[y > ridge] = colour
    return np.asarray(found.reshape(height, 3, width, 3, 3).mean(axis=(1, 3)), np.uint8)


def _fruit(side: int) -> np.ndarray:
    """A disc on nothing, its edge and shadow transparent."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side - 0.5
    far = np.hypot(x, y)
    shade = np.floor(16 * np.clip(1 - np.hypot(x + 0.12, y + 0.14) * 1.6, 0, 1)) / 16
    colour = np.stack([150 + 95 * shade, 40 + 120 * shade, 40 + 60 * shade], axis=-1)
    alpha = np.clip((0.42 - far) * 24, 0, 1) * 255
    return np.dstack([colour, alpha]).astype(np.uint8)


def _tiles(width: int, height: int) -> np.ndarray:
    """Squares of eight colours, in every third of them a board of single pixels."""
    y, x = np.mgrid[0:height, 0:width]
    number = (x // 60 + 3 * (y // 60)) % 8
    found = np.stack([np.where(number & bit, 230, 40) for bit in (1, 2, 4)], axis=-1)
    fine = ((x // 60 + y // 60) % 3 == 0) & ((x + y) % 2 == 0)
    found[fine] = 255 - found[fine]
    return found.astype(np.uint8)


def _stripes(width: int, height: int) -> np.ndarray:
    """Gray, ever finer from top to bottom."""
    y = np.mgrid[0:height, 0:width][0] / height
    return np.where(np.sin(60 * y * y * y) > 0, 220, 60).astype(np.uint8)


def _png(array: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return file.getvalue()
