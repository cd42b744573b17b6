"""Find the splits of data that a user names: a file, a sample, or a folder of splits or classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.data.config import is_file_name, is_sample
from compress.data.samples.fetch import cached_directory
from compress.data.samples.sample import find_sample
from compress.utils.errors import DataError

SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Split -> usual names of its file or folder."""


@dataclass(frozen=True)
class Layout:
    """Where the rows of each split are.

    Attributes:
        fields: `source` and `splits` of a recipe's `data` section.
        example: A file or class folder with the columns; None for a sample that is not on this machine.
    """

    fields: Mapping[str, object]
    example: Path | None


def find_layout(reference: str, recipe_folder: Path) -> Layout:
    """Return the layout of data, with paths relative to the folder of the recipe that will name them.

    Raises:
        DataError: If nothing of that name exists, or a folder has no splits and no class folders.
        SampleError: If there is no such sample.
    """
    if is_sample(reference):
        folder = cached_directory(find_sample(reference).name)
        layout = None if folder is None else _folder_layout(folder, reference)
        return layout or Layout({"source": reference}, None)
    path = Path(reference).expanduser()
    if not path.exists():
        raise DataError(
            f"There is no file or folder {reference!r}.",
            where="--data",
            expected="a data file, a folder, or sample:NAME",
            hint="fetch a dataset of the Hugging Face Hub with `hf download --repo-type dataset`, and name its folder",
        )
    source = relative_to_recipe(path, recipe_folder)
    return Layout({"source": source}, path) if path.is_file() else _folder_layout(path, source)


def relative_to_recipe(path: Path, recipe_folder: Path) -> str:
    """Return an absolute path as it is, and a relative one from the folder of the recipe."""
    return str(path) if path.is_absolute() else os.path.relpath(path, recipe_folder)


def _folder_layout(folder: Path, source: str) -> Layout:
    """Return the layout of a folder with an entry for each split, a single data file, or class folders."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [path for path in entries if path.is_file() and is_file_name(path.name)]
    folders = [path for path in entries if path.is_dir()]
    splits = {
        split: next((path for path in (*files, *folders) if path.stem.lower() in names), None)
        for split, names in SPLIT_NAMES.items()
    }
    found = {split: path.name for split, path in splits.items() if path is not None}
    if splits["train"] is not None and splits["test"] is not None:
        return Layout({"source": source, "splits": found}, splits["train"])
    if found:
        missing = "test" if splits["train"] is not None else "train"
        raise DataError(
            f"{folder} has {' and '.join(found.values())}, and nothing for {missing}.",
            where="--data",
            expected="a file or folder for each of train, test and, if you have it, validation",
            hint=f"add {missing}, or join the rows in one file, which is split automatically",
        )
    if len(files) == 1:
        return Layout({"source": f"{source}/{files[0].name}"}, files[0])
    if not files and folders:
        return Layout({"source": source}, folder)
    names = ", ".join(path.name for path in files[:5])
    raise DataError(
        f"{folder} has {f'several data files: {names}' if files else 'no data file and no folder'}.",
        where="--data",
        expected="one data file, files or folders named train, validation and test, or one folder for each class",
    )
