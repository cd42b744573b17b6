"""Folders as tar archives in memory, for the transfer between machines."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from compress.sources.build_model import write_once
from compress.utils.errors import StorageError
from compress.utils.storage import digest_directory

_MEND = "free space where the worker keeps its files (COMPRESS_WORKER_FOLDER)"


def pack(folder: Path) -> bytes:
    """Return all files below a folder as a tar archive. Links are followed."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", dereference=True) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files of an archive into a folder, which may exist. Members outside of the folder are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r") as tar:
        tar.extractall(folder, filter="data")


def unpack_verified(content: bytes, digest: str, folder: Path) -> None:
    """Write the files of an archive into a new folder, which appears complete or not at all.

    Raises:
        StorageError: The files have another digest, or cannot be written.
    """

    def write(made: Path) -> None:
        unpack(content, made)
        if digest_directory(made) != digest:
            raise StorageError(f"The files of {digest[:12]} have not arrived whole.", where=str(folder))

    write_once(folder, write, _MEND)
