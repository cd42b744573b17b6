"""Locate and read a split or unlabeled inputs: a file, a folder, a sample, or a dataset on the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.config import (
    FILE_SUFFIXES,
    SPLITS,
    TABLE_SUFFIXES,
    DataConfig,
    is_file_name,
    is_sample,
    sample_split,
)
from compress.data.files import Rows, media_kind, read_class_folder, read_file, unsupported
from compress.data.samples.sample import find_sample
from compress.utils.errors import DataError, MissingExtraError, nearest_name
from compress.utils.isolation import network_hint
from compress.utils.paths import exists, expanded, is_file

if TYPE_CHECKING:
    from datasets import Dataset


INPUTS = "inputs"
"""Name of the column."""
SUFFIXES = (".npz", ".npy")
_DRAWN = re.compile(r"^random(?::(\d{1,6}))?$")
_COUNT = 64
_KEY = "drawn"


@dataclass(frozen=True)
class Draws:
    """Number of random inputs of a split. Each split has its own seeds."""

    split: str
    count: int


def draws(name: str, split: str) -> Draws | None:
    """Return the random inputs that `random` or `random:COUNT` requests, or ``None`` for any other name."""
    match = _DRAWN.match(name)
    return None if match is None else Draws(split, int(match[1] or _COUNT))


def seed_of(content: bytes) -> int | None:
    """Return the seed of a random input, or ``None`` for the content of a file."""
    if not content.startswith(b'{"' + _KEY.encode()):
        return None
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def array_files(folder: Path) -> list[Path]:
    """Return the array files directly in ``folder``, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
OpenSample = Callable[[str], Path | None]
"""Function that returns the folder of a sample, or ``None`` if it is not cached and must not be fetched."""


@dataclass(frozen=True)
class HubSplit:
    """Split of a dataset on the Hugging Face Hub."""

    dataset: str
    split: str


@dataclass(frozen=True)
class Undivided:
    """File, or folder with one folder per class, whose rows are split automatically."""

    path: Path


Location = Path | HubSplit | Draws | Undivided
"""Data file, folder (one folder per class, or array files), split on the Hub, inputs to generate at random, or a file
or folder with the rows of all splits."""


def locate_split(config: DataConfig, split: str, folder: Path, open_sample: OpenSample) -> Location | None:
    """Return the location of a split.

    Args:
        config: The recipe's `data` section.
        split: Name of the split in the recipe.
        folder: Folder that relative paths are resolved against, after the source and before the current directory.
        open_sample: Opens a sample by name.

    Returns:
        The location, or ``None`` for a sample that ``open_sample`` does not open.

    Raises:
        DataError: If nothing of that name exists.
        SampleError: If there is no such sample.
    """
    name, source = config.splits[split], config.source
    if other_sample := sample_split(name):
        source, name = other_sample
    if source is None and (random_inputs := draws(name, split)):
        return random_inputs
    directory = find(source, folder) if source and not is_sample(source) else None
    if is_file_name(name):
        return _existing_file(name, [directory, folder] if directory else [folder], f"data.splits.{split}")
    if source is None:
        class_folder = find(name, folder)
        if class_folder is not None and class_folder.is_dir():
            return class_folder
        raise DataError(
            f"The split {split!r} names {name!r}, which is no data file, and there is no source.",
            where=f"data.splits.{split}",
            expected=f"a file ending in {', '.join(FILE_SUFFIXES)}, or a folder with one folder for each class",
            hint="name a file, or give `data.source`",
        )
    if is_sample(source):
        directory = _data_sample(source, open_sample)
        return _file_of(directory, name, split, source) if directory else None
    if directory is not None:
        return _local_split(config, split, directory)
    if not _HUB_ID.match(source) or Path(source).suffix in FILE_SUFFIXES:
        raise _not_found(source, [folder], "data.source")
    return HubSplit(source, name)


def _local_split(config: DataConfig, split: str, source: Path) -> Location:
    """Return the location of a split in a local source. Raises `DataError`."""
    if source.is_dir() and not _has_classes(source, config.splits.values()):
        return _file_of(source, config.splits[split], split, str(config.source))
    if split not in SPLITS:
        raise DataError(
            f"{source.name} has no split {split!r}: its rows are split automatically.",
            where=f"data.splits.{split}",
            expected=f"one of {', '.join(SPLITS)}, or a file with the rows of {split}",
        )
    return Undivided(source)


def _has_classes(folder: Path, splits: Collection[str]) -> bool:
    """Return whether a folder has one folder per class, and neither data files nor one of the ``splits``."""
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.stem in splits or path.suffix.lower() in TABLE_SUFFIXES for path in entries):
        return False
    return any(media_kind(file) for path in entries if path.is_dir() for file in path.iterdir())


def locate_unlabeled(reference: str, folder: Path, open_sample: OpenSample) -> Path | None:
    """Return the file of unlabeled inputs that ``reference`` names. Raises `DataError`, `SampleError`."""
    if not is_sample(reference):
        return _existing_file(reference, [folder], "data.unlabeled")
    directory = _data_sample(reference, open_sample)
    path = directory / "unlabeled.parquet" if directory else None
    if path and not path.is_file():
        raise DataError(f"{reference} has no unlabeled text.", where="data.unlabeled", expected="e.g. sample:snippets")
    return path


def read(location: Location, wanted: Collection[str]) -> Rows:
    """Return the rows at a location, those of all splits if it is undivided. Raises `DataError`."""
    if isinstance(location, Undivided):
        location = location.path
    if isinstance(location, HubSplit):
        return read_hub_split(location, wanted)
    if isinstance(location, Draws):
        # A value identifies the seed of a random input.
        values = [json.dumps({_KEY: [location.split, index]}).encode() for index in range(location.count)]
        return Rows(f"random inputs of {location.split}", (INPUTS,), {INPUTS: values})
    if location.is_dir() and (files := array_files(location)):
        return Rows(location.name, (INPUTS,), {INPUTS: [str(path.absolute()) for path in files]})
    return (read_class_folder if location.is_dir() else read_file)(location, wanted)


def read_columns(path: Path, names: Sequence[str], note: str = "") -> Rows:
    """Return the rows of a file that must have all columns ``names``. Raises `DataError`."""
    rows = read_file(path, names)
    for name in names:
        if name not in rows.names:
            expected = f"the columns {', '.join(names)}{note}"
            raise DataError(f"{rows.name} has no column {name!r}.", where=str(path), expected=expected)
    return rows


def find_file(reference: str, folder: Path, field: str, expected: str = "a file") -> Path:
    """Return an existing file. Raises `DataError` if there is none.

    Args:
        reference: Path as the recipe gives it.
        folder: Folder that relative paths are resolved against, before the current directory.
        field: Recipe field, for the message.
        expected: Description of valid values, for the message.
    """
    path = find(reference, folder)
    if path is None or not path.is_file():
        raise DataError(f"{reference} does not exist.", where=field, expected=f"{expected} in {folder.resolve()}")
    return path


def find(reference: str, folder: Path) -> Path | None:
    """Return ``reference`` below ``folder`` or below the current directory, or ``None`` if neither exists."""
    for path in (folder / expanded(reference), expanded(reference)):
        if exists(path):
            return path
    return None


def _existing_file(reference: str, folders: list[Path], field: str) -> Path:
    paths = (folder / expanded(reference) for folder in [*folders, Path()])
    path = next((path for path in paths if is_file(path)), None)
    if path is None:
        raise _not_found(reference, folders, field)
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise unsupported(path, field)
    return path


def _not_found(reference: str, folders: list[Path], field: str) -> DataError:
    searched_folders = dict.fromkeys([*(str(folder.resolve()) for folder in folders), str(Path.cwd())])
    parent = folders[0] / Path(reference).parent
    siblings = [path.name for path in sorted(parent.iterdir())] if parent.is_dir() else []
    nearest = nearest_name(Path(reference).name, siblings)
    return DataError(
        f"{reference} does not exist.",
        where=field,
        expected=f"a file or folder in {' or '.join(searched_folders)}",
        hint=f"did you mean {nearest!r}?" if nearest else None,
    )


def _data_sample(reference: str, open_sample: OpenSample) -> Path | None:
    sample = find_sample(reference)
    if sample.kind != "data":
        raise DataError(f"{reference} is a {sample.kind}, not data.", hint="`compress samples` lists data samples")
    return open_sample(sample.name)


def _file_of(directory: Path, name: str, split: str, source: str) -> Path:
    """Return the one data file of ``directory`` with the stem ``name``, or the folder of that name."""
    entries = sorted(directory.iterdir())
    files = [path for path in entries if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    # A text file beside tables or class folders is more often a list of their files than a split.
    texts = [] if files or folders else [path for path in entries if path.suffix.lower() == ".txt"]
    files += texts
    matching = [path for path in files if path.stem == name] or [path for path in folders if path.name == name]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(path.name for path in matching)
        raise DataError(
            f"{source} has more than one file for the split {split!r}: {names}.",
            where=f"data.splits.{split}",
            hint=f"name one of them, e.g. splits: {{{split}: {matching[0].name}}}",
        )
    available = ", ".join([*(path.stem for path in files), *(path.name for path in folders)]) or "no data files"
    raise DataError(
        f"{source} has no split {name!r}.",
        where=f"data.splits.{split}",
        expected=f"one of its splits: {available}",
        hint="list under `data.splits` only splits that the source has",
    )


def read_hub_split(location: HubSplit, wanted: Collection[str]) -> Rows:
    """Return those of the columns ``wanted`` that a split on the Hub has. Raises `DataError`."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise MissingExtraError("datasets", "hub", "A dataset of the Hugging Face Hub") from error

    try:
        dataset = datasets.load_dataset(location.dataset, split=location.split)
    except ConnectionError as error:
        raise DataError(
            f"The dataset {location.dataset!r} cannot be fetched: {error}.",
            where="data.source",
            expected="a folder, a sample, or a dataset on the Hugging Face Hub and a network that reaches it",
            hint=network_hint() or "connect and try again, or name files that are on this machine",
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"The split {location.split!r} of the dataset {location.dataset!r} cannot be loaded: {error}",
            where="data.source",
            hint=network_hint(),
        ) from error
    return rows_of(dataset, f"{location.dataset} ({location.split})", wanted)


def rows_of(dataset: Dataset, name: str, wanted: Collection[str]) -> Rows:
    """Return the rows of a `datasets.Dataset`, with class names in place of class ids. Raises `DataError`."""
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
