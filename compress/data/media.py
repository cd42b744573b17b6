"""Images and recordings as column values: an encoded file, by its bytes or by its path.

A value has the fields that the Hugging Face datasets features `Image` and `Audio` store, `bytes` or `path`, and the
SHA-256 of the content, which identifies the row. Files that stay where they are are read when a task decodes them.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.data.column_values import values_of
from compress.utils.environment import granted_cores
from compress.utils.errors import DataError, MissingExtraError
from compress.utils.paths import expanded
from compress.utils.progress import Progress
from compress.utils.read_limits import refuse_expansion

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image


Media = Mapping[str, Any]
"""Mapping with `bytes` or `path`, and `sha256`."""


def media_type() -> pa.DataType:
    """Return the Arrow type of a media column."""
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("sha256", pa.string())])


def is_media(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds images or recordings and not strings."""
    import pyarrow as pa

    return bool(pa.types.is_struct(column.type))


def media(value: object, folder: Path | None) -> Media | None:
    """Convert a source value (bytes, a path relative to ``folder``, or a mapping of both) to a media value.

    Returns ``None`` for an empty value. Raises `TypeError` for another type, and `DataError` for an unreadable file.
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
    file = (folder or Path()) / expanded(path)
    return _value(None, _read(file), str(file.absolute()))


def content(value: Media) -> bytes:
    """Return the encoded file. Raises `DataError` if it was removed or changed since the data was read."""
    inline: bytes | None = value["bytes"]
    if inline is not None:
        return inline
    encoded = _read(Path(value["path"]))
    if hashlib.sha256(encoded).hexdigest() != value["sha256"]:
        raise DataError("A file has changed since the data was read.", where=value["path"], hint="run again")
    return encoded


def with_contents(table: pa.Table) -> pa.Table:
    """Return the table with the bytes of every file, for a machine that does not have the files. Raises `DataError`."""
    import pyarrow as pa

    for index, name in enumerate(table.column_names):
        if is_media(table.column(name)):
            values = [value and {**value, "bytes": content(value)} for value in table.column(name).to_pylist()]
            table = table.set_column(index, name, pa.array(values, media_type()))
    return table


def identities(column: pa.ChunkedArray) -> Iterator[str]:
    """Yield the identity of each value: strings as they are, files by their SHA-256."""
    for value in values_of(column):
        yield value if isinstance(value, str) else value["sha256"]


def shown(column: pa.ChunkedArray) -> list[str]:
    """Return each value for display: strings as they are, files by name or digest."""
    values = column.to_pylist()
    return [value if isinstance(value, str) else "/".join(Path(describe(value)).parts[-2:]) for value in values]


def describe(value: Media) -> str:
    """Return the path of a file, or the beginning of its digest."""
    path: str | None = value["path"]
    return path or f"SHA-256 {value['sha256'][:12]}"


def _value(inline: bytes | None, whole: bytes, path: object) -> Media:
    name = path if isinstance(path, str) else None
    return {"bytes": inline, "path": name, "sha256": hashlib.sha256(whole).hexdigest()}


def _read(file: Path) -> bytes:
    try:
        encoded = file.read_bytes()
    except (OSError, ValueError) as error:  # no file can have a NUL in its name
        raise DataError(
            f"{file.name} cannot be read: {getattr(error, 'strerror', None) or error}.",
            where=str(file),
            expected="a file, by its path from the folder of the data file or from the root",
        ) from error
    if not encoded:
        raise DataError(f"{file.name} is empty.", where=str(file), expected="an encoded image or recording")
    return encoded


UNREADABLE = (
    ArithmeticError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    struct.error,
)
"""Errors that Pillow raises for broken images."""
Mode = Literal["RGB", "L"]
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_WIDER = ("I", "F")
_ORIENTATION, _LYING = 0x0112, 5
"""EXIF tag of the orientation. From the second value on, width and height are swapped."""
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


def require_pillow(needed_by: str) -> None:
    """Raise `MissingExtraError` if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "vision", needed_by) from error


def decode(value: Media, mode: Mode, conversions: Counter[str]) -> Image.Image:
    """Decode an image in ``mode`` and count the conversions that it needed.

    The image is rotated according to its EXIF tag, transparency is composed onto white, 16 bits are scaled to 8, and
    only the first frame of an animation is used.

    Raises:
        DataError: If the image is broken or too large.
    """
    require_pillow("Reading images")
    from PIL import Image, ImageOps, UnidentifiedImageError

    encoded = content(value)
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its pixel limit; treat that as an error too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            refuse_expansion(4 * image.width * image.height, len(encoded), "An image", describe(value))
            if getattr(image, "n_frames", 1) > 1:
                conversions["animated; the first frame is used"] += 1
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError as error:
        raise _broken(value, "is not an image that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise _broken(value, f"is too large to be an example ({error})") from error
    except UNREADABLE as error:
        raise _broken(value, f"is broken ({error})") from error
    if image.mode in _WIDER:
        raise _broken(value, "has more than 16 bits per value, so that its white level is unknown")
    if image.mode == mode and "transparency" not in image.info:
        return image
    try:
        return _converted(image, mode, conversions)
    except UNREADABLE as error:  # a palette that is too short
        raise _broken(value, f"is broken ({error})") from error


def broken_images(tables: Sequence[pa.Table], columns: Sequence[str], progress: Progress) -> list[DataError]:
    """Return one error for each file in the image ``columns`` that cannot be decoded."""
    values = [
        value for table in tables for name in columns if name in table.column_names for value in table[name].to_pylist()
    ]

    def error_of(value: Media) -> DataError | None:
        try:
            decode(value, "RGB", Counter())
        except DataError as error:
            return error
        return None

    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor(len(granted_cores())) as threads:
        results = threads.map(error_of, values)
        errors = list(progress.track(results, "open images", len(values))) if values else []
    return [error for error in errors if error is not None]


def picture_size(value: Media) -> tuple[int, int]:
    """Return width and height after EXIF rotation, from the header alone. Raises `DataError` for a broken image."""
    require_pillow("Reading images")
    from PIL import Image, UnidentifiedImageError

    source = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
    try:
        with Image.open(source) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(_ORIENTATION, 1) >= _LYING else (width, height)
    except UnidentifiedImageError as error:
        raise _broken(value, "is not an image that Pillow can read") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise _broken(value, f"is too large to be an example ({error})") from error
    except UNREADABLE as error:
        raise _broken(value, f"is broken ({error})") from error


def _converted(image: Image.Image, mode: Mode, conversions: Counter[str]) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode in _SIXTEEN_BITS:
        conversions["with 16 bits, scaled to 8"] += 1
        # A factor of 1 / 257 makes 65535 white.
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    elif image.mode in _TRANSPARENT or (image.mode in ("P", "L", "RGB") and "transparency" in image.info):
        conversions["transparent, composited on white"] += 1
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    elif mode == "RGB" and image.mode in ("L", "1"):
        conversions["grayscale, converted to RGB"] += 1
    elif mode == "L":
        conversions[f"{image.mode}, as grayscale"] += 1
    elif image.mode != "P":
        conversions[f"{image.mode}, as RGB"] += 1
    return image.convert(mode)


def in_words(conversions: Counter[str], total: int) -> str:
    """Return a note on the conversions, or an empty string if there were none."""
    summary = "; ".join(f"{count} {what}" for what, count in sorted(conversions.items()))
    return f"Of {total} images: {summary}." if summary else ""


def _broken(value: Media, what: str) -> DataError:
    return DataError(
        f"{describe(value)} {what}.",
        where=describe(value),
        expected="a whole image in a format that Pillow reads, e.g. PNG, JPEG or WebP",
        hint="remove it from the data, or save it again",
    )
