"""Images and recordings as values of a column: an encoded file, by its bytes or by its path.

A value is what the Hugging Face datasets `Image` and `Audio` features store, `bytes` or `path`, and the SHA-256 of the
content beside them, by which rows are told apart. Files that stay where they are are read when a task decodes them.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.utils.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image


Media = Mapping[str, Any]
"""`bytes`, or else `path`, and `sha256`."""


def media_type() -> pa.DataType:
    """The type of such a column."""
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("sha256", pa.string())])


def is_media(column: pa.ChunkedArray) -> bool:
    """Whether a column holds images or recordings rather than strings."""
    import pyarrow as pa

    return bool(pa.types.is_struct(column.type))


def media(value: object, folder: Path | None) -> Media | None:
    """What a source has, as a value of the column: bytes, a path from ``folder``, or a mapping of both.

    None where there is nothing. Raises `TypeError` for anything else, and `DataError` for a file that can't be read.
    """
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
    else:
        content, path = (value, None) if isinstance(value, bytes) else (None, value)
    if content is not None:
        if not isinstance(content, bytes):
            raise TypeError
        return _value(content, content, path) if content else None
    if path is None:
        return None
    if not isinstance(path, str):
        raise TypeError
    if not path.strip():
        return None
    file = (folder or Path()) / Path(path).expanduser()
    return _value(None, _read(file), str(file.absolute()))


def content(value: Media) -> bytes:
    """The encoded file. Raises `DataError` where it has gone since the data was read, or is another one."""
    inline: bytes | None = value["bytes"]
    if inline is not None:
        return inline
    found = _read(Path(value["path"]))
    if hashlib.sha256(found).hexdigest() != value["sha256"]:
        raise DataError("A file has changed since the data was read.", where=value["path"], hint="run again")
    return found


def with_contents(table: pa.Table) -> pa.Table:
    """The table with the bytes of every file in it, for a machine that doesn't have the files. Raises `DataError`."""
    import pyarrow as pa

    for place, name in enumerate(table.column_names):
        if is_media(table.column(name)):
            values = [value and {**value, "bytes": content(value)} for value in table.column(name).to_pylist()]
            table = table.set_column(place, name, pa.array(values, media_type()))
    return table


def identities(column: pa.ChunkedArray) -> list[str]:
    """What tells the values of any column apart: strings as they stand, files by their SHA-256."""
    if not is_media(column):
        strings: list[str] = column.to_pylist()
        return strings
    return [value["sha256"] for value in column.to_pylist()]


def shown(column: pa.ChunkedArray) -> list[str]:
    """The values of any column in the words that a reader needs: strings as they stand, files by name or digest."""
    if not is_media(column):
        strings: list[str] = column.to_pylist()
        return strings
    return ["/".join(Path(describe(value)).parts[-2:]) for value in column.to_pylist()]


def describe(value: Media) -> str:
    """A file by its path, or by the beginning of its digest."""
    path: str | None = value["path"]
    return path or f"SHA-256 {value['sha256'][:12]}"


def _value(inline: bytes | None, whole: bytes, path: object) -> Media:
    name = path if isinstance(path, str) else None
    return {"bytes": inline, "path": name, "sha256": hashlib.sha256(whole).hexdigest()}


def _read(file: Path) -> bytes:
    try:
        found = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be read: {error.strerror or error}.",
            where=str(file),
            expected="a file, by its path from the folder of the data file or from the root",
        ) from error
    if not found:
        raise DataError(f"{file.name} is empty.", where=str(file), expected="an encoded image or recording")
    return found


Mode = Literal["RGB", "L"]
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_WIDER = ("I", "F")
_ORIENTATION, _LYING = 0x0112, 5
"""The EXIF tag that says how a picture is turned; from this value on it lies on its side."""
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


def picture_size(value: Media) -> tuple[int, int]:
    """Width and height once it is upright, by the file's header alone. Raises `DataError` for what is no image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", "Reading images") from error
    source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
    try:
        with Image.open(source) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(_ORIENTATION, 1) >= _LYING else (width, height)
    except UnidentifiedImageError as error:
        raise _broken(value, "is no image that Pillow knows") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise _broken(value, f"is broken ({error})") from error


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
        hint="take it out of the data, or save it again",
    )
