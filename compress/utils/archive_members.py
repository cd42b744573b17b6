"""Checks of members of an untrusted zip or tar file before they are extracted."""

from __future__ import annotations

import stat
import zipfile
from pathlib import PurePosixPath, PureWindowsPath


def unsafe_member_reason(name: str, is_plain: bool) -> str | None:
    """Return why a member of that name must not be extracted, or ``None``.

    Args:
        name: Path of the member inside the archive.
        is_plain: True if the member is a regular file or a folder, not a link or a device.
    """
    path = PurePosixPath(name)
    # Backslashes and drives are separators on Windows.
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        return "points outside the archive's folder"
    return None if is_plain else "is a link or a device"


def is_plain(entry: zipfile.ZipInfo) -> bool:
    """Return True if a zip member is a regular file or a folder; a zip without file modes passes."""
    return stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
