"""Graph in ONNX Runtime's own format, and reader of its nodes and tensors. Importing this imports no onnxruntime."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.formats.model_file import FileModel
from compress.formats.onnx.graph_reader import DTYPES, GraphNode, Initializer, OnnxGraph
from compress.models.stored_tensor import StoredTensor, stored
from compress.utils.errors import ModelError

ORT_FILE = "model.ort"
OPERATORS_FILE = "required_operators_and_types.config"
"""ONNX Runtime's name for the list of operators that a minimal build must contain."""

IDENTIFIER = b"ORTM"


class OrtModel(FileModel):
    """Graph as ONNX Runtime optimized and stored it.

    The list of its operators and types lies beside it, for `--include_ops_by_config`.
    """

    kind = "ort"

    @classmethod
    def files_with(cls, file: Path) -> tuple[Path, ...]:
        """See `FileModel.files_with`."""
        read_ort(file.read_bytes(), file)
        return (file,)


@dataclass(frozen=True)
class OrtGraph:
    """Contents of a file, including its branches, without tensors of strings."""

    nodes: tuple[GraphNode, ...]
    tensors: tuple[StoredTensor, ...]

    def as_onnx(self) -> OnnxGraph:
        """Return the graph in the form that ONNX files are read in; ``start`` and ``stop`` bound a tensor's values."""
        initializers = [
            Initializer(one.start, one.start + one.bytes, one.name, one.shape, one.dtype, one.bytes)
            for one in self.tensors
        ]
        return OnnxGraph(list(self.nodes), initializers)


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return the tensors of a file, named and counted like those of an ONNX graph."""
    graph = read_ort(file.read_bytes(), file)
    # Imported here: recipes load this module, and `compress recipes` must not wait for NumPy.
    from compress.formats.onnx.stored_tensors import annotate_tensors

    return annotate_tensors(graph.as_onnx(), graph.tensors)


def read_ort(content: bytes, file: Path) -> OrtGraph:
    """Return the graph in the ``content`` of a file; raise `ModelError` for an incomplete file or another kind."""
    if content[4:8] != IDENTIFIER:
        raise ModelError(f"{file.name} is not in ONNX Runtime's format.", where=str(file), expected="a whole .ort file")
    # The flatbuffers schema is importable only after onnxruntime's tools.
    ort_tools()
    import numpy as np
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    try:
        graphs = list(_graphs(InferenceSession.GetRootAs(content, 0).Model().Graph()))
        # Offsets of tensors follow from the addresses of their views.
        origin = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
        nodes = tuple(_node(graph.Nodes(index)) for graph in graphs for index in range(graph.NodesLength()))
        return OrtGraph(nodes, tuple(tensor for graph in graphs for tensor in _tensors(graph, origin, file)))
    except (struct.error, AttributeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ModelError(
            f"{file.name} cannot be read: {error}", where=str(file), hint="write it again with the stage ort"
        ) from error


def ort_tools() -> Any:
    """Import `onnxruntime.tools.ort_format_model`, which also adds `ort_flatbuffers_py` to the path.

    Importing it gives the root logger a handler, and it logs each file that it writes.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.tools import ort_format_model
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    return ort_format_model


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for index in range(graph.NodesLength()):
        for branch in filter(None, (attribute.G() for attribute in _attributes(graph.Nodes(index)))):
            yield from _graphs(branch)


def _attributes(node: Any) -> Iterator[Any]:
    return (node.Attributes(index) for index in range(node.AttributesLength()))


def _node(node: Any) -> GraphNode:
    from onnx import AttributeProto

    integers = (attribute for attribute in _attributes(node) if attribute.Type() == AttributeProto.INT)
    return GraphNode(
        node.OpType().decode(),
        (node.Name() or b"").decode(),
        [node.Inputs(index).decode() for index in range(node.InputsLength())],
        [node.Outputs(index).decode() for index in range(node.OutputsLength())],
        {attribute.Name().decode(): attribute.I() for attribute in integers},
    )


def _tensors(graph: Any, origin: int, file: Path) -> Iterator[StoredTensor]:
    for index in range(graph.InitializersLength()):
        tensor = graph.Initializers(index)
        shape = tuple(tensor.Dims(axis) for axis in range(tensor.DimsLength()))
        if tensor.RawDataLength():
            start = tensor.RawDataAsNumpy().__array_interface__["data"][0] - origin
            span, dtype = (start, tensor.RawDataLength()), DTYPES[tensor.DataType()]
            yield stored(tensor.Name().decode(), dtype, shape, file, span)
