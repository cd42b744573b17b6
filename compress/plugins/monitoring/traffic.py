"""Recorded requests: inputs with their times of arrival, and labels that arrived then or later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.columns import Column, choose, value_text
from compress.data.files import Rows, read_file
from compress.utils.errors import DataError, InputError, nearest_name

if TYPE_CHECKING:
    import pyarrow as pa

ID, AT, LABEL = "id", "at", "label"


@dataclass(frozen=True)
class Traffic:
    """Requests in the order of their times: inputs, and ``at`` in seconds from the first one [n].

    ``labels`` are numbers of requests with their labels, in the order in which these became known.
    """

    name: str
    table: pa.Table
    at: np.ndarray
    labels: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.table)


def read_traffic(path: Path, columns: Sequence[Column], late: Path | None = None) -> Traffic:
    """Read a file with a line per request: the task's inputs, `at` (seconds or ISO 8601), perhaps `id` and `label`.

    Lines with only `id` and `label`, in this file or in ``late``, are labels that arrived later.

    Raises:
        DataError: A request cannot be replayed, an id is unknown or occurs twice, or labels contradict each other.
    """
    names = [column.name for column in columns]
    rows = _read(path, [ID, AT, LABEL, *names])
    # A line with any input is a request. The other lines are labels that arrived later.
    inputs = [_column(rows, name) for name in names]
    lines = [
        line for line, values in enumerate(zip(*inputs, strict=True)) if any(value is not None for value in values)
    ]
    if not lines:
        raise DataError(f"{path.name} has no request.", where=str(path), expected=f"lines with {', '.join(names)}")
    seconds = {line: _seconds(rows, line) for line in lines}
    lines.sort(key=lambda line: seconds[line])
    requests = Rows(
        rows.name,
        rows.names,
        {name: [values[line] for line in lines] for name, values in rows.columns.items()},
        [rows.lines[line] for line in lines] if rows.lines else None,
        rows.folder,
    )
    at = np.array([seconds[line] for line in lines])
    # Later labels refer to a request by its id.
    numbers: dict[str, int] = {}
    for number, value in enumerate(requests.columns.get(ID, [])):
        if value is None:
            continue
        if value_text(value) in numbers:
            raise DataError(f"Two requests have the {ID} {value!r}.", where=requests.place(number))
        numbers[value_text(value)] = number
    number_of_line = {line: number for number, line in enumerate(lines)}
    # Labels are in the order in which they became known: those of the file first, then the late ones.
    labels: dict[int, str] = {}
    for line in range(len(_column(rows, ID))):
        _add_label(labels, rows, line, numbers, number_of_line.get(line))
    if late:
        late_rows = _read(late, [ID, LABEL])
        for line in range(len(_column(late_rows, ID))):
            _add_label(labels, late_rows, line, numbers, None)
    return Traffic(path.name, choose(requests, columns, {}), at - at[0], list(labels.items()))


def _read(path: Path, names: Sequence[str]) -> Rows:
    """Read some columns of a file. Raises `InputError` if it does not exist."""
    if not path.is_file():
        near = nearest_name(path.name, [file.name for file in path.absolute().parent.glob("*")])
        raise InputError(
            f"{path} does not exist.", expected="a file of requests", hint=f"did you mean {near!r}?" if near else None
        )
    return read_file(path, names)


def _column(rows: Rows, name: str) -> Sequence[Any]:
    """Return the value of each line in a column, or None for all if there is no such column."""
    return rows.columns.get(name, [None] * max((len(values) for values in rows.columns.values()), default=0))


def _seconds(rows: Rows, line: int) -> float:
    """Return the time of a request in seconds from any moment on. Raises `DataError`."""
    value = _column(rows, AT)[line]
    try:
        # Numbers are seconds. Anything else must be a date in ISO 8601.
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise DataError(
                f"A request has no time of arrival: {AT!r} is {value!r:.40}.",
                where=rows.place(line),
                expected="seconds from any moment on, or ISO 8601 such as 2026-11-28T12:00:00.250",
            ) from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise DataError(f"A request's time of arrival is {value!r}.", where=rows.place(line), expected="a finite time")
    return seconds


def _add_label(labels: dict[int, str], rows: Rows, line: int, numbers: dict[str, int], number: int | None) -> None:
    """Add the label of a line to ``labels`` if it has one. Raises `DataError` for a contradiction.

    Args:
        labels: Labels by the number of the request.
        rows: Lines.
        line: Index of the line.
        numbers: Numbers of requests by id.
        number: Number of the request, if the line is one.
    """
    label, key = (_column(rows, name)[line] for name in (LABEL, ID))
    if label is None or not value_text(label).strip():
        return
    # A line without inputs refers to its request by the id.
    if number is None:
        if key is None or value_text(key) not in numbers:
            near = nearest_name(value_text(key), list(numbers)) if key is not None else None
            raise DataError(
                f"A label is of no request: its {ID} is {key!r}.",
                where=rows.place(line),
                expected=f"the {ID} of a request",
                hint=f"did you mean {near!r}?" if near else None,
            )
        number = numbers[value_text(key)]
    # The same label may arrive twice.
    if labels.setdefault(number, value_text(label).strip()) != value_text(label).strip():
        raise DataError(f"Two labels of one request differ: {labels[number]} and {label}.", where=rows.place(line))
