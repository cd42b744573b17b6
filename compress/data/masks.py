"""Segmentation masks: images of one channel whose pixels are class ids, with 255 for ignored pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.data.media import Media, content, describe, picture_size
from compress.utils.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np

IGNORED = 255
"""Id of pixels that belong to no class, as in VOC, Cityscapes and transformers."""
_IDS = ("L", "P", "1", "I;16", "I")


def read_mask(encoded: bytes, where: str) -> np.ndarray:
    """Return the class ids of a mask, [height, width] uint8. For a palette image these are the palette indices.

    Raises `DataError` for a broken image, and for an image that holds colors.
    """
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", "Reading masks") from error
    expected = "a PNG file of one channel, whose pixels are ids of classes, or 255 for what does not count"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode, ids = image.mode, np.asarray(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where} is no whole picture: {error}", where=where, expected=expected) from error
    if mode not in _IDS:
        raise DataError(
            f"{where} is a mask of {mode}.",
            where=where,
            expected=expected,
            hint="write each class as its id, not a colour",
        )
    if ids.max(initial=0) > IGNORED:
        raise DataError(f"{where} has the id {ids.max()}.", where=where, expected=f"ids below {IGNORED}")
    return ids.astype(np.uint8)


class MaskIds:
    """Codec of the labels in a mask (`compress.data.columns.LabelsWithin`)."""

    def find(self, value: Media) -> list[str]:
        """Return the distinct class ids of a mask."""
        import numpy as np

        return [str(key) for key in np.unique(read_mask(content(value), describe(value))).tolist() if key != IGNORED]

    def rename(self, value: Media, names: Sequence[str]) -> Media:
        """Return the mask unchanged: its pixels stay ids."""
        return value


def check_as_large(row: Mapping[str, Any]) -> None:
    """Raise `DataError` for a `mask` whose size differs from that of its `image`."""
    picture, mask = (picture_size(row[name]) for name in ("image", "mask"))
    if picture != mask:
        raise DataError(
            f"The picture has {picture[0]} x {picture[1]} pixels and its mask {mask[0]} x {mask[1]}.",
            where=describe(row["mask"]),
            expected="an id for each pixel of the picture",
        )
