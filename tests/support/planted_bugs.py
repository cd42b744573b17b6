"""Readers with planted bugs, and a program that runs the fuzzer on each.

It is a process of its own, because workers inherit signal handlers, limits and threads of the process that forks them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import fuzz
from fuzzing import worker
from fuzzing.targets import BrokenPromiseError, Target
from fuzzing.values import mutate_json

from compress.utils.errors import InputError


def _seed(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0/file.json").write_text(json.dumps({"sizes": [1, 2, 3], "name": "a", "deep": {"x": 1.5}}))


def _values(folder: Path) -> list[object]:
    try:
        sizes = json.loads((folder / "file.json").read_bytes())["sizes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError("no sizes") from None
    return sizes if isinstance(sizes, list) else [sizes]


def sound(folder: Path) -> object:
    return len(_values(folder))


def uncaught(folder: Path) -> object:
    return sum(_values(folder))  # type: ignore[arg-type]


def endless(folder: Path) -> object:
    while b"name" not in (folder / "file.json").read_bytes():
        time.sleep(0.01)
    return None


def hungry(folder: Path) -> object:
    return bytearray(3 << 30) if len(_values(folder)) != 3 else None


def crashing(folder: Path) -> object:
    if len(_values(folder)) != 3:
        os.abort()
    return None


def lying(folder: Path) -> object:
    if len(_values(folder)) != 3:
        raise BrokenPromiseError("three sizes are promised")
    return None


def unprintable(folder: Path) -> object:
    if len(_values(folder)) != 3:
        error = InputError("x")
        error.what = "\ud800"
        raise error
    return None


TARGETS = {
    reader.__name__: Target(reader.__name__, _seed, reader, {"file.json": mutate_json})
    for reader in (sound, uncaught, endless, hungry, crashing, lying, unprintable)
}


def main(folder: Path) -> None:
    """Write `failures.jsonl`, and `rows.json` with a row for each reader."""
    worker.LIMIT_SECONDS = 1
    runs = [
        fuzz.Run(target, fuzz.load_seeds(target), seconds=60, mutations=60 if name == "endless" else 150)
        for name, target in TARGETS.items()
    ]
    fuzz.run_all(runs, seed=1, jobs=1, failures=folder)
    (folder / "rows.json").write_text(json.dumps({run.target.kind: run.row() for run in runs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
