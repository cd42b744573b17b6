"""A graph in ONNX Runtime's own format with what belongs to it, as a folder. Importing this imports no onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.checkpoints.model import only_file, read_companions, write_companions

ORT_FILE = "model.ort"
OPERATORS_FILE = "required_operators_and_types.config"
"""What a minimal build of ONNX Runtime is told to keep: its own name for the file."""


@dataclass(frozen=True)
class OrtModel:
    """``graph`` as ONNX Runtime optimized and stored it, and ``companions`` as `OnnxModel` has them.

    ``operators`` lists the operators that the graph calls, with their types, for `--include_ops_by_config`.
    """

    kind: ClassVar[str] = "ort"
    graph: bytes = field(repr=False)
    operators: str = field(repr=False)
    companions: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, directory: Path, task: object) -> Self:
        """Open what `save` wrote. Raises `ModelError` for a folder without one whole file of that format."""
        from compress.formats.ort.read import read_ort

        file = find_ort(directory)
        content = file.read_bytes()
        read_ort(content, file)
        companions = read_companions(directory, (file,))
        return cls(content, companions.pop(OPERATORS_FILE, b"").decode(), companions)

    def save(self, directory: Path) -> None:
        """Write every file into ``directory``."""
        (directory / ORT_FILE).write_bytes(self.graph)
        (directory / OPERATORS_FILE).write_text(self.operators, encoding="utf-8")
        write_companions(directory, self.companions)


def find_ort(artifact: Path) -> Path:
    """The only `.ort` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".ort", "ort")
