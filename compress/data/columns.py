"""Select a task's columns among those of a source and convert their values to strings or media values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from compress.data.column_values import Chunk, ColumnWriter, parts, release_pages, values_of
from compress.data.files import Rows
from compress.data.media import media, media_type
from compress.utils.errors import DataError, did_you_mean, nearest_name

if TYPE_CHECKING:
    import pyarrow as pa

_SHOWN = 5
_SHOWN_LABELS = 50
_FILE = "an encoded file's bytes, its path, or both as `bytes` and `path`"
_EXPECTED = {"text": "a string, or for labels a string or a number"} | dict.fromkeys(
    ("image", "audio", "arrays"), _FILE
)


class LabelsWithin(Protocol):
    """Codec for values that contain several labels, or labels beside other things."""

    def find(self, value: Any) -> list[str]:
        """Return the labels in a value."""

    def rename(self, value: Any, names: Sequence[str]) -> object:
        """Return the value with ``names`` in place of its labels."""


class Spaced:
    """Labels separated by spaces."""

    def find(self, value: str) -> list[str]:
        """Return the labels of one string."""
        return value.split(" ")

    def rename(self, value: str, names: Sequence[str]) -> str:
        """Return ``names`` joined by spaces."""
        return " ".join(names)


@dataclass(frozen=True)
class Column:
    """Column that a task reads.

    Attributes:
        name: Name of the column in the task.
        label: True for class names or ids.
        kind: "text" columns hold strings. The others hold encoded files as in `compress.data.media`, which the task
            decodes.
        given: False for a column that holds the expected output, which unlabeled examples do not have.
        read: Converts a source value to the task's string, or ``None`` if there is none. It raises `TypeError` for a
            value of another type than ``expected``, and `DataError` for an invalid one.
        expected: Description of valid values, for messages.
        within: Finds the labels in the string of a label column, if they are not all of it.
        fewest: Number of distinct labels that the column must have.
        check: Raises `DataError` for a value that does not fit the other values of its row.
        optional: True if a source may lack the column, unless the recipe names it.
    """

    name: str
    label: bool = False
    kind: Literal["text", "image", "audio", "arrays"] = "text"
    given: bool = True
    read: Callable[[Any], str | None] | None = None
    expected: str = ""
    within: LabelsWithin | None = None
    fewest: int = 2
    check: Callable[[Mapping[str, Any]], None] | None = None
    optional: bool = False

    @property
    def is_input(self) -> bool:
        """Return whether the column is a model input and not an expected output."""
        return self.given and not self.label

    def labels(self, table: pa.Table) -> Iterator[list[str]]:
        """Yield the labels of each row of a label column."""
        return ([value] if self.within is None else self.within.find(value) for value in values_of(table[self.name]))

    def distinct_labels(self, table: pa.Table) -> set[str]:
        """Return the labels that occur in a label column."""
        if self.kind == "text" and self.within is None:
            return set(table[self.name].unique().to_pylist())
        return {label for labels in self.labels(table) for label in labels}

    def renamed(self, table: pa.Table, names: Sequence[str]) -> list[Any]:
        """Return the values of a label column with ``names`` in place of their ids."""
        new_labels = ([names[int(label)] for label in labels] for labels in self.labels(table))
        pairs = zip(values_of(table[self.name]), new_labels, strict=True)
        return [new[0] if self.within is None else self.within.rename(value, new) for value, new in pairs]


def normalised(text: str) -> str:
    """Return the text casefolded, with each run of white space as one space."""
    return " ".join(text.casefold().split())


def check_mapping(mapping: Mapping[str, str], columns: Sequence[Column]) -> None:
    """Raise `DataError` for a mapped name that is none of the task's columns."""
    names = [column.name for column in columns]
    for name in mapping:
        if name not in names:
            raise DataError(
                f"The task has no column {name!r}." + did_you_mean(name, names),
                where=f"data.columns.{name}",
                expected=f"one of {', '.join(names)}",
            )


def check_extra(rows: Rows, extra: Collection[str]) -> None:
    """Raise `DataError` for a column that a slice reads and the rows do not have."""
    for name in extra:
        if name not in rows.names:
            raise DataError(
                f"{rows.name} has no column {name!r}, which a slice reads." + did_you_mean(name, rows.names),
                where="slices",
                expected=f"one of its columns: {', '.join(rows.names)}",
            )


def choose(rows: Rows, columns: Sequence[Column], mapping: Mapping[str, str]) -> pa.Table:
    """Return a table with the task's column names; labels as the source spells them.

    Raises `DataError` with the problems of all columns.
    """
    import pyarrow as pa

    arrays, errors = dict[str, pa.ChunkedArray](), list[DataError]()
    for column in columns:
        source_name = mapping.get(column.name, column.name)
        if source_name in rows.names:
            try:
                arrays[column.name] = _converted(rows, source_name, column)
            except DataError as error:
                errors.append(error)
        elif not column.optional or column.name in mapping:
            example = nearest_name(source_name, rows.names) or "COLUMN"
            missing = DataError(
                f"{rows.name} has no column {source_name!r}." + did_you_mean(source_name, rows.names),
                where=f"data.columns.{column.name}" if column.name in mapping else "data",
                expected=f"one of its columns: {', '.join(rows.names)}",
                hint=f"say which column it is, e.g. data: {{columns: {{{column.name}: {example}}}}}, or --set "
                f"data.columns.{column.name}=...",
            )
            errors.append(missing)
    if errors:
        raise DataError.of_all(errors)
    # Some values are valid only beside the others of their row, such as a box within its image.
    checks = [column.check for column in columns if column.check is not None]
    for index, values in enumerate(zip(*map(values_of, arrays.values()), strict=True) if checks else ()):
        try:
            for check in checks:
                check(dict(zip(arrays, values, strict=True)))
        except DataError as error:
            raise _placed(error, rows.place(index)) from error
    return pa.table(arrays)


def _placed(error: DataError, place: str) -> DataError:
    return DataError(f"{place}: {error.what}", where=error.where, expected=error.expected, hint=error.hint)


def are_label_ids(values: Collection[str], labels: Sequence[str]) -> bool:
    """Return whether ``values`` are the ids 0 to n-1 of ``labels`` and not their names."""
    ids = {str(index) for index in range(len(labels))}
    return not set(values) <= set(labels) and set(values) <= ids


def check_labels(table: pa.Table, column: Column, labels: Sequence[str], place: Callable[[int], str]) -> None:
    """Raise `DataError` for the first label that is not among ``labels``.

    Args:
        table: Rows of a split.
        column: The label column.
        labels: Valid class names.
        place: Returns the position of a row, for the message.
    """
    valid = set(labels)
    if column.distinct_labels(table) <= valid:
        return
    for index, values in enumerate(column.labels(table)):
        value = next((value for value in values if value not in valid), None)
        if value is not None:
            raise DataError(
                f"The label {value!r} is not among the labels." + did_you_mean(value, labels),
                where=place(index),
                expected=f"one of {', '.join(labels[:_SHOWN_LABELS])}{_more(labels)}",
                hint="correct the row, or list every class under `data.labels` in the order of their ids",
            )


def _more(labels: Sequence[str]) -> str:
    """Return the number of labels that are not shown, in words."""
    return f" and {len(labels) - _SHOWN_LABELS:,} more" if len(labels) > _SHOWN_LABELS else ""


def _converted(rows: Rows, name: str, column: Column) -> pa.ChunkedArray:
    """Return strings or media values; ``name`` is the column's name in the source."""
    import pyarrow as pa

    writer, empty, index = ColumnWriter(pa.string() if column.kind == "text" else media_type()), list[int](), 0
    for chunk in parts(rows.columns[name]):
        values = chunk.to_list()
        converted = [_convert(value, rows, index + offset, name, column) for offset, value in enumerate(values)]
        if None in converted:
            empty += [index + offset for offset, value in enumerate(converted) if value is None]
        elif not empty:
            _append(writer, chunk, values, converted)
        index += len(values)
        release_pages()
    if empty:
        shown = ", ".join(rows.place(index) for index in empty[:_SHOWN])
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise DataError(
            f"The column {name!r} has {len(empty)} of {len(rows.columns[name])} values missing or empty.",
            where=shown + more,
            expected="a value in every row",
            hint="fill in or remove these rows",
        )
    return pa.chunked_array([chunk.values for chunk in writer.finish().chunks], writer.data_type)


def _append(writer: ColumnWriter, chunk: Chunk, values: list[Any], converted: list[Any]) -> None:
    """Append converted values: the chunk itself if they are its strings, because it may be stored in a file."""
    is_stored = not isinstance(chunk.values, list) and chunk.values.type == writer.data_type and not chunk.is_json
    if is_stored and all(map(operator.is_, values, converted)):
        writer.add(chunk)
    else:
        for value in converted:
            writer.append(value)


def _convert(value: Any, rows: Rows, index: int, name: str, column: Column) -> object:
    """Return a value as a string or media value, or ``None`` if it is missing. Raises `DataError`."""
    try:
        if column.read is not None:
            return None if value is None else column.read(value)
        return media(value, rows.folder) if column.kind != "text" else _text(value, column.label)
    except TypeError:
        raise DataError(
            f"The column {name!r} has a value of type {type(value).__name__}: {value!r:.60}.",
            where=rows.place(index),
            expected=column.expected or _EXPECTED[column.kind],
        ) from None
    except UnicodeEncodeError:
        raise DataError(
            f"The column {name!r} has a value with an unpaired surrogate, which is not a valid character.",
            where=rows.place(index),
        ) from None
    except DataError as error:
        raise _placed(error, rows.place(index)) from error


def _text(value: object, is_label: bool) -> str | None:
    """Return a text, a class name or an id as digits, or ``None`` if it is missing or blank."""
    if is_label and isinstance(value, int | float):
        return None if value != value else value_text(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError
    value.encode()
    return (value.strip() if is_label else value) if value.strip() else None


def value_text(value: object) -> str:
    """Return a column value as text: true, 1 and 1.0 become `true`, `1` and `1`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
