"""Split off rows for model selection, so that the test split stays unread."""

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
"""Split -> column -> one value per row, for columns that the task does not read."""


def hold_out(
    config: HoldOut, tables: Mapping[str, pa.Table], beside: Beside, inputs: Sequence[str]
) -> tuple[dict[str, pa.Table], dict[str, Mapping[str, Sequence[Any]]]]:
    """Move rows of one split into a new split. Equal rows move together.

    Rows that also occur in another split, such as validation, are not candidates. Rows are sampled with the seed and
    keep the order of the file.

    Args:
        config: Number of rows, source split, name of the new split, and seed.
        tables: Split -> rows.
        beside: Values of the extra columns.
        inputs: Names of the input columns, by which rows are compared.

    Returns:
        The splits and the extra values, both with the new split.

    Raises:
        DataError: If the source split does not exist or has too few rows.
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
    source_keys = keys(source, inputs)
    other_keys = {key for split, table in tables.items() if split != config.source for key in keys(table, inputs)}
    chosen = _drawn(source_keys, other_keys, config)
    remaining = without(source, chosen)
    if not len(remaining):
        raise DataError(
            f"All {len(source):,} rows of {config.source!r} would be held out.",
            where="data.hold_out.rows",
            hint="hold out fewer rows, or give more to train on",
        )
    held_mask = np.zeros(len(source), dtype=bool)
    held_mask[chosen] = True
    values = beside.get(config.source, {})
    updated_extra = {
        config.source: {name: _at(column, np.flatnonzero(~held_mask)) for name, column in values.items()},
        config.split: {name: _at(column, np.flatnonzero(held_mask)) for name, column in values.items()},
    }
    held_rows = source.take(np.flatnonzero(held_mask))
    return {**tables, config.source: remaining, config.split: held_rows}, {**beside, **updated_extra}


def _drawn(source_keys: Sequence[Key], other_keys: Collection[Key], config: HoldOut) -> list[int]:
    """Return the sorted indices of the rows to hold out; rows with one key go together."""
    rows_by_key: dict[Key, list[int]] = {}
    for row, key in enumerate(source_keys):
        rows_by_key.setdefault(key, []).append(row)
    candidates = [key for key in rows_by_key if key not in other_keys]
    chosen: list[int] = []
    for index in np.random.default_rng(config.seed).permutation(len(candidates)):
        if len(chosen) >= config.rows:
            break
        chosen += rows_by_key[candidates[index]]
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
