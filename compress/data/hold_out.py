"""Rows that are held out of training, so that choices can be made by them and the test split stays unread."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.config import HoldOut
from compress.data.rows import Key, keys, without
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Beside = Mapping[str, Mapping[str, Sequence[Any]]]
"""Split -> column -> a value for each row, of columns that the task doesn't read."""


def hold_out(
    config: HoldOut, tables: Mapping[str, pa.Table], beside: Beside, inputs: Sequence[str]
) -> tuple[dict[str, pa.Table], dict[str, Mapping[str, Sequence[Any]]]]:
    """The splits with one more, which has `rows` rows that another had; what is equal to them goes with them.

    Rows that stand in a further split too, such as validation, are no candidates. Drawn by the seed, and kept in the
    order of the file. Raises `DataError` where the split has too few.
    """
    source = tables.get(config.source)
    if source is None:
        raise DataError(
            f"No rows can be held out of {config.source!r}, which the recipe's data has not.",
            where="data.hold_out.from",
            expected=f"one of {', '.join(tables)}",
        )
    if config.split in tables:
        raise DataError(
            f"The recipe's data has a split {config.split!r} already.",
            where="data.hold_out.split",
            hint="give the rows that are held out another name",
        )
    own = keys(source, inputs)
    elsewhere = {key for split, table in tables.items() if split != config.source for key in keys(table, inputs)}
    chosen = _drawn(own, elsewhere, config)
    rest = without(source, chosen)
    if not len(rest):
        raise DataError(
            f"All {len(source):,} rows of {config.source!r} would be held out.",
            where="data.hold_out.rows",
            hint="hold out fewer rows, or give more to train on",
        )
    taken = np.zeros(len(source), dtype=bool)
    taken[chosen] = True
    values = beside.get(config.source, {})
    further = {
        config.source: {name: _at(column, np.flatnonzero(~taken)) for name, column in values.items()},
        config.split: {name: _at(column, np.flatnonzero(taken)) for name, column in values.items()},
    }
    held = source.take(np.flatnonzero(taken))
    return {**tables, config.source: rest, config.split: held}, {**beside, **further}


def _drawn(own: Sequence[Key], elsewhere: Collection[Key], config: HoldOut) -> list[int]:
    """Places of the rows that go, in order: rows of one key go together."""
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(own):
        places.setdefault(key, []).append(place)
    free = [key for key in places if key not in elsewhere]
    chosen: list[int] = []
    for index in np.random.default_rng(config.seed).permutation(len(free)):
        if len(chosen) >= config.rows:
            break
        chosen += places[free[index]]
    if len(chosen) < config.rows:
        raise DataError(
            f"{config.rows:,} rows are to be held out of {config.source!r}, which has {len(chosen):,} that stand in no "
            "other split.",
            where="data.hold_out.rows",
            hint="hold out fewer",
        )
    return sorted(chosen)


def _at(column: Sequence[Any], places: np.ndarray) -> list[Any]:
    return [column[int(place)] for place in places]
