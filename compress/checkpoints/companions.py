"""The small files beside a model's own: config, tokenizer and the like, by their paths below its folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path


def read_companions(directory: Path, but: Collection[Path] = (), below: Path | None = None) -> dict[str, bytes]:
    """Every file of ``directory`` but those of the model itself, and but all of a folder ``below`` it."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path not in but)
    beside = (path for path in files if below is None or below not in path.parents)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in beside}


def write_companions(directory: Path, companions: Mapping[str, bytes]) -> None:
    """Write them into ``directory``, each at its path."""
    for name, content in companions.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
