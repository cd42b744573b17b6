"""Read CSV, TSV, JSONL, JSON and Parquet files and class folders into columns, with the line of each row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.data.config import FILE_SUFFIXES
from compress.utils.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Rows of a source. ``names`` lists all columns, ``columns`` holds only the requested ones.

    A value is ``None`` where the source has none. ``lines`` holds the line on which each row begins, from 1, or is
    ``None`` for sources without lines. Relative paths among the values are resolved against ``folder``.
    """

    name: str
    names: tuple[str, ...]
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    folder: Path | None = None

    def place(self, index: int) -> str:
        """Return the position of the row at ``index`` (from 0), for a message."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, row {index + 1}"


def read_file(path: Path, wanted: Collection[str]) -> Rows:
    """Return those of the columns ``wanted`` that a file has. Raises `DataError`."""
    if path.suffix not in FILE_SUFFIXES:
        suffixes = f"{', '.join(FILE_SUFFIXES[:-1])} or {FILE_SUFFIXES[-1]}"
        raise DataError(f"{path.name} is not a supported data file.", expected=f"a file ending in {suffixes}")
    try:
        if path.suffix == ".parquet":
            return replace(_read_parquet(path, wanted), folder=path.parent)
        text = _read_text(path)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.", where=str(path)) from error
    rows = (_read_csv if path.suffix in (".csv", ".tsv") else _from_objects)(path, text, wanted)
    return replace(rows, folder=path.parent)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name} is not UTF-8: byte 0x{content[error.start]:02x} cannot be decoded.",
            where=f"{path}:{line}",
            expected="text in UTF-8",
            hint=f"save it as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path.name}, if that is what it is",
        ) from error
    if not text.strip():
        raise DataError(f"{path.name} is empty.", where=str(path), expected="at least one row")
    return text


def _no_rows(path: Path, found: str) -> DataError:
    return DataError(f"{path.name} has {found}.", where=str(path), expected="at least one row")


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path.name} has the column {name!r} twice.", where=str(path))


def _read_csv(path: Path, text: str, wanted: Collection[str]) -> Rows:
    records = list(_csv_records(path, text))
    (_, header), body = records[0], records[1:]
    _check_names(path, header)
    if not body:
        raise _no_rows(path, "a header and no rows")
    for line, record in body:
        if len(record) != len(header):
            raise DataError(
                f"{path.name} has a row with {len(record)} fields.",
                where=f"{path}:{line}",
                expected=f"{len(header)} fields, as its header has",
                hint='put a value with a separator, quote or line break in "quotes"; a quote within is ""',
            )
    columns = {name: [record[position] for _, record in body] for position, name in enumerate(header) if name in wanted}
    return Rows(path.name, tuple(header), columns, [line for line, _ in body])


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not a blank line, with the line on which it begins."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # A field may be as long as the file; the limit is global to the csv module, so it is restored.
    previous_limit = csv.field_size_limit(max(len(text), 1))
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name} cannot be parsed: {error}.",
            where=f"{path}:{line}",
            expected='fields in "quotes" end with a quote, and a quote within them is doubled ("")',
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _from_objects(path: Path, text: str, wanted: Collection[str]) -> Rows:
    if path.suffix == ".jsonl":
        lines, objects = _parse_lines(path, text)
    else:
        try:
            items = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path.name} is not JSON: {error}.",
                where=f"{path}{line}",
                expected="an array of objects",
                hint="a file with one object on each line must be called .jsonl",
            ) from error
        if not isinstance(items, list):
            raise DataError(f"{path.name} holds {_short(items)}.", where=str(path), expected="an array of objects")
        if not items:
            raise _no_rows(path, "an array without items")
        lines, objects = None, items
    names: dict[str, None] = {}
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            place = f"{path}:{lines[index]}" if lines else f"{path}, row {index + 1}"
            raise DataError(
                f"{path.name} has a row that is no JSON object: {_short(item)}.",
                where=place,
                expected='an object such as {"text": "...", "label": "..."}',
            )
        names.update(dict.fromkeys(item))
    columns = {name: [item.get(name) for item in objects] for name in names if name in wanted}
    return Rows(path.name, tuple(names), columns, lines)


def _parse_lines(path: Path, text: str) -> tuple[list[int], list[Any]]:
    lines, objects = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path.name} has a line that is not JSON: {error}.",
                where=f"{path}:{number}",
                expected="one JSON object on each line",
            ) from error
        lines.append(number)
    return lines, objects


def _read_parquet(path: Path, wanted: Collection[str]) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty.", where=str(path), expected="at least one row")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            _check_names(path, names)
            table = file.read(columns=[name for name in names if name in wanted])
            rows = file.metadata.num_rows
        columns = {name: table[name].to_pylist() for name in table.column_names}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not a complete Parquet file: {error}", where=str(path)) from error
    if not rows:
        raise _no_rows(path, "columns and no rows")
    return Rows(path.name, names, columns)


def _short(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
"""Column name -> file suffixes."""
LABEL = "label"


def read_class_folder(folder: Path, wanted: Collection[str]) -> Rows:
    """Read the files of class folders: paths in a column `image` or `audio`, folder names in `label`, sorted by name.

    Hidden files are ignored. Raises `DataError` for any other file and for a file outside a class folder.
    """
    paths, labels = [], []
    for class_folder in _visible(folder):
        if not class_folder.is_dir():
            raise _stray(class_folder, folder)
        for path in _visible(class_folder):
            if not path.is_file() or _kind(path) is None:
                raise _stray(path, folder)
            paths.append(path)
            labels.append(class_folder.name)
    kinds = sorted({_kind(path) or "" for path in paths})
    if len(kinds) != 1:
        raise DataError(
            f"{folder.name} holds {' and '.join(kinds) or 'no files'}.",
            where=str(folder),
            expected="one folder for each class, with images or with recordings in it",
        )
    columns: dict[str, list[Any]] = {kinds[0]: [str(path.absolute()) for path in paths], LABEL: labels}
    return Rows(folder.name, (kinds[0], LABEL), {name: values for name, values in columns.items() if name in wanted})


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder.name} cannot be read: {error.strerror or error}.", where=str(folder)) from error


def _kind(path: Path) -> str | None:
    return next((kind for kind, suffixes in KINDS.items() if path.suffix.lower() in suffixes), None)


def _stray(path: Path, folder: Path) -> DataError:
    endings = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
    return DataError(
        f"{path.relative_to(folder)} is no image or recording in the folder of a class.",
        where=str(path),
        expected=f"{folder.name}/CLASS/FILE, the file ending in one of {endings}",
        hint="remove it, or rename it to begin with a dot",
    )
