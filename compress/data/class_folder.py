"""A folder with one folder for each class, as `imagefolder` and `audiofolder` of Hugging Face datasets have it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from compress.data.files import Rows
from compress.errors import DataError

KINDS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
"""The column's name, and how the names of its files end."""
LABEL = "label"


def read_class_folder(folder: Path, wanted: Collection[str]) -> Rows:
    """Files as paths in a column `image` or `audio`, their folders' names as `label`, in the order of their names.

    What begins with a dot is passed over. Raises `DataError` for anything that is no such file, or in no class.
    """
    paths, labels = [], []
    for place in _visible(folder):
        if not place.is_dir():
            raise _stray(place, folder)
        for path in _visible(place):
            if not path.is_file() or _kind(path) is None:
                raise _stray(path, folder)
            paths.append(path)
            labels.append(place.name)
    kinds = sorted({_kind(path) or "" for path in paths})
    if len(kinds) != 1:
        raise DataError(
            f"{folder.name} holds {' and '.join(kinds) or 'no files'}.",
            where=str(folder),
            expected="one folder for each class, with images or with recordings in it",
        )
    columns: dict[str, list[Any]] = {kinds[0]: [str(path.absolute()) for path in paths], LABEL: labels}
    return Rows(folder.name, (kinds[0], LABEL), {name: found for name, found in columns.items() if name in wanted})


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder.name} cannot be read: {error.strerror or error}.", where=str(folder)) from error


def _kind(path: Path) -> str | None:
    return next((kind for kind, suffixes in KINDS.items() if path.suffix.lower() in suffixes), None)


def _stray(path: Path, folder: Path) -> DataError:
    endings = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
    return DataError(
        f"{path.relative_to(folder)} is no image or recording in the folder of a class.",
        where=str(path),
        expected=f"{folder.name}/CLASS/FILE, the file ending in one of {endings}",
        mend="take it out, or let its name begin with a dot",
    )
