"""The held-out check: no row of another split, and no unlabeled text, may stand in the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.data.text_identity import normalised
from compress.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Key = tuple[str, ...]
_SHOWN = 3


def keys(table: pa.Table, columns: Sequence[str]) -> list[Key]:
    """What each row is to a model: its inputs, whatever their case and spacing; labels don't count."""
    values = [[normalised(text) for text in table[name].to_pylist()] for name in columns]
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
    first = table.column_names[0]
    shown = [f"{place(index)}: {table[first][index].as_py():.60}" for index in rows[:_SHOWN]]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return DataError(
        f"{len(rows)} of {len(table)} rows of the split {split!r} also stand in the test split, "
        "so the test would not be held out.",
        where="; ".join(shown) + more,
        expected="texts of the test split in no other split, whatever their case and spacing",
        mend=f"`data.drop_overlap: true` leaves them out of {split}",
    )
