"""An ONNX model as a directory: one graph, the config and the processor's files. Importing this imports no onnx."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.model import only_file

if TYPE_CHECKING:
    import onnx

GRAPH_FOLDER = "onnx"
FLOAT_GRAPH = "model.onnx"
QUANTIZED_GRAPH = "model_quantized.onnx"
EXTERNAL_DATA_FROM_BYTES = 1_500_000_000
SHARED_CACHE = "past_present_share_buffer"
"""Metadata "1" of a decoder's graph: input and output of its cache may be one buffer (onnxruntime-genai's term)."""


@dataclass
class OnnxModel:
    """A graph, the name of its file, and the small files that belong to it (path below the folder -> content).

    ``onnx/model.onnx`` and ``onnx/model_quantized.onnx`` are the names that transformers.js, optimum and
    sentence-transformers look for.
    """

    kind: ClassVar[str] = "onnx"
    graph: onnx.ModelProto
    file_name: str
    companions: Mapping[str, bytes] = field(repr=False)

    def save(self, directory: Path) -> None:
        """Write the graph (weights inside, or in FILE_data beside it above 1.5 GB) and the companion files."""
        import onnx

        target = directory / GRAPH_FOLDER / self.file_name
        target.parent.mkdir()
        if self.graph.ByteSize() > EXTERNAL_DATA_FROM_BYTES:
            location = f"{self.file_name}_data"
            onnx.save_model(self.graph, target, save_as_external_data=True, location=location)
            # Saving so takes the weights out of the graph in memory.
            onnx.load_external_data_for_model(self.graph, str(target.parent))
        else:
            onnx.save_model(self.graph, target)
        for name, content in self.companions.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    @classmethod
    def load(cls, directory: Path, task: str) -> OnnxModel:
        """Open what `save` wrote. Raises `ModelError` when there is not exactly one graph."""
        import onnx

        path = find_graph(directory)
        graphs = directory / GRAPH_FOLDER
        files = (file for file in sorted(directory.rglob("*")) if file.is_file() and file != path)
        beside = (file for file in files if graphs not in file.parents)
        companions = {file.relative_to(directory).as_posix(): file.read_bytes() for file in beside}
        return cls(onnx.load(path), path.name, companions)


def processor_of(model: OnnxModel) -> Any:
    """The processor among an ONNX model's companion files."""
    from compress.models.processor import load_processor

    with tempfile.TemporaryDirectory() as folder:
        for name, content in model.companions.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        return load_processor(Path(folder))


def labels_of(model: OnnxModel) -> tuple[str, ...] | None:
    """Class names in the order of their ids, as the config among the companion files has them."""
    names = json.loads(model.companions.get("config.json", b"{}")).get("id2label")
    return None if names is None else tuple(names[key] for key in sorted(names, key=int))


def find_graph(artifact: Path) -> Path:
    """The only `.onnx` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".onnx", "export")
