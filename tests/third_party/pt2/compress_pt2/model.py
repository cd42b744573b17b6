"""A torch.export program with its companion files, as a folder. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.models.model import only_file, read_companions, write_companions

FILE = "model.pt2"


@dataclass(frozen=True)
class Pt2Model:
    """Artifact of a `.pt2` file (``program``) and its config and tokenizer files by relative path (``companions``)."""

    kind: ClassVar[str] = "pt2"
    program: bytes = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Load a folder written by `save`. Raises `ModelError` for a folder without exactly one program."""
        file = only_file(directory, ".pt2", "pt2")
        return cls(file.read_bytes(), read_companions(directory, (file,)))

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        (directory / FILE).write_bytes(self.program)
        write_companions(directory, self.companions)
