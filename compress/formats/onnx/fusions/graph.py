"""Small questions that every rewrite asks of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer or constant, or ``None`` for a computed value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def only_consumer(value: ir.Value, *operators: str) -> ir.Node | None:
    """The one node that reads ``value``, if it is one of ``operators`` and ``value`` is no graph output."""
    nodes = [usage.node for usage in value.uses()]
    single = len(nodes) == 1 and not value.is_graph_output()
    return nodes[0] if single and nodes[0].op_type in operators else None


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register ``array`` as an initializer called ``name`` and return its value."""
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array)))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def clean(model: ir.Model) -> None:
    """Drop unused nodes and initializers and put the rest in topological order."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
