"""Find where a split or unlabeled inputs come from: a file, a folder, a sample or a dataset on the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path

from compress.data.class_folder import read_class_folder
from compress.data.config import FILE_SUFFIXES, DataConfig, is_file_name, is_sample, sample_split
from compress.data.files import Rows, read_file
from compress.data.hub import HubSplit as HubSplit
from compress.data.hub import read_hub_split
from compress.errors import DataError
from compress.samples.sample import find_sample

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
OpenSample = Callable[[str], Path | None]
"""The folder of a sample by its name, or ``None`` where it is not fetched and must not be."""


Location = Path | HubSplit
"""A data file, a folder with a folder for each class, or a split on the Hub."""


def locate_split(config: DataConfig, split: str, folder: Path, open_sample: OpenSample) -> Location | None:
    """Where ``split`` is; relative paths count from the source, ``folder``, then the current directory.

    ``None``: in a sample that ``open_sample`` does not open. Raises `DataError`, `SampleError`.
    """
    name, source = config.splits[split], config.source
    if elsewhere := sample_split(name):
        source, name = elsewhere
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
            mend="name a file, or give `data.source`",
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
            mend=f"name the file under `data.splits`, e.g. splits: {{train: {source}}}",
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
    if isinstance(location, Path):
        return (read_class_folder if location.is_dir() else read_file)(location, wanted)
    return read_hub_split(location, wanted)


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
    nearest = get_close_matches(Path(reference).name, siblings, n=1)
    return DataError(
        f"{reference} does not exist.",
        where=field,
        expected=f"a file or folder in {' or '.join(looked)}",
        mend=f"did you mean {nearest[0]!r}?" if nearest else None,
    )


def _data_sample(reference: str, open_sample: OpenSample) -> Path | None:
    sample = find_sample(reference)
    if sample.kind != "data":
        raise DataError(f"{reference} is a {sample.kind}, not data.", mend="`compress samples` lists data samples")
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
            mend=f"name one of them, e.g. splits: {{{split}: {matching[0].name}}}",
        )
    found = ", ".join([*(path.stem for path in files), *(path.name for path in folders)]) or "no data files"
    raise DataError(
        f"{source} has no split {name!r}.",
        where=f"data.splits.{split}",
        expected=f"one of its splits: {found}",
        mend="list under `data.splits` only splits that the source has",
    )
