"""Find the splits of data that a user names: a file, a sample, or a folder of splits or classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from compress.data.config import is_file_name, is_sample
from compress.data.samples.fetch import cached_directory
from compress.data.samples.sample import find_sample
from compress.utils.errors import DataError
from compress.utils.paths import exists, expanded

SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Split -> usual names of its file or folder."""


@dataclass(frozen=True)
class Layout:
    """Files or folders with the rows of each split.

    Attributes:
        source: Source of a recipe's `data` section; empty for the task's own data.
        example: A file or class folder with the columns; None for a sample that is not on this machine.
        splits: Name of each split in the source, if these are not the usual ones.
    """

    source: str = ""
    example: Path | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, object]:
        """Return the fields of the `data` section."""
        return {name: value for name, value in (("source", self.source), ("splits", dict(self.splits))) if value}


def find_layout(reference: str, recipe_folder: Path) -> Layout:
    """Return the layout of data, with paths relative to the folder of the recipe that will name them.

    Raises:
        DataError: If nothing of that name exists, or a folder has no splits and no class folders.
        SampleError: If there is no such sample.
    """
    if is_sample(reference):
        folder = cached_directory(find_sample(reference).name)
        if folder is None:
            return Layout(reference)
        layout = _folder_layout(folder, reference)
        # The splits of a sample have names and not files.
        splits = {split: Path(file).stem for split, file in layout.splits.items()}
        return replace(layout, splits={} if len(splits) == len(SPLIT_NAMES) else splits)
    path = expanded(reference)
    if not exists(path):
        raise DataError(
            f"There is no file or folder {reference!r}.",
            where="--data",
            expected="a data file, a folder, or sample:NAME",
            hint="fetch a dataset of the Hugging Face Hub with `hf download --repo-type dataset`, and name its folder",
        )
    source = relative_to_recipe(path, recipe_folder)
    return Layout(source, path) if path.is_file() else _folder_layout(path, source)


def relative_to_recipe(path: Path, recipe_folder: Path) -> str:
    """Return an absolute path as it is, and a relative one from the folder of the recipe."""
    return str(path) if path.is_absolute() else os.path.relpath(path, recipe_folder)


def _folder_layout(folder: Path, source: str) -> Layout:
    """Return the layout of a folder with an entry for each split, a single data file, or class folders."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [path for path in entries if path.is_file() and is_file_name(path.name)]
    folders = [path for path in entries if path.is_dir()]
    # A text file beside tables or folders is rather a note than rows.
    files = [path for path in files if path.suffix.lower() != ".txt"] or ([] if folders else files)
    splits = {
        split: next((path for path in (*files, *folders) if path.stem.lower() in names), None)
        for split, names in SPLIT_NAMES.items()
    }
    found = {split: path.name for split, path in splits.items() if path is not None}
    if splits["train"] is not None and splits["test"] is not None:
        return Layout(source, splits["train"], found)
    if found:
        missing = "test" if splits["train"] is not None else "train"
        raise DataError(
            f"{folder} has {' and '.join(found.values())}, and nothing for {missing}.",
            where="--data",
            expected="a file or folder for each of train, test and, if you have it, validation",
            hint=f"add {missing}, or join the rows in one file, which is split automatically",
        )
    if len(files) == 1:
        return Layout(f"{source}/{files[0].name}", files[0])
    if not files and folders:
        return Layout(source, folder)
    names = ", ".join(path.name for path in files[:5])
    raise DataError(
        f"{folder} has {f'several data files: {names}' if files else 'no data file and no folder'}.",
        where="--data",
        expected="one data file, files or folders named train, validation and test, or one folder for each class",
    )
