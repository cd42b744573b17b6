"""SHA-256 digests and sizes of files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import Field

from compress.utils.pydantic_models import FrozenAliased


class FileRecord(FrozenAliased):
    """Size and SHA-256 of a file."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def digest_directory(directory: Path) -> str:
    """Return the SHA-256 over the sorted relative names and contents of all files below ``directory``, as hex."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return digest_of_files({path.relative_to(directory).as_posix(): digest_file(path) for path in paths})


def digest_of_files(digests: Mapping[str, str]) -> str:
    """Return the digest of a folder from the digests of its files, by relative name."""
    total = hashlib.sha256()
    for name in sorted(digests, key=PurePosixPath):
        # Null bytes separate names and digests unambiguously.
        total.update(f"{name}\0{digests[name]}\0".encode())
    return total.hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(directory: Path) -> int:
    """Return the bytes on disk of all files below ``directory``."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
