"""Nodes and tensors of a file in ONNX Runtime's own format, by the package's own flatbuffers schema (ort.fbs)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ModelError
from compress.formats.ort.tools import ort_tools

_IDENTIFIER = b"ORTM"

Content = bytes
"""Of a whole file; a tensor's own `bytes` is a number."""


@dataclass(frozen=True)
class OrtTensor:
    """A stored tensor: its name, the number of its type in ONNX, its shape, and where its bytes lie in the file."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    start: int
    bytes: int

    def values(self, content: Content) -> np.ndarray:
        """Its values in the ``content`` of the whole file, read-only."""
        from onnx import helper

        stored = np.frombuffer(content, np.uint8, self.bytes, self.start)
        found: np.ndarray = stored.view(helper.tensor_dtype_to_np_dtype(self.data_type)).reshape(self.shape)
        return found


@dataclass(frozen=True)
class OrtNode:
    """An operator with its integer attributes."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]


@dataclass(frozen=True)
class OrtGraph:
    """What a file holds, its branches among it; tensors of strings are left out."""

    nodes: tuple[OrtNode, ...]
    tensors: tuple[OrtTensor, ...]


def read_ort(content: bytes, file: Path) -> OrtGraph:
    """The graph in the ``content`` of a file. Raises `ModelError` for one that isn't whole, or is another kind."""
    if content[4:8] != _IDENTIFIER:
        raise ModelError(f"{file.name} is not in ONNX Runtime's format.", where=str(file), expected="a whole .ort file")
    ort_tools()
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    try:
        graphs = list(_graphs(InferenceSession.GetRootAs(content, 0).Model().Graph()))
        origin = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
        nodes = tuple(_node(graph.Nodes(index)) for graph in graphs for index in range(graph.NodesLength()))
        return OrtGraph(nodes, tuple(tensor for graph in graphs for tensor in _tensors(graph, origin)))
    except (struct.error, AttributeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{file.name} cannot be read: {error}", where=str(file), mend="write it again with the stage ort"
        ) from error


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for index in range(graph.NodesLength()):
        for attribute in _attributes(graph.Nodes(index)):
            if attribute.G() is not None:
                yield from _graphs(attribute.G())


def _attributes(node: Any) -> Iterator[Any]:
    return (node.Attributes(place) for place in range(node.AttributesLength()))


def _node(node: Any) -> OrtNode:
    from onnx import AttributeProto

    return OrtNode(
        node.OpType().decode(),
        (node.Name() or b"").decode(),
        tuple(node.Inputs(index).decode() for index in range(node.InputsLength())),
        tuple(node.Outputs(index).decode() for index in range(node.OutputsLength())),
        {one.Name().decode(): one.I() for one in _attributes(node) if one.Type() == AttributeProto.INT},
    )


def _tensors(graph: Any, origin: int) -> Iterator[OrtTensor]:
    for index in range(graph.InitializersLength()):
        tensor = graph.Initializers(index)
        shape = tuple(tensor.Dims(axis) for axis in range(tensor.DimsLength()))
        if tensor.RawDataLength():
            start = tensor.RawDataAsNumpy().__array_interface__["data"][0] - origin
            yield OrtTensor(tensor.Name().decode(), tensor.DataType(), shape, start, tensor.RawDataLength())
