"""Encoded images as pixels: grayscale, CMYK, 16-bit, transparent and turned ones are converted, broken ones named."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from compress.data.media import Media, content, describe
from compress.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image

Mode = Literal["RGB", "L"]
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_WIDER = ("I", "F")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def decode(value: Media, mode: Mode, conversions: Counter[str]) -> Image.Image:
    """The image in ``mode``; what had to be done to it is counted in ``conversions``, in words.

    It is turned upright as its EXIF tag says; what is transparent is laid on white; 16 bits are scaled to 8; of an
    animation it is the first picture. Raises `DataError` for what is no whole image or too large to be one.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", "Reading images") from error
    encoded = content(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            if getattr(image, "n_frames", 1) > 1:
                conversions["animated, of which the first picture counts"] += 1
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise _broken(value, "is no image that Pillow knows") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _broken(value, f"is too large to be an example ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise _broken(value, f"is broken ({error})") from error
    if upright.mode in _WIDER:
        raise _broken(value, "has more than 16 bits a value, so that nobody knows which of them is white")
    if upright.mode == mode and "transparency" not in upright.info:
        return upright
    return _converted(upright, mode, conversions)


def _converted(image: Image.Image, mode: Mode, conversions: Counter[str]) -> Image.Image:
    from PIL import Image

    if image.mode in _SIXTEEN_BITS:
        conversions["with 16 bits, scaled to 8"] += 1
        image = _to_eight_bits(image)
    elif image.mode in _TRANSPARENT or (image.mode in ("P", "L", "RGB") and "transparency" in image.info):
        conversions["transparent, laid on white"] += 1
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    elif mode == "RGB" and image.mode in ("L", "1"):
        conversions["grayscale, as RGB of equal parts"] += 1
    elif mode == "L":
        conversions[f"{image.mode}, as grayscale"] += 1
    elif image.mode != "P":
        conversions[f"{image.mode}, as RGB"] += 1
    return image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """By 1 / 257: 65535 is white."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))


def in_words(conversions: Counter[str], total: int) -> str:
    """A note on what was converted; empty where nothing was."""
    parts: Iterable[str] = (f"{count} {what}" for what, count in sorted(conversions.items()))
    told = "; ".join(parts)
    return f"Of {total} images: {told}." if told else ""


def _broken(value: Media, what: str) -> DataError:
    return DataError(
        f"{describe(value)} {what}.",
        where=describe(value),
        expected="a whole image in a format that Pillow reads, e.g. PNG, JPEG or WebP",
        mend="take it out of the data, or save it again",
    )
