"""Files of lines that are only ever added to, each on the disk before it counts; files and folders put there."""

from __future__ import annotations

import os
from pathlib import Path

from compress.utils.storage import storage_errors


class AppendedLines:
    """A file of lines. What stands behind the last line break was cut short by a kill or a full disk, and is no line.

    One process at a time may write: who has several holds a lock. Raises `StorageError` where nothing can be written,
    and the file is whole then too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, line: bytes) -> None:
        """Write a line, which counts once this returns."""
        new = not self.path.exists()
        with storage_errors(self.path), self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                write_all(file.fileno(), line + b"\n")
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, before)
                raise
            if new:
                flush(self.path.parent)

    def read(self, start: int = 0) -> tuple[list[bytes], bytes]:
        """The lines from byte ``start`` on, and what stands behind the last of them."""
        with self.path.open("rb") as file:
            file.seek(start)
            *lines, rest = file.read().split(b"\n")
        return lines, rest

    def repair(self) -> int:
        """Take off what was cut short; how many bytes that was."""
        rest = len(self.read()[1])
        if rest:
            with storage_errors(self.path), self.path.open("r+b") as file:
                file.truncate(self.path.stat().st_size - rest)
                os.fsync(file.fileno())
        return rest


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte: a disk that fills up takes the first of them and says nothing, until the next write."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
