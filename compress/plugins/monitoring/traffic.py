"""Recorded requests: what was asked when, and labels that arrived then or later."""

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
    """Requests in the order of their times: inputs, and ``at`` in seconds from the first, [n].

    ``labels`` are the numbers of requests with what was right, in the order in which that was known.
    """

    name: str
    table: pa.Table
    at: np.ndarray
    labels: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.table)


def read_traffic(path: Path, columns: Sequence[Column], late: Path | None = None) -> Traffic:
    """A file with a line for each request: the task's inputs, `at` (seconds, or ISO 8601), perhaps `id` and `label`.

    Lines with `id` and `label` alone are labels that came later, in that file or in ``late``. Raises `DataError` for
    what can't be replayed, an id that nobody asked under or that stands twice, and labels that contradict each other.
    """
    wanted = [column.name for column in columns]
    rows = _read(path, [ID, AT, LABEL, *wanted])
    whole = [place for place, values in enumerate(_lines(rows, wanted)) if any(value is not None for value in values)]
    if not whole:
        raise DataError(f"{path.name} has no request.", where=str(path), expected=f"lines with {', '.join(wanted)}")
    times = [_seconds(rows, place) for place in whole]
    order = sorted(range(len(whole)), key=lambda each: times[each])
    asked = [whole[each] for each in order]
    chosen = Rows(
        rows.name,
        rows.names,
        {name: [rows.columns[name][place] for place in asked] for name in rows.columns},
        [rows.lines[place] for place in asked] if rows.lines else None,
        rows.folder,
    )
    at = np.array([times[each] for each in order])
    numbers = _numbers(chosen)
    at_hand = {place: number for number, place in enumerate(asked)}
    known: dict[int, str] = {}
    for each, from_file in [(rows, True), *([(_read(late, [ID, LABEL]), False)] if late else [])]:
        for place in range(_count(each)):
            number = at_hand.get(place) if from_file else None
            _learn(known, each, place, numbers, number)
    return Traffic(path.name, choose(chosen, columns, {}), at - at[0], list(known.items()))


def _read(path: Path, names: Sequence[str]) -> Rows:
    if not path.is_file():
        near = nearest_name(path.name, [each.name for each in path.absolute().parent.glob("*")])
        raise InputError(
            f"{path} does not exist.", expected="a file of requests", hint=f"did you mean {near!r}?" if near else None
        )
    return read_file(path, names)


def _count(rows: Rows) -> int:
    return max((len(values) for values in rows.columns.values()), default=0)


def _lines(rows: Rows, names: Sequence[str]) -> list[tuple[Any, ...]]:
    given = [rows.columns.get(name, [None] * _count(rows)) for name in names]
    return list(zip(*given, strict=True))


def _seconds(rows: Rows, place: int) -> float:
    """When a request came, from 1970 or any other moment on."""
    value = rows.columns.get(AT, [None] * _count(rows))[place]
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise DataError(
                f"A request has no time of arrival: {AT!r} is {value!r:.40}.",
                where=rows.place(place),
                expected="seconds from any moment on, or ISO 8601 such as 2026-11-28T12:00:00.250",
            ) from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise DataError(f"A request's time of arrival is {value!r}.", where=rows.place(place), expected="a finite time")
    return seconds


def _numbers(requests: Rows) -> dict[str, int]:
    """Id -> number of the request. Raises `DataError` for an id that stands twice."""
    found: dict[str, int] = {}
    for number, value in enumerate(requests.columns.get(ID, [])):
        if value is None:
            continue
        if value_text(value) in found:
            raise DataError(f"Two requests have the {ID} {value!r}.", where=requests.place(number))
        found[value_text(value)] = number
    return found


def _learn(known: dict[int, str], rows: Rows, place: int, numbers: dict[str, int], number: int | None) -> None:
    """Add the label of a line to what is ``known``, if it has one."""
    label, key = (rows.columns.get(name, [None] * _count(rows))[place] for name in (LABEL, ID))
    if label is None or not value_text(label).strip():
        return
    if number is None:
        if key is None or value_text(key) not in numbers:
            near = nearest_name(value_text(key), list(numbers)) if key is not None else None
            raise DataError(
                f"A label is of no request: its {ID} is {key!r}.",
                where=rows.place(place),
                expected=f"the {ID} of a request",
                hint=f"did you mean {near!r}?" if near else None,
            )
        number = numbers[value_text(key)]
    if known.setdefault(number, value_text(label).strip()) != value_text(label).strip():
        raise DataError(f"Two labels of one request differ: {known[number]} and {label}.", where=rows.place(place))
