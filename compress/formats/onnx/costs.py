"""What one call of an ONNX graph has to do at least: arithmetic operations and bytes moved, node by node.

Bytes are those of every tensor that a node reads and writes, each once; of a table that is looked up, the rows that
are picked. What a kernel keeps to itself (packed copies, scratch) is not counted, so the bytes are a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.call import Call, Operations, Tensor
from compress.formats.onnx.operators import OPERATORS, size_of_writes, sizes_of_reads


@dataclass(frozen=True)
class Cost:
    """What a node does in one call. ``weight_bytes`` are read from stored tensors, the rest from other nodes."""

    operations: Operations
    weight_bytes: int
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        """All bytes read and written."""
        return self.weight_bytes + self.read_bytes + self.written_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes read from other nodes and written for them."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class GraphCost:
    """The costs of one call by node name. ``None`` for a node that nobody knows how to count.

    ``working_set_bytes`` is what a call has in use: the stored bytes that it reads, those shared by several nodes
    once, and the activations of the node that has most of them.
    """

    nodes: Mapping[str, Cost | None]
    working_set_bytes: int

    @property
    def operations(self) -> Operations:
        """The sum over the counted nodes."""
        known = [cost.operations for cost in self.nodes.values() if cost is not None]
        return Operations(sum(each.fp32 for each in known), sum(each.int8 for each in known))


def count_graph(graph: ir.Graph, shapes: Mapping[str, Tensor]) -> GraphCost:
    """The costs of one call of ``graph``, whose nodes have names of their own.

    ``shapes`` gives every tensor that is not stored in the graph, by name, as it is in that call; a node of which
    one is missing is not counted. Subgraphs are not entered, so an `If` or a `Loop` is not counted.
    """
    costs: dict[str, Cost | None] = {}
    stored: dict[str, int] = {}
    for node in graph:
        call = _call(node, shapes)
        cost = costs[str(node.name)] = None if call is None else _count(call)
        if call is not None and cost is not None:
            for value, tensor, size in zip(node.inputs, call.inputs, sizes_of_reads(call), strict=True):
                if value is not None and tensor is not None and tensor.stored:
                    key = str(value.name)
                    stored[key] = min(tensor.bytes, stored.get(key, 0) + size)
    busiest = max((cost.activation_bytes for cost in costs.values() if cost is not None), default=0)
    return GraphCost(costs, sum(stored.values()) + busiest)


def stored_tensor(value: ir.Value) -> Tensor | None:
    """Type and shape of an initializer, or ``None`` for a value that is computed."""
    if value.const_value is None:
        return None
    return Tensor(value.const_value.dtype, tuple(int(size) for size in value.const_value.shape), stored=True)


def _tensor(value: ir.Value, shapes: Mapping[str, Tensor]) -> Tensor | None:
    return stored_tensor(value) or shapes.get(str(value.name))


def _call(node: ir.Node, shapes: Mapping[str, Tensor]) -> Call | None:
    """The node with its tensors; None for an operator or a tensor that is not known."""
    inputs = [None if value is None else _tensor(value, shapes) for value in node.inputs]
    outputs = [_tensor(value, shapes) for value in node.outputs if value.name]
    present = [tensor for tensor in outputs if tensor is not None]
    unknown = any(value is not None and tensor is None for value, tensor in zip(node.inputs, inputs, strict=True))
    if (node.domain, node.op_type) not in OPERATORS or unknown or len(present) != len(outputs):
        return None
    return Call(node, inputs, present)


def _count(call: Call) -> Cost | None:
    operations = OPERATORS[call.node.domain, call.node.op_type].operations(call)
    if operations is None:
        return None
    reads = sizes_of_reads(call)
    weights = sum(size for tensor, size in zip(call.inputs, reads, strict=True) if tensor is not None and tensor.stored)
    return Cost(operations, weights, sum(reads) - weights, size_of_writes(call))
