"""The rows of a model's use: those of today, and those that they are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.columns import Column, choose
from compress.data.config import DataConfig
from compress.data.dataset import TEST, load_dataset
from compress.data.rows import keys
from compress.data.samples.fetch import cached_directory
from compress.data.source import locate_split, read
from compress.recipe.recipe import Recipe
from compress.utils.errors import CompressError, DataError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

_MOSTLY = 0.5
_FEWEST = 20
"""Rows of either side below which no test tells anything."""


@dataclass(frozen=True)
class Sample:
    """Some of the ``total`` rows of one side, of the columns that a model is given. ``name`` is for people.

    ``taught`` says that most of them are rows that the model was trained on.
    """

    name: str
    table: pa.Table
    total: int
    taught: bool = False

    def __len__(self) -> int:
        return len(self.table)


def input_columns(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Those that a model is given."""
    return tuple(column for column in columns if column.is_input)


def read_sample(
    reference: str, recipe: Recipe, columns: tuple[Column, ...], folder: Path, most: int, progress: Progress
) -> Sample:
    """Up to ``most`` rows of a file, or of `sample:NAME/SPLIT`, drawn at random where there are more.

    The recipe says what the columns are called. Raises `DataError`, also for too few rows.
    """
    here = Path(reference).expanduser()
    named = str(here.resolve()) if here.exists() else reference
    return _sample(reference, {"use": named}, recipe, columns, folder, most, progress)


def recorded_sample(recipe: Recipe, columns: tuple[Column, ...], folder: Path, most: int, progress: Progress) -> Sample:
    """Rows of the recipe's own data that no stage has seen: its test split. Raises `DataError` where it is gone."""
    if TEST not in recipe.data.splits:
        raise DataError(
            "The recipe's data has no test split to compare with.",
            where="data.splits",
            hint="name rows that the model does well on with --reference",
        )
    name = f"the test rows of {recipe.name}"
    return _sample(name, {TEST: recipe.data.splits[TEST]}, recipe, columns, folder, most, progress)


def _sample(
    name: str,
    splits: Mapping[str, str],
    recipe: Recipe,
    columns: tuple[Column, ...],
    folder: Path,
    most: int,
    progress: Progress,
) -> Sample:
    wanted = input_columns(columns)
    known = {column.name for column in wanted}
    config = DataConfig(
        source=recipe.data.source,
        splits=dict(splits),
        columns={key: value for key, value in recipe.data.columns.items() if key in known},
    )
    table = load_dataset(config, wanted, folder, progress).split(next(iter(splits)))
    if len(table) < _FEWEST:
        raise DataError(
            f"There are {len(table)} rows to look at.", where=name, expected=f"{_FEWEST} at least, hundreds to be sure"
        )
    chosen = table
    if len(table) > most:
        chosen = table.take(np.sort(np.random.default_rng(recipe.seed).permutation(len(table))[:most]))
    return Sample(name, chosen, len(table), _is_taught(chosen, recipe, config, wanted, folder))


def _is_taught(table: pa.Table, recipe: Recipe, config: DataConfig, columns: tuple[Column, ...], folder: Path) -> bool:
    """Whether most of the rows stand in the recipe's train split, where that is at hand."""
    if "train" not in recipe.data.splits or TEST in config.splits:
        return False
    names = [column.name for column in columns]
    try:
        place = locate_split(recipe.data, "train", folder, cached_directory)
        if place is None or not isinstance(place, Path):
            return False
        rows = read(place, {config.columns.get(name, name) for name in names})
        taught = set(keys(choose(rows, columns, config.columns), names))
    except CompressError:
        # The data of a model in use needn't be where it was made; nothing is known then.
        return False
    return sum(key in taught for key in keys(table, names)) > _MOSTLY * len(table)
