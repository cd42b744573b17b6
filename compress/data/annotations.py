"""Objects of an image as column values: boxes with one category each, as in COCO and Hugging Face datasets.

A value is a JSON object with `bbox`, a list of [x, y, width, height] in pixels from the upper left corner, and
`category`, a list of as many names.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.data.media import UNREADABLE, Media, content, describe, picture_size, require_pillow
from compress.utils.errors import DataError
from compress.utils.read_limits import parse_json, refuse_expansion

if TYPE_CHECKING:
    import numpy as np


EXPECTED = "`bbox`, a list of [x, y, width, height] in pixels, and `category`, a list of as many names or ids"
_BOXES, _CATEGORIES = ("bbox", "boxes"), ("category", "category_id", "categories", "label", "labels")
_TOLERANCE = 1.0
"""Pixels by which a box may exceed the image because of rounding. The excess is cut off."""
_HINT = "correct or remove the box; COCO's boxes are [x, y, width, height], not two corners"


class Objects(NamedTuple):
    """Boxes and the category of each."""

    boxes: list[list[float]]
    categories: list[str]


def read_objects(value: object) -> str:
    """Convert a mapping of two lists, a list of mappings, or either as JSON, to a column value.

    Raises `TypeError` for anything else, and `DataError` for an invalid box.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise TypeError from None
    boxes: object
    categories: object
    if isinstance(value, Mapping):
        boxes, categories = (_field(value, names) for names in (_BOXES, _CATEGORIES))
    elif isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        boxes, categories = ([_field(item, names) for item in value] for names in (_BOXES, _CATEGORIES))
    else:
        raise TypeError
    if not isinstance(boxes, list | tuple) or not isinstance(categories, list | tuple):
        raise TypeError
    if len(boxes) != len(categories):
        raise DataError(f"There are {len(boxes)} boxes and {len(categories)} categories.", expected=EXPECTED)
    for category in categories:
        if isinstance(category, bool) or not isinstance(category, str | int) or not str(category).strip():
            raise DataError(f"The category {category!r:.60} is no name and no id.", expected=EXPECTED)
    return write_objects(Objects([_box(item) for item in boxes], [str(item).strip() for item in categories]))


def write_objects(objects: Objects) -> str:
    """Return the objects as a column value."""
    return json.dumps({"bbox": objects.boxes, "category": objects.categories})


def objects_in(value: str) -> Objects:
    """Return the objects of a column value."""
    fields = json.loads(value)
    return Objects(fields["bbox"], fields["category"])


class Categories:
    """Codec of the labels in an objects column (`compress.data.columns.LabelsWithin`)."""

    def find(self, value: str) -> list[str]:
        """Return the category of each object."""
        return objects_in(value).categories

    def rename(self, value: str, names: Sequence[str]) -> str:
        """Return the same boxes with other category names."""
        return write_objects(Objects(objects_in(value).boxes, list(names)))


def check_inside(row: Mapping[str, Any]) -> None:
    """Raise `DataError` for a box of `objects` that exceeds its `image`."""
    width, height = picture_size(row["image"])
    for x, y, wide, high in objects_in(row["objects"]).boxes:
        if min(x, y) < -_TOLERANCE or x + wide > width + _TOLERANCE or y + high > height + _TOLERANCE:
            raise DataError(
                f"The box {[x, y, wide, high]} exceeds the image.",
                expected=f"x + width up to {width} and y + height up to {height}, the picture's pixels",
                hint=_HINT,
            )


def _field(value: Mapping[str, object], names: Sequence[str]) -> object:
    """Return the value of the first of ``names`` that a mapping has."""
    key = next((name for name in names if name in value), None)
    if key is None:
        raise DataError(
            f"The objects have no {names[0]}; they have {', '.join(value) or 'nothing'}.", expected=EXPECTED
        )
    return value[key]


def _box(value: object) -> list[float]:
    try:
        numbers = [float(number) for number in value] if isinstance(value, list | tuple) else []
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise DataError(f"The box {value!r:.60} is not four numbers.", expected=EXPECTED)
    if not min(numbers[2:]) > 0:
        raise DataError(f"The box {numbers} is empty.", expected="a width and a height above 0", hint=_HINT)
    return numbers


IGNORED = 255
"""Id of pixels that belong to no class, as in VOC, Cityscapes and transformers."""
_IDS = ("L", "P", "1", "I;16", "I")


def read_mask(encoded: bytes, where: str) -> np.ndarray:
    """Return the class ids of a mask, [height, width] uint8. For a palette image these are the palette indices.

    Raises `DataError` for a broken image, and for an image that holds colors.
    """
    import numpy as np

    require_pillow("Reading masks")
    from PIL import Image

    expected = "a PNG file of one channel, whose pixels are class ids, or 255 for ignored pixels"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            refuse_expansion(4 * image.width * image.height, len(encoded), "A mask", where)
            mode, ids = image.mode, np.asarray(image)
    except (*UNREADABLE, Image.DecompressionBombError, MemoryError) as error:
        raise DataError(f"{where} is not a complete image file: {error}", where=where, expected=expected) from error
    if mode not in _IDS:
        hint = "write each class as its id, not a colour"
        raise DataError(f"{where} is a mask of {mode}.", where=where, expected=expected, hint=hint)
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
