"""Builder that writes an ONNX graph node by node: names, constants and operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir._cloner import Cloner

MICROSOFT = "com.microsoft"
OPSET = 21
IR_VERSION = 10
_PRODUCER = "compress"


class GraphBuilder:
    """A graph under construction. Every value is named after the module that computes it, and numbered."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._stored = self._tape
        self._constants: dict[str, ir.Value] = {}
        self._names: set[str] = set()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add an input of the graph."""
        value = ir.val(name, dtype=dtype, shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make ``value`` an output of the graph.

        Args:
            value: The value.
            name: Its new name.
            dtype: Its type.
            shape: Its shape, with names for dynamic axes.
        """
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Store a tensor once for each name; ``dtype`` is given if numpy has no such type."""
        if name not in self._constants:
            tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
            self._constants[name] = self._stored.initializer(tensor)
        return self._constants[name]

    def integers(self, *values: int) -> ir.Value:
        """Store a list of int64, such as a shape or axes."""
        return self.constant("constants.int64." + "_".join(map(str, values)), np.array(values, np.int64))

    def op(
        self, kind: str, name: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node and return its only output.

        Args:
            kind: Operator type.
            name: Module that the node belongs to.
            inputs: Input values; None for an absent optional input.
            domain: Domain of the operator.
            **attributes: Attributes of the node.
        """
        return self.several(kind, name, inputs, 1, domain, **attributes)[0]

    def several(
        self,
        kind: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Add a node and return its outputs.

        Args:
            kind: Operator type.
            name: Module that the node belongs to.
            inputs: Input values; None for an absent optional input.
            outputs: Number of outputs.
            domain: Domain of the operator.
            **attributes: Attributes of the node.
        """
        path, count = self._path(name, kind), 0
        # A module may have several nodes of one type.
        while path in self._names:
            count += 1
            path = self._path(f"{name}.{count}", kind)
        self._names.add(path)
        values = [ir.Value(name=f"{path}/output_{index}") for index in range(outputs)]
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, domain=domain, name=path)
        return values

    def copy(
        self, node: ir.Node, name: str, inputs: Sequence[ir.Value | None], values: dict[ir.Value, ir.Value]
    ) -> Sequence[ir.Value]:
        """Copy a node of another graph.

        Args:
            node: The node of the other graph.
            name: Module that the copy belongs to.
            inputs: Inputs of the copy.
            values: Values of this graph by the other graph's, for subgraphs of the node.
        """
        # Subgraphs in attributes refer to values of the outer graph, which the cloner replaces.
        cloner = Cloner(attr_map={}, value_map=dict(values), metadata_props={}, allow_outer_scope_values=True)
        attributes = {key: cloner.clone_attr(key, attribute) for key, attribute in node.attributes.items()}
        return self.several(node.op_type, name, inputs, len(node.outputs), node.domain, **attributes)

    def branch(self, name: str, write: Callable[[], Sequence[ir.Value]], inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """Return the nodes that ``write`` adds as a subgraph with the outputs that it returns.

        Constants are stored in the outer graph.
        """
        # Nodes are recorded on a tape of their own; constants stay on the outer one.
        outer, self._tape = self._tape, ir.tape.Tape()
        try:
            outputs = write()
            return ir.Graph(inputs, outputs, nodes=self._tape.nodes, name=name)
        finally:
            self._tape = outer

    @staticmethod
    def _path(name: str, kind: str) -> str:
        """Return the name of a node of a module."""
        return f"/{name.replace('.', '/')}/{kind}"

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """Outputs that were added so far."""
        return self._outputs

    def model(self, name: str, metadata: dict[str, str] | None = None) -> ir.Model:
        """Return the finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._stored.initializers,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=_PRODUCER, metadata_props=metadata)


def node_like(
    like: ir.Node,
    scope: str,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    domain: str = "",
    outputs: int = 1,
) -> ir.Node:
    """Return a node that belongs to the same module as ``like``.

    Args:
        like: A node of the module.
        scope: Name of the node in the module.
        kind: Operator type.
        inputs: Input values; None for an absent optional input.
        attributes: Attributes of the node.
        domain: Domain of the operator.
        outputs: Number of outputs.
    """
    present_inputs, name = list(inputs), f"{(like.name or '').rpartition('/')[0]}/{scope}"
    # Optional inputs at the end are left out.
    while present_inputs and present_inputs[-1] is None:
        present_inputs.pop()
    node = ir.node(kind, present_inputs, dict(attributes), domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = f"{name}/output_{index}"
    return node
