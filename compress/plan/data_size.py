"""How much text or how many rows a data file holds, told by its beginning or its metadata."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from compress.data.files import LABEL, read_class_folder
from compress.errors import DataError
from compress.stage.prediction import Text

_HEAD_BYTES = 1 << 16


def read_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    """Rows and bytes of a data file or class folder, and its columns where that is told. Raises `DataError`."""
    if path.is_dir():
        rows = read_class_folder(path, (LABEL,))
        return Text(len(rows.columns[LABEL]), folder_bytes(path)), rows.names
    try:
        text, columns = _parquet_size(path) if path.suffix == ".parquet" else _text_size(path)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.", where=str(path)) from error
    if text.rows < 1:
        found = "has columns and no rows" if columns else "is empty"
        raise DataError(f"{path.name} {found}.", where=str(path), expected="at least one row")
    return text, columns


def _text_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    text = head.decode("utf-8-sig", errors="replace")
    if path.suffix == ".json":
        seen = text.count("}")
    else:
        seen = text.count("\n") if size > len(head) else len(text.splitlines())
    columns = _columns(path.suffix, text)
    rows = round(seen * size / max(len(head), 1)) - bool(columns and path.suffix == ".csv")
    return Text(rows, size), columns


def _columns(suffix: str, head: str) -> tuple[str, ...]:
    if suffix == ".csv":
        return tuple(next(csv.reader(io.StringIO(head)), ()))
    if suffix == ".jsonl":
        try:
            first = json.loads(head.split("\n", 1)[0])
        except ValueError:
            return ()
        return tuple(first) if isinstance(first, dict) else ()
    return ()


def _parquet_size(path: Path) -> tuple[Text, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Text(0, 0), ()
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path.name} is no whole Parquet file: {error}", where=str(path)) from error
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    uncompressed = sum(group.total_byte_size for group in groups)
    return Text(metadata.num_rows, uncompressed), tuple(metadata.schema.to_arrow_schema().names)


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder, or of a file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
