"""Read a split of a dataset on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from compress.data.files import Rows
from compress.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the Hugging Face Hub."""

    dataset: str
    split: str


def read_hub_split(location: HubSplit, wanted: Collection[str]) -> Rows:
    """The columns ``wanted`` of a split, as far as it has them. Raises `DataError`."""
    return rows_of(_load(location), f"{location.dataset} ({location.split})", wanted)


def rows_of(dataset: Any, name: str, wanted: Collection[str]) -> Rows:
    """The rows of a `datasets.Dataset`, with class ids as class names. Raises `DataError`."""
    columns = {}
    chosen = [column for column in dataset.column_names if column in wanted]
    table = dataset.select_columns(chosen).with_format("arrow")[:]
    for column in chosen:
        values = table[column].to_pylist()
        class_names = getattr(dataset.features[column], "names", None)
        if class_names:  # -1 marks rows without a label, as in the test sets of GLUE
            values = [None if value is None or value < 0 else class_names[value] for value in values]
        columns[column] = values
    if not len(dataset):
        raise DataError(f"{name} has no rows.", expected="at least one row")
    return Rows(name, tuple(dataset.column_names), columns)


def _load(location: HubSplit) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise MissingExtraError("datasets", "hub", "A dataset of the Hugging Face Hub") from error

    try:
        return datasets.load_dataset(location.dataset, split=location.split)
    except ConnectionError as error:
        raise DataError(
            f"The dataset {location.dataset!r} cannot be fetched: {error}.",
            where="data.source",
            expected="a folder, a sample, or a dataset on the Hugging Face Hub and a network that reaches it",
            mend="connect and try again, or name files that are on this machine",
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"The split {location.split!r} of the dataset {location.dataset!r} cannot be loaded: {error}",
            where="data.source",
        ) from error
