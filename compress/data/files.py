"""Read CSV, TSV, JSONL, JSON, text and Parquet files and class folders into columns, with the line of each row."""

from __future__ import annotations

import codecs
import csv
import io
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from compress.data.column_values import ColumnWriter, take_lines, take_values
from compress.data.config import FILE_SUFFIXES, SPREADSHEET_SUFFIXES
from compress.utils.errors import DataError
from compress.utils.isolation import NativeCrashError, call_in_copy
from compress.utils.read_limits import LIMITS, parse_json, refuse_above, refuse_expansion

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

_HEAD_BYTES = 1 << 16
_VALUE_BYTES = 32
"""Memory of a short value, of which files may store thousands in a byte."""
_SEPARATORS = ",;\t|"
_UNDEFINED_IN_CP1252 = (b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d")


@dataclass(frozen=True)
class Rows:
    """Rows of a source. ``names`` lists all columns, ``columns`` holds only the requested ones.

    A value is ``None`` where the source has none. ``lines`` holds the line on which each row begins, from 1, or is
    ``None`` for sources without lines. Relative paths among the values are resolved against ``folder``. ``notes`` tell
    the user what was guessed or ignored.
    """

    name: str
    names: tuple[str, ...]
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    def place(self, index: int) -> str:
        """Return the position of the row at ``index`` (from 0), for a message."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name}, row {index + 1}"

    def keep(self, names: Collection[str]) -> Rows:
        """Return the rows with the values of some columns only, so that the memory of the others can be freed."""
        return replace(self, columns={name: values for name, values in self.columns.items() if name in names})

    def take(self, indices: np.ndarray, note: str) -> Rows:
        """Return the rows at rising ``indices``, [n] int, with a further note."""
        columns = {name: take_values(values, indices) for name, values in self.columns.items()}
        lines = self.lines and take_lines(self.lines, indices)
        return replace(self, columns=columns, lines=lines, notes=(*self.notes, note))


def unsupported(path: Path, where: str | None = None) -> DataError:
    """Return the error for a file of another type than `FILE_SUFFIXES`."""
    kind, hint = "not a supported data file", None
    if path.suffix.lower() in SPREADSHEET_SUFFIXES:
        kind, hint = "a spreadsheet, which cannot be read", "open it and save the sheet with the rows as CSV (UTF-8)"
    suffixes = f"{', '.join(FILE_SUFFIXES[:-1])} or {FILE_SUFFIXES[-1]}"
    return DataError(f"{path.name} is {kind}.", where=where, expected=f"a file ending in {suffixes}", hint=hint)


def read_file(path: Path, wanted: Collection[str]) -> Rows:
    """Return those of the columns ``wanted`` that a file has. Raises `DataError`."""
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise unsupported(path)
    try:
        if suffix == ".parquet":
            return replace(_read_parquet(path, wanted), folder=path.parent)
        encoding, notes = find_encoding(path)
        # The csv module needs line ends as they are. A JSON string may contain any line separator but \n.
        with path.open(encoding=encoding, newline="\n" if suffix == ".jsonl" else "") as file:
            rows = _READERS[suffix](path, file, wanted)
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be read: {error.strerror or error}.",
            where=str(path),
            expected="a whole data file, which this user may read",
        ) from error
    except UnicodeError as error:
        raise DataError(f"{path.name} cannot be decoded: {error}.", where=str(path)) from error
    if not rows.names:
        raise DataError(f"{path.name} is empty.", where=str(path), expected="at least one row")
    return replace(rows, folder=path.parent, notes=notes)


def find_encoding(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the encoding of a text file, and a note if it is a guess. Raises `DataError` for binary content.

    UTF-16 is recognized by its byte order mark. A file that is not valid UTF-8 is taken for Windows-1252, of which
    Latin-1 text is a part, unless some of its bytes have no meaning there or others are letters in UTF-8.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16", ()
        if b"\0" in head:
            raise _undecodable(path, 1 + head.count(b"\n", 0, head.index(b"\0")), "it has NUL bytes")
        file.seek(0)
        error, has_utf8_letters = None, head.startswith(codecs.BOM_UTF8)
        for number, line in enumerate(file, start=1):
            if line.isascii():
                continue
            try:
                line.decode()
                has_utf8_letters = True
            except UnicodeDecodeError as found:
                has_utf8_letters |= not line[: found.start].isascii()
                problem = f"byte 0x{line[found.start]:02x} cannot be decoded"
                error = error or _undecodable(path, number, problem)
                if any(byte in line for byte in _UNDEFINED_IN_CP1252):
                    raise error from None
            if error and has_utf8_letters:
                raise error
    if error is None:
        return "utf-8-sig", ()
    note = f"{path.name} is not UTF-8 and is read as Windows-1252, which is a guess"
    return "cp1252", (f"{note}: if accented letters are wrong, save it as UTF-8",)


def _undecodable(path: Path, line: int, problem: str) -> DataError:
    return DataError(
        f"{path.name} is neither UTF-8 nor Windows-1252 text: {problem}.",
        where=f"{path}:{line}",
        expected="text in UTF-8, in UTF-16 with a byte order mark, or in Windows-1252 throughout",
        hint="save it as UTF-8",
    )


def find_separator(head: str, suffix: str) -> str:
    """Return the separator of a CSV or TSV file: the one by which most records have as many fields as the header.

    Separators within quoted fields do not count. Without any separator in the header it is the usual one of the suffix.

    Args:
        head: The first characters of the file.
        suffix: The file's suffix.
    """

    def agreement(separator: str) -> float:
        widths = [len(record) for record in csv.reader(io.StringIO(head, newline=""), delimiter=separator) if record]
        # The last record may be cut off.
        complete = widths[:-1] if len(widths) > 2 else widths
        return complete.count(complete[0]) / len(complete) if complete and complete[0] > 1 else 0.0

    usual = "\t" if suffix == ".tsv" else ","
    return max(sorted(_SEPARATORS, key=usual.__ne__), key=agreement)


def field_names(item: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a JSON object and, joined by dots, those of the objects in it."""
    for key, value in item.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from field_names(value, f"{prefix}{key}.")


def _field(item: Any, name: str) -> Any:
    """Return the value at a key of a JSON object, or else at the path of keys that the dots of ``name`` separate."""
    if name in item:
        return item[name]
    for key in name.split("."):
        item = item.get(key) if isinstance(item, dict) else None
    return item


def _no_rows(path: Path, found: str) -> DataError:
    return DataError(f"{path.name} has {found}.", where=str(path), expected="at least one row")


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        subject = f"The name {name[:20]!r}... of a column"
        refuse_above(LIMITS.column_name_characters, len(name), subject, "characters", path)
        if count > 1:
            raise DataError(f"{path.name} has the column {name!r} twice.", where=str(path))


def _read_csv(path: Path, file: TextIO, wanted: Collection[str]) -> Rows:
    separator = find_separator(file.read(_HEAD_BYTES), path.suffix.lower())
    file.seek(0)
    records = _csv_records(path, file, separator)
    _, header = next(records, (0, []))
    _check_names(path, header)
    # Only the wanted columns are kept, so that memory does not grow with the others.
    columns = {name: ColumnWriter() for name in header if name in wanted}
    chosen = [(position, columns[name]) for position, name in enumerate(header) if name in columns]
    lines = array("Q")
    for line, record in records:
        if len(record) != len(header):
            raise DataError(
                f"{path.name} has a row with {len(record)} fields.",
                where=f"{path}:{line}",
                expected=f"{len(header)} fields, as its header has",
                hint='put a value with a separator, quote or line break in "quotes"; a quote within is ""',
            )
        lines.append(line)
        for position, values in chosen:
            values.append(record[position])
    if any(name.strip() for name in header) and not lines:
        raise _no_rows(path, "a header and no rows")
    return Rows(path.name, tuple(header) if lines else (), _finished(columns), lines)


def _finished(columns: Mapping[str, ColumnWriter]) -> dict[str, Sequence[Any]]:
    return {name: writer.finish() for name, writer in columns.items()}


def _csv_records(path: Path, file: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not a blank line, with the line on which it begins."""
    reader = csv.reader(file, delimiter=separator, strict=True)
    # A field may be as long as a small file. The limit is global to the csv module, and files are read in turns and by
    # several threads, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), min(path.stat().st_size + 1, LIMITS.csv_field_characters)))
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


def _read_lines(path: Path, file: TextIO, wanted: Collection[str]) -> Rows:
    """Return one text per line of a .txt file, as the column `text`."""
    lines, columns = array("Q"), {name: ColumnWriter() for name in {TEXT}.intersection(wanted)}
    for number, line in enumerate(file, start=1):
        if text := line.strip():
            lines.append(number)
            for values in columns.values():
                values.append(text)
    return Rows(path.name, (TEXT,) if lines else (), _finished(columns), lines)


def _read_json(path: Path, file: TextIO, wanted: Collection[str]) -> Rows:
    text = file.read()
    if not text.strip():
        return Rows(path.name, (), {})
    try:
        items = parse_json(text)
    except ValueError as error:
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
    places = ((f"{path}, row {number}", item) for number, item in enumerate(items, start=1))
    return Rows(path.name, *_columns_of(path, places, wanted))


def _read_jsonl(path: Path, file: TextIO, wanted: Collection[str]) -> Rows:
    lines = array("Q")

    def parsed() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"{path.name} has a line that is not JSON: {error}.",
                    where=f"{path}:{number}",
                    expected="one JSON object on each line",
                ) from error
            lines.append(number)
            yield f"{path}:{number}", item

    return Rows(path.name, *_columns_of(path, parsed(), wanted), lines)


def _columns_of(
    path: Path, items: Iterable[tuple[str, Any]], wanted: Collection[str]
) -> tuple[tuple[str, ...], dict[str, Sequence[Any]]]:
    """Return the names of all fields, and the wanted columns, of JSON objects with their positions.

    Fields of nested objects are listed for the first row, and where a row has a wanted one.
    """
    names: dict[str, None] = {}
    columns = {name: ColumnWriter() for name in wanted}
    for place, item in items:
        if not isinstance(item, dict):
            raise DataError(
                f"{path.name} has a row that is no JSON object: {_short(item)}.",
                where=place,
                expected='an object such as {"text": "...", "label": "..."}',
            )
        names.update(dict.fromkeys(item if names else field_names(item)))
        for name, values in columns.items():
            values.append(_field(item, name))
    names |= {name: None for name, values in columns.items() if values.has_values}
    return tuple(names), _finished({name: values for name, values in columns.items() if name in names})


def _read_parquet(path: Path, wanted: Collection[str]) -> Rows:
    import pyarrow as pa

    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty.", where=str(path), expected="at least one row")
    try:
        names, rows, columns = parquet_columns(path, wanted)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} is not a complete Parquet file: {error}", where=str(path)) from error
    if not rows:
        raise _no_rows(path, "columns and no rows")
    return Rows(path.name, names, columns)


def parquet_columns(path: Path, wanted: Collection[str]) -> tuple[tuple[str, ...], int, dict[str, list[Any]]]:
    """Return the names of all columns, the number of rows, and the values of those columns ``wanted`` that exist.

    Raises:
        DataError: A name occurs twice, or the values would expand far beyond the size of the file.
        pa.ArrowException: The file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    _check_names(path, schema.names)
    chosen = [name for name in schema.names if name in wanted]
    nested = [name for name in chosen if pa.types.is_nested(schema.field(name).type)]
    # Repeated texts stay stored once until it is known how much memory they take.
    with pq.ParquetFile(path, read_dictionary=[name for name in chosen if name not in nested]) as file:
        largest = _refuse_parquet_bomb(path, file, chosen)
        columns: dict[str, list[Any]] = {name: [] for name in chosen}
        table = file.read(columns=[name for name in chosen if name not in nested])
        expanded = sum(_expanded_bytes(chunk) for column in table.columns for chunk in column.chunks)
        refuse_expansion(expanded, path.stat().st_size, path.name, path)
        for name in table.column_names:
            for chunk in table[name].chunks:
                plain = chunk.dictionary_decode() if isinstance(chunk, pa.DictionaryArray) else chunk
                columns[name] += plain.to_pylist()
        # Texts within lists and structures cannot stay stored once: a few rows at a time are expanded.
        step = max(1, min(1024, LIMITS.expanded_bytes // max(1, largest)))
        for batch in file.iter_batches(step, columns=nested) if nested else ():
            expanded += batch.nbytes
            refuse_expansion(expanded, path.stat().st_size, path.name, path)
            for name in nested:
                columns[name] += batch[name].to_pylist()
        return tuple(schema.names), file.metadata.num_rows, columns


def _refuse_parquet_bomb(path: Path, file: pq.ParquetFile, names: Collection[str]) -> int:
    """Return the bytes of the largest part of the columns, as the file declares them.

    Raises `ReadLimitError` if the columns would expand far beyond the size of the file.
    """
    import pyarrow as pa

    # For some damaged files, this part of pyarrow ends the process, while reading them would raise an exception.
    try:
        chunks = call_in_copy(lambda: _column_chunks(file))
    except NativeCrashError as error:
        raise pa.ArrowInvalid("pyarrow crashes when it reads the sizes of its columns") from error
    chunks = [chunk for chunk in chunks if any(f"{chunk[0]}.".startswith(f"{name}.") for name in names)]
    values = file.metadata.num_rows * len(names) + sum(count for _, count, _ in chunks)
    declared = sum(size for _, _, size in chunks)
    refuse_expansion(declared + _VALUE_BYTES * values, path.stat().st_size, path.name, path)
    return max((size for _, _, size in chunks), default=0)


def _column_chunks(file: pq.ParquetFile) -> list[tuple[str, int, int]]:
    """Return column, number of values and bytes of each part of a column."""
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    return [(chunk.path_in_schema, chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]


def _expanded_bytes(values: pa.Array) -> int:
    """Return the bytes of the values of an array, each as often as it occurs."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(values, pa.DictionaryArray) or pa.types.is_primitive(values.dictionary.type):
        return int(values.nbytes)
    lengths = pc.cast(pc.binary_length(values.dictionary), pa.int64())
    return int(pc.sum(lengths.take(values.indices)).as_py() or 0)


def _short(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
"""Column name -> file suffixes."""
_ENDINGS = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
_SHOWN = 3
LABEL = "label"
TEXT = "text"
_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_lines,
}


def read_class_folder(folder: Path, wanted: Collection[str]) -> Rows:
    """Read the files of class folders: paths in a column `image` or `audio`, folder names in `label`, sorted by name.

    Hidden and other files are ignored, with a note that counts them. Raises `DataError` for a class folder without
    images or recordings, and for one of these in any other place.
    """
    paths, labels, ignored = list[Path](), list[str](), list[str]()
    for class_folder in _entries(folder):
        if class_folder.name.startswith(".") or not class_folder.is_dir():
            _ignore(class_folder, folder, ignored)
            continue
        in_class = list[Path]()
        for path in _entries(class_folder):
            if path.name.startswith(".") or media_kind(path) is None or not path.is_file():
                _ignore(path, folder, ignored)
            else:
                in_class.append(path)
        if not in_class:
            raise DataError(
                f"The class folder {folder.name}/{class_folder.name} holds no image or recording.",
                where=str(class_folder),
                expected=f"files ending in one of {_ENDINGS}",
                hint="add files of the class, or remove the folder",
            )
        paths += in_class
        labels += [class_folder.name] * len(in_class)
    kinds = sorted({media_kind(path) or "" for path in paths})
    if len(kinds) != 1:
        raise DataError(
            f"{folder.name} holds {' and '.join(kinds) or 'no class folders'}.",
            where=str(folder),
            expected="one folder for each class, with images or with recordings in it",
        )
    columns: dict[str, list[Any]] = {kinds[0]: [str(path.absolute()) for path in paths], LABEL: labels}
    chosen = {name: values for name, values in columns.items() if name in wanted}
    return Rows(folder.name, (kinds[0], LABEL), chosen, notes=_ignored_note(folder, ignored))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder.name} cannot be read: {error.strerror or error}.", where=str(folder)) from error


def media_kind(path: Path) -> str | None:
    """Return `image` or `audio` by a file's suffix, or ``None`` for another file."""
    return next((kind for kind, suffixes in KINDS.items() if path.suffix.lower() in suffixes), None)


def _ignore(path: Path, folder: Path, ignored: list[str]) -> None:
    """Record an ignored file. Raises `DataError` for an image or a visible folder, whose rows would be lost."""
    name = str(path.relative_to(folder))
    is_hidden = path.name.startswith(".")
    if not is_hidden and (media_kind(path) or path.is_dir()):
        kind = "a folder within" if path.is_dir() else "an image or recording outside"
        raise DataError(
            f"{name} is {kind} the folder of a class.",
            where=str(path),
            expected=f"{folder.name}/CLASS/FILE, the file ending in one of {_ENDINGS}",
            hint="move or remove it, or rename it to begin with a dot",
        )
    ignored.append(name)


def _ignored_note(folder: Path, ignored: Sequence[str]) -> tuple[str, ...]:
    """Return a note that counts the ignored files and names the first ones."""
    if not ignored:
        return ()
    shown = ", ".join(ignored[:_SHOWN]) + (", ..." if len(ignored) > _SHOWN else "")
    files = "1 file is" if len(ignored) == 1 else f"{len(ignored)} files are"
    return (f"{folder.name}: {files} ignored, being hidden or no image or recording: {shown}",)
