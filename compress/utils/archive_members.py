"""What an entry of a stranger's zip or tar may be: a plain file or folder, at a path within."""

from __future__ import annotations

import stat
import zipfile
from pathlib import PurePosixPath, PureWindowsPath


def objection(name: str, is_plain: bool) -> str | None:
    """Why an entry of that name is refused, or ``None``; ``is_plain`` says that it is a file or a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        return "points outside the archive's folder"
    return None if is_plain else "is a link or a device"


def is_plain(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry of a zip is a file or a folder; a zip may leave out which."""
    return stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
