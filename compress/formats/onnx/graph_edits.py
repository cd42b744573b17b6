"""Building blocks of graph rewrites: stored values, single consumers, new nodes, and ONNX Runtime's optimizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
_FATAL_ONLY = 4


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer or constant, or ``None`` for a computed value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def rank(value: ir.Value | None) -> int | None:
    """Return the number of axes of a value, or ``None`` if it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def only_consumer(value: ir.Value, *operators: str) -> ir.Node | None:
    """Return the one node that reads ``value`` if it is one of ``operators`` and ``value`` is no graph output."""
    nodes = [usage.node for usage in value.uses()]
    single = len(nodes) == 1 and not value.is_graph_output()
    return nodes[0] if single and nodes[0].op_type in operators else None


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes ``value``, or ``None`` if ``operators`` are named and it is none of them."""
    node = None if value is None else value.producer()
    return node if node is not None and (not operators or node.op_type in operators) else None


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input of a node, or ``None`` if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def without_absent_end(values: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Return the inputs of a node without absent ones at the end."""
    present = list(values)
    while present and present[-1] is None:
        present.pop()
    return present


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the first input of ``node`` that is not ``value``."""
    return next((operand for operand in node.inputs if operand is not value), None)


def replace_node(graph: ir.Graph, node: ir.Node, replacement: Sequence[ir.Node]) -> None:
    """Replace a node by others; the last one's output takes over the name, type, shape and readers of the old output.

    The other outputs get that type and shape too.
    """
    old, new = node.outputs[0], replacement[-1].outputs[0]
    for added in replacement:
        added.outputs[0].type, added.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, replacement)
    # A graph output keeps its name, so the old value gives it up first.
    name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name
    graph.remove(node, safe=True)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register ``array`` as an initializer called ``name`` and return its value."""
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array)))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def clean(model: ir.Model) -> None:
    """Drop unused nodes and initializers and sort the rest topologically, in place."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)


class NodeWriter:
    """Nodes that are inserted before an existing one, with the shapes that are known of them."""

    def __init__(self, graph: ir.Graph, successor: ir.Node, name: str) -> None:
        self.graph, self._before, self._name, self._count = graph, successor, name, 0

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int | ir.SymbolicDim | None] | None,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        """Insert a float32 node with one output, and return that output.

        Args:
            operator: Operator type.
            inputs: Input values; None for an optional input that is absent.
            shape: Shape of the output, or None if it is unknown.
            domain: Domain of the operator.
            **attributes: Attributes of the node.
        """
        node = ir.node(operator, inputs, attributes=attributes, domain=domain)
        node.name = f"{self._name}_{self._count}"
        self._count += 1
        output = node.outputs[0]
        output.name = f"{node.name}_output"
        output.dtype, output.shape = ir.DataType.FLOAT, None if shape is None else ir.Shape(shape)
        self.graph.insert_before(self._before, node)
        return output

    def constant(self, array: np.ndarray) -> ir.Value:
        """Store an array and return its value."""
        self._count += 1
        return add_initializer(self.graph, f"{self._name}_{self._count - 1}", array)


def optimize_basic(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which ONNX Runtime has folded constant expressions, in branches too.

    A constant that several branches read is stored in each. Raises ONNX Runtime's errors.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _FATAL_ONLY
    # ONNX Runtime only writes an optimized graph to a file, when it opens the session.
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "basic.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized: onnx.ModelProto = onnx.load(options.optimized_model_filepath)
    optimized.producer_name, optimized.producer_version = graph.producer_name, graph.producer_version
    return optimized
