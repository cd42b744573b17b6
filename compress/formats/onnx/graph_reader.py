"""Reader for the nodes and initializers of an ONNX file that walks the protobuf wire format and skips weights.

Field numbers are those of onnx.proto. Wire types: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.utils.errors import ModelError
from compress.utils.read_limits import LIMITS, refuse_above

if TYPE_CHECKING:
    import onnx

_DTYPES_FROM_1 = (
    *("float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16", "float64"),
    *("uint32", "uint64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "uint4", "int4", "float4_e2m1fn", "float8_e8m0fnu", "uint2", "int2", "float6_e2m3fn"),
    "float6_e3m2fn",
)
DTYPES = dict(enumerate(_DTYPES_FROM_1, start=1))
"""Names of the values of TensorProto.DataType."""
INTEGER_OPERATORS = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits"),
    *("QLinearMatMul", "QLinearConv", "QAttention", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)
"""Operators that identify a quantized graph."""
CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
_MAX_SIZE = (1 << 63) - 1
_PAYLOADS = (4, 5, 6, 7, 9, 10, 11)
"""Field numbers of float_data, int32_data, string_data, int64_data, raw_data, double_data and uint64_data."""


@dataclass
class Initializer:
    """A stored tensor. ``start`` and ``stop`` bound its TensorProto; ``external`` locates external data."""

    start: int
    stop: int
    name: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = "undefined"
    bytes: int = 0
    external: dict[str, str] = field(default_factory=dict)


@dataclass
class GraphNode:
    """An operator with its integer attributes and metadata."""

    op_type: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class OnnxGraph:
    """Nodes and initializers of a model, including those of subgraphs and functions.

    ``inputs`` and ``outputs`` are those of the main graph, as serialized ValueInfoProto.
    """

    nodes: list[GraphNode] = field(default_factory=list)
    initializers: list[Initializer] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)


def first_integer_operator(graph: OnnxGraph) -> str | None:
    """Return the first operator that identifies ``graph`` as quantized; None for a float graph."""
    return next((node.op_type for node in graph.nodes if node.op_type in INTEGER_OPERATORS), None)


def convolution_share(graph: OnnxGraph) -> float:
    """Return the share of the stored bytes of a graph that are weights of convolutions."""
    kernels = {node.inputs[1] for node in graph.nodes if node.op_type in CONVOLUTIONS and len(node.inputs) > 1}
    sizes = {initializer.name: initializer.bytes for initializer in graph.initializers}
    return sum(size for name, size in sizes.items() if name in kernels) / max(sum(sizes.values()), 1)


def read_graph(path: Path) -> OnnxGraph:
    """Return the graph of an ONNX file. Raises `ModelError` for a truncated file or another kind of file."""
    if path.stat().st_size == 0:
        raise _broken(path, "it is empty")
    graph = OnnxGraph()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            has_graph = _Wire(path, data, graph).model(len(data))
        except EOFError as error:
            raise _broken(path, "it ends in the middle, or is another kind of file") from error
        except (KeyError, ValueError, RecursionError) as error:
            raise _broken(path, f"its contents are invalid ({error})") from error
    if not has_graph:
        raise _broken(path, "it holds no graph")
    return graph


def axes_of(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    """Return fixed sizes and names of axes; some exporters write numbers below 1 for a dynamic axis."""
    dimensions = value.type.tensor_type.shape.dim
    names = [axis.dim_param if re.search(r"\w", axis.dim_param) else None for axis in dimensions]
    # A protobuf field that is not set is 0 or empty.
    return tuple(axis.dim_value if axis.dim_value > 0 else name for axis, name in zip(dimensions, names, strict=True))


@dataclass
class _Wire:
    """Parser of one file. Its methods take the byte range of a message and add to ``graph``."""

    path: Path
    data: mmap.mmap
    graph: OnnxGraph
    count: int = 0
    tensors: int = 0

    def varint(self, position: int, stop: int) -> tuple[int, int]:
        """Return the integer at ``position`` and the position after it."""
        value = shift = 0
        while True:
            if position >= stop:
                raise EOFError
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise ValueError("an integer of more than 64 bits")

    def messages(self, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, start, stop) of a message whose known fields all have bytes; skip other types."""
        for number, begin, end in self.fields(position, stop):
            if end >= 0:
                yield number, begin, end

    def fields(self, position: int, stop: int, fixed: bool = False) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, value, -1) for integers and (field number, start, stop) for bytes.

        Fields of four and eight bytes are yielded if ``fixed``, as bytes too.
        """
        while position < stop:
            self.count += 1
            refuse_above(LIMITS.graph_fields, self.count, self.path.name, "fields", self.path)
            key, position = self.varint(position, stop)
            number, wire = key >> 3, key & 7
            if wire == 0:
                value, position = self.varint(position, stop)
                yield number, value, -1
                continue
            if wire not in (1, 2, 5):
                raise ValueError(f"wire type {wire}")
            length, position = self.varint(position, stop) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            if position + length > stop:
                raise EOFError
            if wire == 2 or (fixed and number in _PAYLOADS):
                yield number, position, position + length
            position += length

    def text(self, start: int, stop: int) -> str:
        """Return a string field."""
        return self.data[start:stop].decode()

    def model(self, stop: int) -> bool:
        """Read a ModelProto; return whether it holds a graph."""
        has_graph = False
        for number, start, end in self.messages(0, stop):
            if number == 7:
                self.subgraph(start, end, main=True)
                has_graph = True
            # The nodes of a FunctionProto.
            elif number == 25:
                for field_number, begin, field_end in self.messages(start, end):
                    if field_number == 7:
                        self.node(begin, field_end)
        return has_graph

    def subgraph(self, start: int, stop: int, main: bool = False) -> None:
        """Read a GraphProto. Inputs and outputs are read if it is the ``main`` graph."""
        for number, begin, end in self.messages(start, stop):
            if number == 1:
                self.node(begin, end)
            elif number == 5:
                self.graph.initializers.append(self.tensor(begin, end))
            elif main and number == 11:
                self.graph.inputs.append(self.data[begin:end])
            elif main and number == 12:
                self.graph.outputs.append(self.data[begin:end])
            # The values and indices of a SparseTensorProto.
            elif number == 15:
                places = [place for place in self.messages(begin, end) if place[0] in (1, 2)]
                _refuse_repetitions([place[0] for place in places])
                parts = [self.tensor(first, last) for _, first, last in places]
                for part in parts[1:]:
                    part.name = f"{parts[0].name}_indices"
                self.graph.initializers += parts

    def node(self, start: int, stop: int) -> None:
        """Read a NodeProto."""
        node = GraphNode()
        attributes = []
        for number, begin, end in self.messages(start, stop):
            if number == 1:
                node.inputs.append(self.text(begin, end))
            elif number == 2:
                node.outputs.append(self.text(begin, end))
            elif number == 3:
                node.name = self.text(begin, end)
            elif number == 4:
                node.op_type = self.text(begin, end)
            elif number == 5:
                attributes.append((begin, end))
            elif number == 9:
                node.metadata.update([self.pair(begin, end)])
        # Attributes may precede the names of the node's outputs in the file, which tensors in attributes take over.
        for begin, end in attributes:
            self.attribute(node, begin, end)
        self.graph.nodes.append(node)
        refuse_above(LIMITS.graph_nodes, len(self.graph.nodes), self.path.name, "nodes", self.path)

    def attribute(self, node: GraphNode, start: int, stop: int) -> None:
        """Read an AttributeProto into ``node``; tensors and subgraphs in it are added to the graph."""
        name = ""
        _refuse_repetitions([number for number, _, _ in self.messages(start, stop) if number in (5, 6)])
        for number, begin, end in self.fields(start, stop):
            if number == 3 and end < 0:
                node.integers[name] = begin
            elif end < 0:
                continue
            elif number == 1:
                name = self.text(begin, end)
            elif number in (5, 10):
                tensor = self.tensor(begin, end)
                tensor.name = (node.outputs or [node.name])[0]
                self.graph.initializers.append(tensor)
            elif number in (6, 11):
                self.subgraph(begin, end)

    def tensor(self, start: int, stop: int) -> Initializer:
        """Read the description of a TensorProto and step over its values."""
        tensor = Initializer(start, stop)
        shape: list[int] = []
        for number, begin, end in self.fields(start, stop, fixed=True):
            if number == 1:
                shape += [begin] if end < 0 else self.packed(begin, end)
            elif number == 2 and end < 0:
                tensor.dtype = DTYPES[begin]
            elif number == 8 and end >= 0:
                tensor.name = self.text(begin, end)
            elif number in _PAYLOADS:
                # A varint has seven bits per byte.
                tensor.bytes += max(1, (begin.bit_length() + 6) // 7) if end < 0 else end - begin
            elif number == 13 and end >= 0:
                tensor.external.update([self.pair(begin, end)])
        refuse_above(LIMITS.dimensions, len(shape), f"The tensor {tensor.name!r}", "dimensions", self.path)
        self.tensors += 1
        refuse_above(LIMITS.tensors, self.tensors, self.path.name, "tensors", self.path)
        if max(shape, default=0) > _MAX_SIZE:
            raise ValueError(f"the tensor {tensor.name!r} has a negative size")
        tensor.shape = tuple(shape)
        return tensor

    def packed(self, start: int, stop: int) -> list[int]:
        """Read a packed list of integers."""
        values: list[int] = []
        # One dimension too many is enough to refuse the tensor.
        while start < stop and len(values) <= LIMITS.dimensions:
            value, start = self.varint(start, stop)
            values.append(value)
        return values

    def pair(self, start: int, stop: int) -> tuple[str, str]:
        """Read the key and the value of a StringStringEntryProto."""
        both = {number: self.text(begin, end) for number, begin, end in self.messages(start, stop)}
        return both.get(1, ""), both.get(2, "")


def _refuse_repetitions(numbers: list[int]) -> None:
    """Raise `ValueError` for a tensor or graph that a message has twice, whose parts protobuf would join."""
    if len(set(numbers)) < len(numbers):
        raise ValueError("a message has one field twice")


def _broken(path: Path, reason: str) -> ModelError:
    """Return the error for a file that cannot be read."""
    return ModelError(
        f"Not a whole ONNX file: {reason}.",
        where=str(path),
        expected="a file as onnx.save writes it",
        hint="Fetch, copy or export the file again.",
    )
