"""File locks, storage errors with a hint, and content keys for anything that is stored below the artifacts folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from compress.utils.errors import StorageError

AT_ONCE_SECONDS = 0.05
"""How long a lock is tried before it counts as held by another process."""


def cache_key(parts: Mapping[str, Any]) -> str:
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
