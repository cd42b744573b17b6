"""Assignment of the rows of a split to slices."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from compress.data.columns import value_text
from compress.data.dataset import Dataset
from compress.data.slices import Slice, Unit
from compress.utils.errors import DataError

OTHER = "(other)"
NONE = "(none)"
_NAME_LENGTH = 60
Lengths = Callable[[Unit], np.ndarray]
"""Function that returns the length of each row in a unit, [n] int."""


@dataclass(frozen=True, eq=False)
class Part:
    """Slice with its rows: its name, a description, and a mask of its rows, [n] bool."""

    name: str
    about: str
    rows: np.ndarray


def find_parts(slices: Sequence[Slice], data: Dataset, split: str, lengths: Lengths) -> tuple[list[Part], list[str]]:
    """Return the non-empty parts of a split, and notes on the empty ones.

    Parts may overlap, and rows may belong to none. A missing or empty value belongs to `COLUMN=(none)` and satisfies no
    predicate.

    Args:
        slices: Slices of the recipe.
        data: The dataset.
        split: Name of the split.
        lengths: Returns the lengths of the rows in characters or tokens.

    Raises:
        DataError: If a value that is compared is not a number, or if two parts have the same name.
    """
    parts: list[Part] = []
    notes: list[str] = []
    for definition in slices:
        slice_parts = list(_parts(definition, data, split, lengths))
        parts += [part for part in slice_parts if part.rows.any()]
        notes += [
            f"The slice {part.name!r} holds no row of the {split} split, so nothing can be measured on it."
            for part in slice_parts
            if not part.rows.any()
        ]
        if not slice_parts:
            notes.append(
                f"No value of the column {definition.column!r} has {definition.min_rows} rows in the {split} split, "
                "so no slice is formed."
            )
    twice = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if twice:
        raise DataError(
            f"Two slices are called {twice[0]!r}.", where="slices", expected="names that differ", hint="rename one"
        )
    return parts, notes


def character_lengths(data: Dataset, split: str) -> np.ndarray:
    """Return the number of characters of each row's inputs, [n]. Raises `DataError` for a task without text."""
    table = data.split(split)
    inputs = [table[column.name].to_pylist() for column in data.columns if column.is_input and column.kind == "text"]
    if not inputs:
        raise DataError(
            "There is no text whose characters could be counted.",
            where="slices",
            expected="slices by column, or by `length` in `tokens`",
        )
    return np.array([sum(map(len, row)) for row in zip(*inputs, strict=True)])


def _parts(given: Slice, data: Dataset, split: str, lengths: Lengths) -> Iterator[Part]:
    if given.length is not None:
        yield from _by_length(given, lengths(given.unit))
        return
    assert given.column is not None, "a slice is by length or by column"
    extra = data.extra.get(split, {})
    if given.column in data.split(split).column_names:
        values: Sequence[Any] = data.split(split)[given.column].to_pylist()
    elif given.column in extra:
        values = extra[given.column]
    else:
        raise DataError(f"The split {split!r} has no column {given.column!r}, which a slice reads.", where="slices")
    if given.name is None:
        # Yield a part per frequent value, by decreasing number of rows, then the other values and the missing ones.
        missing = np.array([_is_missing(value) for value in values])
        texts = np.array(
            ["" if is_missing else value_text(value) for value, is_missing in zip(values, missing, strict=True)], object
        )
        counts = Counter(texts[~missing].tolist())
        frequent = sorted((-count, text) for text, count in counts.items() if count >= given.min_rows)
        chosen = [text for _, text in frequent[: given.max_values]]
        for text in chosen:
            shown, rows = _short(text), (texts == text) & ~missing
            yield Part(f"{given.column}={shown}", f"{given.column} is {shown}", rows)
        other = ~missing & ~np.isin(texts, chosen)
        if chosen and other.any():
            kinds = len(counts) - len(chosen)
            yield Part(f"{given.column}={OTHER}", f"{kinds} {'value' if kinds == 1 else 'values'} of few rows", other)
        if missing.any() and not missing.all():
            yield Part(f"{given.column}={NONE}", f"{given.column} is missing or empty", missing)
    else:
        holds = _predicate(given, split)
        rows = np.array([not _is_missing(value) and holds(index, value) for index, value in enumerate(values)])
        bounds = {name: getattr(given, name) for name in given.predicates()}
        shown = " and ".join(
            f"{name.replace('_', ' ')} {repr(value) if isinstance(value, str) else value_text(value)}"
            for name, value in bounds.items()
        )
        yield Part(given.name, f"{given.column} {shown}", rows)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def _short(text: str) -> str:
    """Return the text on one line. A long text is cut and ends with a digest, to distinguish equal beginnings."""
    flat = " ".join(text.split())
    if flat == text and len(text) <= _NAME_LENGTH:
        return text
    return f"{flat[: _NAME_LENGTH - 10]}\u2026{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _by_length(given: Slice, lengths: np.ndarray) -> Iterator[Part]:
    unit = given.unit
    if given.length == "quartiles":
        # Rows of one length stay together, so each quartile ends at a length that occurs.
        ends = np.quantile(lengths, (0.25, 0.5, 0.75), method="inverted_cdf")
        bins = np.searchsorted(ends, lengths, side="left")
        for index in range(4):
            rows = bins == index
            # With few distinct lengths some quartiles are empty, which nobody can correct.
            if rows.any():
                yield Part(f"{unit}=Q{index + 1}", _range(lengths[rows], unit), rows)
        return
    assert isinstance(given.length, tuple), "checked by the recipe"
    bins = np.searchsorted(given.length, lengths, side="right")
    edges = given.length
    between = (f"{unit}={low}-{high - 1}" for low, high in pairwise(edges))
    for index, name in enumerate([f"{unit}<{edges[0]}", *between, f"{unit}>={edges[-1]}"]):
        yield Part(name, _range(lengths[bins == index], unit), bins == index)


def _range(lengths: np.ndarray, unit: Unit) -> str:
    """Return the range of the lengths, such as `4 to 16 tokens`."""
    if not len(lengths):
        return ""
    low, high = lengths.min(), lengths.max()
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _predicate(given: Slice, split: str) -> Callable[[int, Any], bool]:
    if given.matches is not None:
        pattern = re.compile(given.matches)
        return lambda _, value: pattern.search(value_text(value)) is not None
    if given.contains is not None:
        substring = given.contains
        return lambda _, value: substring in value_text(value)
    if given.equals is not None:
        return lambda _, value: value_text(value).strip() == given.equals
    low = -math.inf if given.at_least is None else given.at_least
    high = math.inf if given.at_most is None else given.at_most
    return lambda index, value: low <= _number(given, index, value, split) <= high


def _number(given: Slice, index: int, value: Any, split: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"The slice {given.name!r} compares numbers, and the column {given.column!r} has {value!r:.60}.",
            where=f"split {split!r}, row {index + 1}",
            expected="a number, or nothing",
            hint="correct the row, or use `equals`, `contains` or `matches`",
        ) from None
