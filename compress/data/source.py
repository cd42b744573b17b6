"""Find where a split or unlabeled inputs come from, and read it: a file, a folder, a sample, a dataset on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.arrays import Draws, array_files, draws, read_array_folder
from compress.data.config import FILE_SUFFIXES, DataConfig, is_file_name, is_sample, sample_split
from compress.data.files import Rows, read_class_folder, read_file
from compress.samples.sample import find_sample
from compress.utils.errors import DataError, MissingExtraError, nearest_name

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
OpenSample = Callable[[str], Path | None]
"""The folder of a sample by its name, or ``None`` where it is not fetched and must not be."""


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the Hugging Face Hub."""

    dataset: str
    split: str


Location = Path | HubSplit | Draws
"""A data file, a folder with a folder for each class or with files of arrays, a split on the Hub, or inputs to draw."""


def locate_split(config: DataConfig, split: str, folder: Path, open_sample: OpenSample) -> Location | None:
    """Where ``split`` is; relative paths count from the source, ``folder``, then the current directory.

    ``None``: in a sample that ``open_sample`` does not open. Raises `DataError`, `SampleError`.
    """
    name, source = config.splits[split], config.source
    if elsewhere := sample_split(name):
        source, name = elsewhere
    if source is None and (drawn := draws(name, split)):
        return drawn
    directory = find(source, folder) if source and not is_sample(source) else None
    if is_file_name(name):
        return _existing_file(name, [directory, folder] if directory else [folder], f"data.splits.{split}")
    if source is None:
        found = find(name, folder)
        if found is not None and found.is_dir():
            return found
        raise DataError(
            f"The split {split!r} names {name!r}, which is no data file, and there is no source.",
            where=f"data.splits.{split}",
            expected=f"a file ending in {', '.join(FILE_SUFFIXES)}, or a folder with one folder for each class",
            hint="name a file, or give `data.source`",
        )
    if is_sample(source):
        directory = _data_sample(source, open_sample)
        return _file_of(directory, name, split, source) if directory else None
    if directory is not None and directory.is_dir():
        return _file_of(directory, name, split, source)
    if directory is not None:
        raise DataError(
            f"The source {source!r} is a file.",
            where="data.source",
            expected="a folder, a sample or a dataset id",
            hint=f"name the file under `data.splits`, e.g. splits: {{train: {source}}}",
        )
    if not _HUB_ID.match(source) or Path(source).suffix in FILE_SUFFIXES:
        raise _not_found(source, [folder], "data.source")
    return HubSplit(source, name)


def locate_unlabeled(reference: str, folder: Path, open_sample: OpenSample) -> Path | None:
    """The file with unlabeled text that ``reference`` means. Raises `DataError`, `SampleError`."""
    if not is_sample(reference):
        return _existing_file(reference, [folder], "data.unlabeled")
    directory = _data_sample(reference, open_sample)
    path = directory / "unlabeled.parquet" if directory else None
    if path and not path.is_file():
        raise DataError(f"{reference} has no unlabeled text.", where="data.unlabeled", expected="e.g. sample:snippets")
    return path


def read(location: Location, wanted: Collection[str]) -> Rows:
    """The rows at ``location``. Raises `DataError`."""
    if isinstance(location, Draws):
        return location.rows()
    if isinstance(location, Path) and location.is_dir() and array_files(location):
        return read_array_folder(location)
    if isinstance(location, Path):
        return (read_class_folder if location.is_dir() else read_file)(location, wanted)
    return read_hub_split(location, wanted)


def read_columns(path: Path, names: Sequence[str], note: str = "") -> Rows:
    """The rows of a file that must have all of ``names``. Raises `DataError`."""
    rows = read_file(path, names)
    for name in names:
        if name not in rows.names:
            raise DataError(
                f"{rows.name} has no column {name!r}.",
                where=str(path),
                expected=f"the columns {', '.join(names)}{note}",
            )
    return rows


def find_file(reference: str, folder: Path, field: str, expected: str = "a file") -> Path:
    """As `find`. Raises `DataError` where there is no such file."""
    found = find(reference, folder)
    if found is None or not found.is_file():
        raise DataError(f"{reference} does not exist.", where=field, expected=f"{expected} in {folder.resolve()}")
    return found


def find(reference: str, folder: Path) -> Path | None:
    """``reference`` below ``folder``, or else below the current directory, if it exists."""
    for path in (folder / Path(reference).expanduser(), Path(reference).expanduser()):
        if path.exists():
            return path
    return None


def _existing_file(reference: str, folders: list[Path], field: str) -> Path:
    for path in (folder / Path(reference).expanduser() for folder in [*folders, Path()]):
        if path.is_file():
            if path.suffix not in FILE_SUFFIXES:
                raise DataError(
                    f"{reference} is no data file that can be read.",
                    where=field,
                    expected=f"a file ending in {', '.join(FILE_SUFFIXES)}",
                )
            return path
    raise _not_found(reference, folders, field)


def _not_found(reference: str, folders: list[Path], field: str) -> DataError:
    looked = dict.fromkeys([*(str(folder.resolve()) for folder in folders), str(Path.cwd())])
    parent = folders[0] / Path(reference).parent
    siblings = [path.name for path in sorted(parent.iterdir())] if parent.is_dir() else []
    nearest = nearest_name(Path(reference).name, siblings)
    return DataError(
        f"{reference} does not exist.",
        where=field,
        expected=f"a file or folder in {' or '.join(looked)}",
        hint=f"did you mean {nearest!r}?" if nearest else None,
    )


def _data_sample(reference: str, open_sample: OpenSample) -> Path | None:
    sample = find_sample(reference)
    if sample.kind != "data":
        raise DataError(f"{reference} is a {sample.kind}, not data.", hint="`compress samples` lists data samples")
    return open_sample(sample.name)


def _file_of(directory: Path, name: str, split: str, source: str) -> Path:
    """The one data file in ``directory`` that is called ``name``, or the folder of that name."""
    places = sorted(directory.iterdir())
    files = [path for path in places if path.suffix in FILE_SUFFIXES and path.is_file()]
    folders = [path for path in places if path.is_dir() and not path.name.startswith(".")]
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
    found = ", ".join([*(path.stem for path in files), *(path.name for path in folders)]) or "no data files"
    raise DataError(
        f"{source} has no split {name!r}.",
        where=f"data.splits.{split}",
        expected=f"one of its splits: {found}",
        hint="list under `data.splits` only splits that the source has",
    )


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
            hint="connect and try again, or name files that are on this machine",
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"The split {location.split!r} of the dataset {location.dataset!r} cannot be loaded: {error}",
            where="data.source",
        ) from error
