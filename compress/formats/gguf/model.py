"""Folder of a GGUF file with its tokenizer and config. Importing this imports no gguf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from compress.models.model import link_or_copy, only_file

GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class GgufModel:
    """A folder that llama.cpp runs; config and tokenizer files are there for evaluation, in Hugging Face layout."""

    kind: ClassVar[str] = "gguf"
    folder: Path

    @property
    def file(self) -> Path:
        """Return the GGUF file; raise `ModelError` if there is not exactly one."""
        return find_gguf(self.folder)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one whole GGUF file."""
        from compress.formats.gguf.read import read_gguf

        read_gguf(find_gguf(directory))
        return cls(directory)

    def save(self, directory: Path) -> None:
        """Put every file into ``directory``: linked where the file system can, else copied."""
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            link_or_copy(path, directory / path.name)


def find_gguf(artifact: Path) -> Path:
    """Return the only `.gguf` file at or below ``artifact``; raise `ModelError` if there is not exactly one."""
    return only_file(artifact, ".gguf", "gguf")
