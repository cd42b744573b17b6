"""Writing an ONNX graph node by node: names, constants and the operators of three domains."""

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
    """A graph in the making. Every value is called after the module that makes it, as exporters do, and numbered."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()
        self._stored = self._tape
        self._constants: dict[str, ir.Value] = {}
        self._names: set[str] = set()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """An input of the graph."""
        value = ir.val(name, dtype=dtype, shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make ``value`` an output of the graph."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A stored tensor, stored once for each name; ``dtype`` where numpy's type doesn't say it."""
        if name not in self._constants:
            tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
            self._constants[name] = self._stored.initializer(tensor)
        return self._constants[name]

    def integers(self, *values: int) -> ir.Value:
        """A list of int64, such as a shape or axes."""
        return self.constant("constants.int64." + "_".join(map(str, values)), np.array(values, np.int64))

    def op(
        self, kind: str, name: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output."""
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
        """A node with several outputs."""
        path, again = self._path(name, kind), 0
        while path in self._names:
            again += 1
            path = self._path(f"{name}.{again}", kind)
        self._names.add(path)
        values = [ir.Value(name=f"{path}/output_{index}") for index in range(outputs)]
        self._tape.op_multi_out(kind, inputs, attributes, outputs=values, domain=domain, name=path)
        return values

    def copy(
        self, node: ir.Node, name: str, inputs: Sequence[ir.Value | None], values: dict[ir.Value, ir.Value]
    ) -> Sequence[ir.Value]:
        """A node of another graph with other inputs; ``values`` of this graph stand for those that it knows."""
        cloner = Cloner(attr_map={}, value_map=dict(values), metadata_props={}, allow_outer_scope_values=True)
        attributes = {key: cloner.clone_attr(key, attribute) for key, attribute in node.attributes.items()}
        return self.several(node.op_type, name, inputs, len(node.outputs), node.domain, **attributes)

    def branch(self, name: str, write: Callable[[], Sequence[ir.Value]], inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """What ``write`` adds, as a graph within a node; its constants are the whole graph's. It gives the outputs."""
        outer, self._tape = self._tape, ir.tape.Tape()
        try:
            outputs = write()
            return ir.Graph(inputs, outputs, nodes=self._tape.nodes, name=name)
        finally:
            self._tape = outer

    @staticmethod
    def _path(name: str, kind: str) -> str:
        return f"/{name.replace('.', '/')}/{kind}"

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """Those made so far."""
        return self._outputs

    def model(self, name: str, metadata: dict[str, str] | None = None) -> ir.Model:
        """The finished graph."""
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
    """A node in the module of ``like``, called by its ``scope`` there."""
    given, name = list(inputs), f"{(like.name or '').rpartition('/')[0]}/{scope}"
    while given and given[-1] is None:
        given.pop()
    made = ir.node(kind, given, dict(attributes), domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(made.outputs):
        value.name = f"{name}/output_{index}"
    return made
