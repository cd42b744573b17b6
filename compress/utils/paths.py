"""Paths whose names come from files of others. Importing this module needs the standard library only."""

from __future__ import annotations

from pathlib import Path


def is_file(path: Path) -> bool:
    """Return whether there is such a file: not for a name that no file can have, too long or with a NUL character."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder: not for a name that nothing can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def expanded(text: str) -> Path:
    """Return a path with `~` replaced by the home folder; as it is if it names a user who does not exist."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_within(path: Path, folder: Path) -> bool:
    """Return whether a path stays in a folder after its links are resolved; not for a name that no file can have."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False
