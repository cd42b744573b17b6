"""SHA-256 and sizes of files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_directory(directory: Path) -> str:
    """SHA-256 over the sorted relative names and contents of all files below ``directory``, as hex."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        total.update(path.relative_to(directory).as_posix().encode() + b"\0")
        total.update(digest_file(path).encode() + b"\0")
    return total.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's contents, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(directory: Path) -> int:
    """Bytes on disk of all files below ``directory``."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
