"""Identity of rows by their model inputs, to find the same example in two splits."""

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
    """Return the identity of each row: normalized texts and content digests of files. Labels do not count."""
    values = [[normalised(value) for value in identities(table[name])] for name in columns]
    return list(zip(*values, strict=True))


def overlapping(table: pa.Table, columns: Sequence[str], held_out: set[Key]) -> list[int]:
    """Return the indices of the rows whose inputs occur in ``held_out``."""
    return [index for index, key in enumerate(keys(table, columns)) if key in held_out]


def without(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Return the table without the given rows."""
    import numpy as np

    mask = np.ones(len(table), dtype=bool)
    mask[list(rows)] = False
    return table.take(np.flatnonzero(mask))


def overlap_error(split: str, table: pa.Table, rows: Sequence[int], place: Callable[[int], str]) -> DataError:
    """Return the error for rows of a split that also occur in the test split.

    Args:
        split: Name of the split.
        table: Its rows.
        rows: Indices of the overlapping rows.
        place: Returns the position of a row, for the message.
    """
    values = shown(table[table.column_names[0]].take(rows[:_SHOWN]))
    examples = [f"{place(index)}: {value:.60}" for index, value in zip(rows[:_SHOWN], values, strict=True)]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return DataError(
        f"{len(rows)} of {len(table)} rows of the split {split!r} also stand in the test split, "
        "so the test would not be held out.",
        where="; ".join(examples) + more,
        expected="texts of the test split in no other split, whatever their case and spacing",
        hint=f"`data.drop_overlap: true` leaves them out of {split}",
    )


def normalised(text: str) -> str:
    """Return the text casefolded, with each run of white space as one space."""
    return " ".join(text.casefold().split())
