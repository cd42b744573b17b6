"""A LiteRT file (`.tflite`) with what belongs to it, as a folder. Importing this imports no ai_edge_litert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self

from compress.checkpoints.model import only_file, read_companions, write_companions

LITERT_FILE = "model.tflite"
Precision = Literal["fp32", "fp16", "int8", "int8_weights"]
"""Of weights; in int8 products are of 8 bits too."""
Blocks = Literal[32, 64, 128, 256]
"""Weights of a table's row that share a scale."""


@dataclass(frozen=True)
class LiteRtModel:
    """``graph`` is the file, its signatures and weights in it; ``companions`` as `OnnxModel` has them."""

    kind: ClassVar[str] = "litert"
    graph: bytes = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one whole file of that format."""
        from compress.formats.litert.read import read_litert

        file = find_litert(directory)
        content = file.read_bytes()
        read_litert(content, file)
        return cls(content, read_companions(directory, (file,)))

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        (directory / LITERT_FILE).write_bytes(self.graph)
        write_companions(directory, self.companions)


def find_litert(artifact: Path) -> Path:
    """The only `.tflite` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".tflite", "litert")
