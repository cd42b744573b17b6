"""Images and recordings as values of a column: an encoded file, by its bytes or by its path.

A value is what the Hugging Face datasets `Image` and `Audio` features store, `bytes` or `path`, and the SHA-256 of the
content beside them, by which rows are told apart. Files that stay where they are are read when a task decodes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

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
        raise DataError("A file has changed since the data was read.", where=value["path"], mend="run again")
    return found


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
