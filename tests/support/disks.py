"""A disk of a few megabytes, and progress that fills it at a chosen moment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_run


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a small tmpfs at ``folder``; skip the test where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filler(tiny_run.Notes):
    """Progress that fills a disk up to ``room`` free bytes when a note or description contains ``text``."""

    def __init__(self, disk: Path, text: str, room: int = 0) -> None:
        super().__init__()
        self.file = disk / "filler"
        self.text = text
        self.room = room

    def note(self, message: str) -> None:
        super().note(message)
        if self.text in message:
            self.fill()

    def track(self, items: Any, description: str, total: int) -> Iterator[Any]:
        if self.text in description:
            self.fill()
        yield from items

    def fill(self) -> None:
        with self.file.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue
        os.truncate(self.file, max(0, self.file.stat().st_size - self.room))
