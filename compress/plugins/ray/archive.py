"""Folders as bytes, to travel between machines."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from compress.sources.build_model import write_once
from compress.utils.errors import StorageError
from compress.utils.storage import digest_directory

_MEND = "free space where the worker keeps its files (COMPRESS_WORKER_FOLDER)"


def pack(folder: Path) -> bytes:
    """All files below a folder, as a tar; links are followed."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", dereference=True) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files into a folder, which may be there already; none outside of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r") as tar:
        tar.extractall(folder, filter="data")


def unpack_verified(content: bytes, digest: str, folder: Path) -> None:
    """The files of that digest in a folder of their own, put there whole or not at all.

    Raises `StorageError` where they are others, or cannot be written.
    """

    def write(made: Path) -> None:
        unpack(content, made)
        if digest_directory(made) != digest:
            raise StorageError(f"The files of {digest[:12]} have not arrived whole.", where=str(folder))

    write_once(folder, write, _MEND)
