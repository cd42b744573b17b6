"""Inputs of a graph as rows: `.npz` and `.npy` files of a folder, or seeds from which they are drawn."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from compress.data.files import Rows

INPUTS = "inputs"
"""The column."""
SUFFIXES = (".npz", ".npy")
_DRAWN = re.compile(r"^random(?::(\d{1,6}))?$")
_COUNT = 64
_KEY = "drawn"


@dataclass(frozen=True)
class Draws:
    """So many rows of a split that are drawn, others for each split."""

    split: str
    count: int

    def rows(self) -> Rows:
        """What tells each row from the others, as the bytes of a file that nobody wrote."""
        values = [json.dumps({_KEY: [self.split, place]}).encode() for place in range(self.count)]
        return Rows(f"random inputs of {self.split}", (INPUTS,), {INPUTS: values})


def draws(name: str, split: str) -> Draws | None:
    """`random`, or `random:COUNT`, as rows to draw; None for any other name."""
    found = _DRAWN.match(name)
    return None if found is None else Draws(split, int(found[1] or _COUNT))


def seed_of(content: bytes) -> int | None:
    """The seed of a row that is drawn; None for a file's."""
    if not content.startswith(b'{"' + _KEY.encode()):
        return None
    import hashlib

    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def array_files(folder: Path) -> list[Path]:
    """The files of arrays right below ``folder``, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def read_array_folder(folder: Path) -> Rows:
    """One row for each file of arrays."""
    return Rows(folder.name, (INPUTS,), {INPUTS: [str(path.absolute()) for path in array_files(folder)]})
