"""Recent rows of a model's use, and the rows that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.columns import Column, choose
from compress.data.config import DataConfig
from compress.data.dataset import TEST, load_dataset
from compress.data.row_keys import keys, members
from compress.data.samples.fetch import cached_directory
from compress.data.source import Undivided, locate_split, read
from compress.recipe.recipe import Recipe
from compress.utils.errors import CompressError, DataError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RowSample:
    """Some of the ``total`` rows of one side, with the columns of the model's input.

    ``is_training_data`` states that most of them are training rows.
    """

    name: str
    table: pa.Table
    total: int
    is_training_data: bool = False

    def __len__(self) -> int:
        return len(self.table)


def input_columns(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Return the columns that a model receives."""
    return tuple(column for column in columns if column.is_input)


def read_sample(
    reference: str | None, recipe: Recipe, columns: tuple[Column, ...], folder: Path, most: int, progress: Progress
) -> RowSample:
    """Read up to ``most`` rows of a file or of `sample:NAME/SPLIT`, at random if there are more.

    Args:
        reference: File or sample, or None for the recipe's test rows, which no stage has used.
        recipe: Recipe, which names the columns.
        columns: Columns of the task.
        folder: Folder that relative paths of the recipe count from.
        most: Maximum number of rows.
        progress: Shows the reading.

    Raises:
        DataError: The rows cannot be read, or there are too few.
    """
    if reference is not None:
        # A relative path counts from the current folder, and not from that of the recipe.
        path = Path(reference).expanduser()
        name, split, source = reference, "use", str(path.resolve()) if path.exists() else reference
    elif TEST in recipe.data.splits:
        name, split, source = f"the test rows of {recipe.name}", TEST, recipe.data.splits[TEST]
    else:
        raise DataError(
            "The recipe's data has no test split to compare with.",
            where="data.splits",
            hint="name rows that the model does well on with --reference",
        )
    inputs = input_columns(columns)
    names = {column.name for column in inputs}
    own_names = {key: value for key, value in recipe.data.columns.items() if key in names}
    config = DataConfig(source=recipe.data.source, splits={split: source}, columns=own_names)
    table = load_dataset(config, inputs, folder, progress).split(split)
    total = len(table)
    if total < 20:
        # No test is meaningful below it.
        raise DataError(f"There are {total} rows to look at.", where=name, expected="20 at least, hundreds to be sure")
    if total > most:
        table = table.take(np.sort(np.random.default_rng(recipe.seed).permutation(total)[:most]))
    trained = reference is not None and _mostly_training_rows(table, recipe, config, inputs, folder)
    return RowSample(name, table, total, trained)


def _mostly_training_rows(
    table: pa.Table, recipe: Recipe, config: DataConfig, columns: tuple[Column, ...], folder: Path
) -> bool:
    """Return True if most rows occur in the recipe's training split, as far as that is available.

    Args:
        table: Rows.
        recipe: The recipe.
        config: Configuration of the rows' data.
        columns: Columns of the model's input.
        folder: Folder that relative paths count from.
    """
    if "train" not in recipe.data.splits:
        return False
    names = [column.name for column in columns]
    try:
        split_path = locate_split(recipe.data, "train", folder, cached_directory)
        if split_path is None or not isinstance(split_path, Path | Undivided):
            return False
        rows = read(split_path, {config.columns.get(name, name) for name in names})
        # Rows are identified by the contents of the input columns.
        training_keys = keys(choose(rows, columns, config.columns), names)
    except CompressError:
        # The training data may be absent where the model is in use. Then the origin of the rows is unknown.
        return False
    return len(members(keys(table, names), [training_keys])) > len(table) / 2
