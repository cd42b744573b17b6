"""Rows by what they are to a model, so that the same ones are found in two splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.data.media import identities, shown
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Key = tuple[str, ...]
_SHOWN = 3


def keys(table: pa.Table, columns: Sequence[str]) -> list[Key]:
    """What each row is to a model: texts, whatever their case and spacing, and files' contents; labels don't count."""
    values = [[normalised(value) for value in identities(table[name])] for name in columns]
    return list(zip(*values, strict=True))


def overlapping(table: pa.Table, columns: Sequence[str], held_out: set[Key]) -> list[int]:
    """Rows of ``table`` whose inputs stand in ``held_out``."""
    return [index for index, key in enumerate(keys(table, columns)) if key in held_out]


def without(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """``table`` less ``rows``."""
    import numpy as np

    kept = np.ones(len(table), dtype=bool)
    kept[list(rows)] = False
    return table.take(np.flatnonzero(kept))


def overlap_error(split: str, table: pa.Table, rows: Sequence[int], place: Callable[[int], str]) -> DataError:
    """The error for ``rows`` of ``split`` that also stand in the test split."""
    values = shown(table[table.column_names[0]].take(rows[:_SHOWN]))
    found = [f"{place(index)}: {value:.60}" for index, value in zip(rows[:_SHOWN], values, strict=True)]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return DataError(
        f"{len(rows)} of {len(table)} rows of the split {split!r} also stand in the test split, "
        "so the test would not be held out.",
        where="; ".join(found) + more,
        expected="texts of the test split in no other split, whatever their case and spacing",
        hint=f"`data.drop_overlap: true` leaves them out of {split}",
    )


def normalised(text: str) -> str:
    """``text`` casefolded, with every run of white space as one space."""
    return " ".join(text.casefold().split())
