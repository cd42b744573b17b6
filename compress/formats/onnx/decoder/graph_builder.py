"""Builder that writes an ONNX graph node by node, and operators that consist of several nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir._cloner import Cloner

from compress.formats.onnx.decoder.tracing_patches import Placeholder
from compress.formats.onnx.graph_edits import MICROSOFT, without_absent_end

_OPSET, _IR_VERSION = 21, 10
LEFT_PADDING_CHECK = "padding_on_the_left_is_refused"
_SEQUENCES = ("query", "key", "value", "decay", "beta")
_SELECTED = ("step", "value", "input", "output")


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
        self, kind: str, name: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: object
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
        **attributes: object,
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
            opset_imports={"": _OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="compress", metadata_props=metadata)


def node_like(
    like: ir.Node,
    scope: str,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, object],
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
    present_inputs, name = without_absent_end(inputs), f"{(like.name or '').rpartition('/')[0]}/{scope}"
    node = ir.node(kind, present_inputs, dict(attributes), domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = f"{name}/output_{index}"
    return node


def write_lengths(nodes: GraphBuilder, mask: ir.Value) -> Sequence[ir.Value]:
    """Write the position of each row's last token, [batch] int32, and the total length, an int32 scalar."""
    axis = nodes.integers(1)
    count = nodes.op("ReduceSum", "lengths", [mask, axis], keepdims=0)
    # The first column of the mask picks from a table of one entry: 0, were it not 1, picks one that is not there.
    first = nodes.op("Gather", "lengths.first", [mask, nodes.constant("constants.zero", np.array(0))], axis=1)
    missing = nodes.op("Sub", "lengths.missing", [nodes.constant("constants.one", np.array(1)), first])
    minus_one = nodes.op("Gather", f"lengths.{LEFT_PADDING_CHECK}", [nodes.integers(-1), missing], axis=0)
    last = nodes.op("Add", "lengths.last", [count, minus_one])
    # The total length includes padding, as the attention operator expects.
    shape = nodes.op("Shape", "lengths.total", [mask], start=1, end=2)
    total = nodes.op("Squeeze", "lengths.total", [shape, nodes.integers(0)])
    named = (("lengths.last", last), ("lengths.total", total))
    return [nodes.op("Cast", name, [value], to=ir.DataType.INT32) for name, value in named]


def write_rotary(nodes: GraphBuilder, node: ir.Node, tables: dict[str, Sequence[ir.Value]]) -> Sequence[ir.Value]:
    """Write cosines and sines of all positions [positions, pairs], which are computed when the graph is loaded.

    ``tables`` holds those written so far.
    """
    frequencies = np.array(node.attributes["frequencies"].as_floats(), np.float32)
    factor, positions = node.attributes["factor"].as_float(), node.attributes["positions"].as_int()
    key = f"{frequencies.tobytes().hex()} {factor} {positions}"
    # Layers with the same rotation share their tables.
    if key not in tables:
        scope = f"rotary{len(tables) or ''}"
        bounds = {"start": 0, "stop": positions, "step": 1}
        ends = [nodes.constant(f"constants.{scope}_{name}", np.array(end, np.float32)) for name, end in bounds.items()]
        column = nodes.op("Unsqueeze", scope, [nodes.op("Range", scope, ends), nodes.integers(1)])
        angles = nodes.op("Mul", scope, [column, nodes.constant(f"constants.{scope}_frequencies", frequencies[None])])
        computed = [nodes.op(kind, scope, [angles]) for kind in ("Cos", "Sin")]
        # YaRN and similar scalings multiply cosines and sines.
        if factor != 1:
            scale = nodes.constant(f"constants.{scope}_factor", np.array(factor, np.float32))
            computed = [nodes.op("Mul", f"{scope}.{index}", [table, scale]) for index, table in enumerate(computed)]
        tables[key] = computed
    return tables[key]


class ExpertRows(NamedTuple):
    """``rows`` [n, hidden] routed to an expert, the indices of their ``tokens`` [n, 1], and their ``shares`` [n, 1]."""

    rows: ir.Value
    tokens: ir.Value
    shares: ir.Value
    name: str


def route_to_expert(
    nodes: GraphBuilder, name: str, number: int, rows: ir.Value, chosen: ir.Value, shares: ir.Value
) -> ExpertRows:
    """Write the selection of the rows that are routed to an expert.

    Args:
        nodes: The graph.
        name: Name of the expert's module.
        number: Index of the expert.
        rows: Hidden states [tokens, hidden].
        chosen: Experts that the router chose [tokens, k].
        shares: Their weights [tokens, k].
    """
    sent = nodes.op("Equal", name, [chosen, nodes.constant(f"constants.expert_{number}", np.array(number))])
    # Pairs of token and choice at which the router chose this expert.
    places = nodes.op("Transpose", name, [nodes.op("NonZero", name, [sent])], perm=[1, 0])
    tokens = nodes.op("Slice", name, [places, *[nodes.integers(value) for value in (0, 1, 1)]])
    expert_input = nodes.op("GatherND", f"{name}.rows", [rows, tokens])
    share = nodes.op("Unsqueeze", name, [nodes.op("GatherND", f"{name}.share", [shares, places]), nodes.integers(-1)])
    return ExpertRows(expert_input, tokens, share, name)


def combine_experts(
    nodes: GraphBuilder, scope: str, rows: ir.Value, outputs: Sequence[tuple[ExpertRows, ir.Value]]
) -> ir.Value:
    """Write the weighted sum of the experts' outputs [tokens, hidden].

    Args:
        nodes: The graph.
        scope: Name of the module of all experts.
        rows: Hidden states [tokens, hidden].
        outputs: The rows of each expert and its output for them.
    """
    parts = [nodes.op("Mul", f"{sent.name}.shared", [part, sent.shares]) for sent, part in outputs]
    all_tokens = nodes.op("Concat", f"{scope}.tokens", [sent.tokens for sent, _ in outputs], axis=0)
    all_parts = nodes.op("Concat", f"{scope}.parts", parts, axis=0)
    # Outputs are added into zeros, since a token is routed to several experts.
    nothing = nodes.op("ConstantOfShape", scope, [nodes.op("Shape", f"{scope}.experts", [rows])])
    return nodes.op("ScatterND", f"{scope}.experts", [nothing, all_tokens, all_parts], reduction="add")


def write_delta_rule(nodes: GraphBuilder, name: str, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """Write the gated delta rule: the final state and the outputs [length, batch, heads, value size]."""
    state = ir.val(f"{name}.state", dtype=ir.DataType.FLOAT)
    token = {kind: ir.val(f"{name}.{kind}", dtype=ir.DataType.FLOAT) for kind in _SEQUENCES}
    scope = f"{name}.token"

    def body() -> Sequence[ir.Value]:
        """Write the update of one token."""
        row, column, both = nodes.integers(-2), nodes.integers(-1), nodes.integers(-2, -1)
        decay = nodes.op("Unsqueeze", f"{scope}.decay", [token["decay"], both])
        decayed = nodes.op("Mul", f"{scope}.decay", [state, decay])
        key = nodes.op("Unsqueeze", f"{scope}.key", [token["key"], row])
        prediction = nodes.op("MatMul", f"{scope}.known", [key, decayed])
        value = nodes.op("Unsqueeze", f"{scope}.value", [token["value"], row])
        beta = nodes.op("Unsqueeze", f"{scope}.beta", [token["beta"], both])
        # The state is corrected by the difference between the value and the state's prediction of it.
        delta = nodes.op("Mul", f"{scope}.delta", [nodes.op("Sub", f"{scope}.delta", [value, prediction]), beta])
        upright = nodes.op("Unsqueeze", f"{scope}.upright", [token["key"], column])
        learned = nodes.op("MatMul", f"{scope}.learned", [upright, delta])
        after = nodes.op("Add", f"{scope}.after", [decayed, learned])
        query = nodes.op("Unsqueeze", f"{scope}.query", [token["query"], row])
        output = nodes.op("MatMul", f"{scope}.given", [query, after])
        return [after, nodes.op("Squeeze", f"{scope}.given", [output, row])]

    # `Scan` carries the state from token to token; its body sees one token.
    graph = nodes.branch(f"{name}.body", body, [state, *token.values()])
    return nodes.several("Scan", name, inputs, 2, body=graph, num_scan_inputs=len(_SEQUENCES))


def write_selective_scan(nodes: GraphBuilder, name: str, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """Write the selective scan: the final state and the outputs [length, batch, channels]."""
    initial_state, decays, *along = inputs
    state = ir.val(f"{name}.state", dtype=ir.DataType.FLOAT)
    token = {kind: ir.val(f"{name}.{kind}", dtype=ir.DataType.FLOAT) for kind in _SELECTED}
    scope = f"{name}.token"

    def body() -> Sequence[ir.Value]:
        """Write the update of one token."""
        row, column = nodes.integers(-2), nodes.integers(-1)
        step, value = (nodes.op("Unsqueeze", f"{scope}.{kind}", [token[kind], column]) for kind in ("step", "value"))
        read = nodes.op("Unsqueeze", f"{scope}.input", [token["input"], row])
        decay = nodes.op("Exp", f"{scope}.kept", [nodes.op("Mul", f"{scope}.kept", [step, decays])])
        old = nodes.op("Mul", f"{scope}.old", [state, decay])
        after = nodes.op("Add", f"{scope}.after", [old, nodes.op("Mul", f"{scope}.new", [value, read])])
        output = nodes.op("Unsqueeze", f"{scope}.output", [token["output"], column])
        result = nodes.op("MatMul", f"{scope}.given", [after, output])
        return [after, nodes.op("Squeeze", f"{scope}.given", [result, column])]

    graph = nodes.branch(f"{name}.body", body, [state, *token.values()])
    return nodes.several("Scan", name, [initial_state, *along], 2, body=graph, num_scan_inputs=len(_SELECTED))


RECURRENCES: Mapping[str, Callable[[GraphBuilder, str, Sequence[ir.Value]], Sequence[ir.Value]]] = {
    Placeholder.DELTA_RULE: write_delta_rule,
    Placeholder.SELECTIVE_SCAN: write_selective_scan,
}
"""Function that writes each recurrence, by its placeholder."""


def write_cross_attention(model: ir.Model, cached: ir.Value) -> None:
    """Replace every cross attention by an `If` on ``cached``, in place.

    Nodes that only the first call needs, such as the products that compute keys and values, move into its branch.
    """
    for node in [node for node in model.graph if node.op_type == Placeholder.CROSS_ATTENTION]:
        # One attention reads the cached keys and values, the other computes them.
        query, key, value, *others = node.inputs
        padding, bias, *past = others
        # Products that compute keys and values run in the first call only.
        # Move the nodes that only the operator's keys and values need, in their order.
        targets = {key, value}
        first: list[ir.Node] = []
        users = {node}
        # Backwards, so that a node is removed if all of its readers are.
        for candidate in reversed(list(model.graph)):
            uses = [use for output in candidate.outputs for use in output.uses()]
            read = [use.node in users and (use.node is not node or node.inputs[use.idx] in targets) for use in uses]
            if uses and all(read) and not any(output.is_graph_output() for output in candidate.outputs):
                users.add(candidate)
                first.insert(0, candidate)
        model.graph.remove(first)
        cached_attention, first_attention = (
            node_like(
                node, scope, "MultiHeadAttention", [query, *keys, None, padding, bias], node.attributes, MICROSOFT
            )
            for scope, keys in (("cached", past), ("first", (key, value)))
        )
        # An empty tensor in place of keys or values that the client keeps.
        nothing: list[ir.Node] = []
        for index, past_value in enumerate(past):
            _, heads, _, size = past_value.shape
            empty = ir.Tensor(np.zeros((0, int(heads), 1, int(size)), np.float32))
            nothing.append(node_like(node, f"nothing_{index}", "Constant", [], {"value": empty}))
        cached_nodes, computed = [cached_attention, *nothing], [first_attention.outputs[0], key, value]
        branches = {
            "then_branch": _branch(cached_attention, cached_nodes, [source.outputs[0] for source in cached_nodes]),
            "else_branch": _branch(first_attention, [*first, first_attention], computed),
        }
        conditional = node_like(node, "If", "If", [cached], branches, outputs=3)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [conditional], node.outputs, conditional.outputs
        )


def _branch(last: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Graph:
    """Return a branch of an `If`."""
    return ir.Graph([], outputs, nodes=nodes, name=(last.name or "").replace("/", "."))
