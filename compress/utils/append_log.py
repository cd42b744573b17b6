"""Append-only files of lines, each flushed to disk before it counts."""

from __future__ import annotations

import os
from pathlib import Path

from compress.utils.storage import storage_errors


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
