"""Inputs of an ONNX graph as rows: `.npz` and `.npy` files of a folder, or seeds for random inputs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from compress.data.files import Rows

INPUTS = "inputs"
"""Name of the column."""
SUFFIXES = (".npz", ".npy")
_DRAWN = re.compile(r"^random(?::(\d{1,6}))?$")
_COUNT = 64
_KEY = "drawn"


@dataclass(frozen=True)
class Draws:
    """Number of random inputs of a split. Each split has its own seeds."""

    split: str
    count: int

    def rows(self) -> Rows:
        """Return one row per random input; its value identifies the seed."""
        values = [json.dumps({_KEY: [self.split, index]}).encode() for index in range(self.count)]
        return Rows(f"random inputs of {self.split}", (INPUTS,), {INPUTS: values})


def draws(name: str, split: str) -> Draws | None:
    """Return the random inputs that `random` or `random:COUNT` requests, or ``None`` for any other name."""
    match = _DRAWN.match(name)
    return None if match is None else Draws(split, int(match[1] or _COUNT))


def seed_of(content: bytes) -> int | None:
    """Return the seed of a random input, or ``None`` for the content of a file."""
    if not content.startswith(b'{"' + _KEY.encode()):
        return None
    import hashlib

    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def array_files(folder: Path) -> list[Path]:
    """Return the array files directly in ``folder``, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def read_array_folder(folder: Path) -> Rows:
    """Return one row per array file."""
    return Rows(folder.name, (INPUTS,), {INPUTS: [str(path.absolute()) for path in array_files(folder)]})
