"""File locks, storage errors with a hint, and content keys for anything that is stored below the artifacts folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from filelock import FileLock
from pydantic import Field

from compress.utils.errors import StorageError
from compress.utils.pydantic_models import FrozenAliased

AT_ONCE_SECONDS = 0.05
"""How long a lock is tried before it counts as held by another process."""


def cache_key(parts: Mapping[str, object]) -> str:
    """Return the SHA-256 of ``parts`` as canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file; ``on_wait`` is called if another process holds it now."""
    lock = FileLock(path)
    try:
        # Report only waits that a user would notice.
        lock.acquire(timeout=AT_ONCE_SECONDS)
    except TimeoutError:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a `StorageError` with a hint."""
    try:
        yield
    except OSError as error:
        # A full disk or an exceeded quota has its own hint.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(Path(error.filename or path)) from error
        raise StorageError(
            f"The folder for artifacts cannot be used: {error.strerror or error}.",
            where=str(error.filename or path),
            hint="check that it is a folder and its permissions, or name another folder with --artifacts",
        ) from error


def disk_full(path: Path) -> StorageError:
    """Return the error for a disk on which nothing more can be written below ``path``."""
    return StorageError(
        "The disk is full.",
        where=str(path),
        hint="free space (`compress cache prune`) or name another folder with --artifacts, then run again; "
        "finished stages are kept",
    )


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


class AppendOnlyFile:
    """File of lines that only grows.

    Bytes after the last line break were cut off by a killed process or a full disk, and are not a line. One process at
    a time may write: several writers need a lock. Writing raises `StorageError` if the disk refuses, and leaves the
    file with whole lines only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: bytes) -> None:
        """Append a line and return once it is on disk."""
        is_new_file = not self.path.exists()
        with storage_errors(self.path), self.path.open("ab", buffering=0) as file:
            end_of_lines = file.tell()
            try:
                write_fully(file.fileno(), line + b"\n")
                os.fsync(file.fileno())
            except OSError:
                # A disk that fills up may have taken part of the line.
                os.truncate(self.path, end_of_lines)
                raise
            # The name of a new file is on disk only after its folder is flushed.
            if is_new_file:
                flush(self.path.parent)

    def read(self, start: int = 0) -> tuple[list[bytes], bytes]:
        """Return the whole lines from byte ``start`` on, and the incomplete rest after the last line break."""
        with self.path.open("rb") as file:
            file.seek(start)
            # The last element is empty if the file ends with a line break.
            *lines, incomplete = file.read().split(b"\n")
        return lines, incomplete

    def repair(self) -> int:
        """Remove an incomplete last line and return its length in bytes."""
        incomplete_bytes = len(self.read()[1])
        if incomplete_bytes:
            with storage_errors(self.path), self.path.open("r+b") as file:
                file.truncate(self.path.stat().st_size - incomplete_bytes)
                os.fsync(file.fileno())
        return incomplete_bytes


def write_fully(descriptor: int, content: bytes) -> None:
    """Write every byte, since a disk that fills up accepts part of them without an error until the next write."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    # Folders can be opened read-only for fsync too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
