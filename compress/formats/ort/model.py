"""A graph in ONNX Runtime's own format with what belongs to it, as a folder. Importing this imports no onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from compress.checkpoints.companions import read_companions, write_companions
from compress.checkpoints.model import only_file
from compress.formats.onnx.model import OnnxModel

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


def to_ort(model: OnnxModel) -> OrtModel:
    """``model``'s only graph optimized for any processor and stored, the same bytes each time.

    All optimizations are done now ("fixed" in ONNX Runtime's words) but the one for blocked channels, which ARM doesn't
    have: a minimal build does none of its own. Raises `StageError` for a graph that ONNX Runtime refuses.
    """
    import onnx

    from compress.formats.ort.conversion import convert, operators_of
    from compress.formats.ort.order import in_order

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "model.onnx", Path(folder) / ORT_FILE
        onnx.save_model(model.graph, source)
        convert(source, made)
        return OrtModel(in_order(made.read_bytes()), operators_of(made), model.companions)
