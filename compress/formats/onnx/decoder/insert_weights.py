"""From a trace without weights to a graph: every block written, every name replaced by what it names.

Of a decoder by itself: inputs `input_ids` and `attention_mask` [batch, length and total length],
`past_key_values.N.key` and `.value` [batch, heads, past, size], `past_conv.N` and `past_recurrent.N`; outputs `logits`
[batch, length, vocabulary] and a `present` for each past, as transformers.js and onnxruntime-genai expect them.
Positions follow from the mask. Rows of a batch may be padded on the right; padding on the left, which the attention
kernel would read as text, fails at the node `padding_on_the_left_is_refused`. For a decoder behind an encoder see
`compress.formats.onnx.decoder.macro_ops`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.decoder.caches import CROSS, layer_index
from compress.formats.onnx.decoder.graph_builder import GraphBuilder
from compress.formats.onnx.decoder.macro_ops import (
    RECURRENCES,
    combine_experts,
    route_to_expert,
    write_cross_attention,
    write_lengths,
    write_rotary,
)
from compress.formats.onnx.decoder.node_groups import NodeGroups, find_mixtures, group_linear_layers, string_attribute
from compress.formats.onnx.decoder.rewrites import tidy
from compress.formats.onnx.decoder.trace import Trace
from compress.formats.onnx.decoder.traced_parts import BATCH, CACHED, IDS, Axes
from compress.formats.onnx.decoder.tracing_patches import DOMAIN, Placeholder
from compress.formats.onnx.decoder.weights import GraphSettings, Weights
from compress.formats.onnx.model import SHARED_CACHE
from compress.models.checkpoint import Checkpoint
from compress.runtimes.decoder import present_of
from compress.utils.errors import ModelError

_SCOPES = "pkg.torch.onnx.name_scopes"


def write_graph(checkpoint: Checkpoint, trace: Trace, settings: GraphSettings) -> onnx.ModelProto:
    """The decoder of a checkpoint as a graph. Raises `ModelError` for weights that are not there or don't fit."""
    if settings.expand_on_load and any(node.op_type == Placeholder.EXPERT_INPUT for node in trace.program.graph):
        raise ModelError(
            "Experts cannot be made float when the graph is opened.",
            where="expand_on_load",
            expected="a dense model",
            hint="leave expand_on_load out",
        )
    return ir.to_proto(_Writer(checkpoint, trace, settings).write())


class _Writer:
    """Walks through the trace and puts each node, or what it stands for, into a new graph."""

    def __init__(self, checkpoint: Checkpoint, trace: Trace, settings: GraphSettings) -> None:
        self._trace, self._settings = trace, settings
        self._nodes = GraphBuilder()
        self._checkpoint = checkpoint
        self._weights = Weights(checkpoint, self._nodes, settings, trace.created_tables)
        self._values: dict[ir.Value, ir.Value] = {}
        self._rename: Callable[[str], str] = str
        self._stream: ir.Value | None = None
        self._tables: dict[str, Sequence[ir.Value]] = {}
        head = trace.model.get_output_embeddings()
        (self._head,) = (name for name, module in trace.model.named_modules() if module is head)
        self._head_table = self._table_of(self._head)
        bias = f"{self._head}.bias"  # which BERT's head shares with what it lies in
        self._head_bias = bias if checkpoint.holds(bias) else trace.model.all_tied_weights_keys.get(bias, bias)

    def write(self) -> ir.Model:
        graph, groups, part = self._trace.program.graph, self._trace.groups, self._trace.part
        inputs = {value.name: value for value in graph.inputs}
        for name, (dtype, axes) in part.inputs.items():
            self._values[inputs[name]] = self._nodes.input(name, dtype, axes)
            self._values[inputs[name]].shape = inputs[name].shape
        for name, value in graph.initializers.items():
            self._values[value] = self._stored(name, value.const_value)
            self._values[value].shape = ir.Shape(value.const_value.shape)
        presents = self._blocks(groups, inputs)
        self._replay(groups.after)
        cached = None if part.decoder_only or not part.cached else self._nodes.input(CACHED, ir.DataType.BOOL, [1])
        answer = next(value for value in graph.outputs if value.name == part.output)
        axes = [BATCH, 1] if self._settings.last_token_only and part.cached else part.axes
        made: dict[str, tuple[ir.Value, Axes]] = {part.output: (self._values[answer], [*axes, _size(answer)])}
        for name, value in presents.items():
            made[present_of(self._client_name(name))] = value, part.axes_of(name, self._trace.states[name], "present")
        for name, (value, axes) in made.items():
            self._nodes.output(self._own(value), name, ir.DataType.FLOAT, axes)
        # The attention kernel writes new keys and values behind the old ones where both are one buffer.
        shared = part.decoder_only and not (part.takes_positions or self._trace.unfused or self._trace.keeps_states)
        model = self._nodes.model(type(self._trace.model).__name__, {SHARED_CACHE: "1"} if shared else {})
        tidy(model, part.cached and not part.takes_positions)
        if cached is not None:
            write_cross_attention(model, cached)
        for value in model.graph.inputs:
            if value.name in part.inputs:
                value.shape = ir.Shape(part.inputs[value.name][1])
        return model

    def _stored(self, name: str, value: ir.TensorProtocol) -> ir.Value:
        """A constant of the trace, or what the checkpoint has in the place of one that belongs to the model."""
        own = name.removeprefix("model.")
        if own in self._checkpoint.files and value.dtype == ir.DataType.FLOAT:
            return self._weights.vector(own)
        return self._nodes.constant(f"constants.{name}", value.numpy())

    def _table_of(self, module: str) -> str:
        """The module whose table is stored for ``module``: one that it is tied to, unless the two differ."""
        own = f"{module}.weight"
        source = self._trace.model.all_tied_weights_keys.get(own)
        if source is None:
            return module
        held = [name for name in (own, source) if name in self._checkpoint.files]
        values = [self._checkpoint.stored(name) for name in held] if len(held) > 1 else []
        apart = held == [own] or (values and not values[0].equal(values[1]))
        return module if apart else str(source).removesuffix(".weight")

    def _own(self, value: ir.Value) -> ir.Value:
        """A value that may be called as an output is: one that is no input and no output already."""
        if value.producer() is None or value in self._nodes.outputs:
            return self._nodes.op("Identity", f"{value.name}.output", [value])
        return value

    def _blocks(self, groups: NodeGroups, inputs: Mapping[str | None, ir.Value]) -> dict[str, ir.Value]:
        """Write every block; returns what each input of the cache becomes, by its name in the trace."""
        trace = self._trace
        outputs = {value.name: value for value in trace.program.graph.outputs}
        pasts = {name: self._past(name) for name in trace.states}
        self._values |= {inputs[name]: value for name, value in pasts.items() if name in inputs}
        self._replay(groups.before)
        presents: dict[str, ir.Value] = {}
        for index, block in enumerate(trace.blocks):
            kind = index if index < trace.traced else block.kind
            traced = {name: _of_layer(name, kind) for name in pasts if layer_index(name) == index}
            self._values |= {inputs[other]: pasts[name] for name, other in traced.items()}
            self._rename = partial(_moved, trace.blocks[kind].prefix, block.prefix)
            self._replay(groups.blocks[kind])
            self._stream = self._values[groups.left[kind]]
            presents |= {name: self._values[outputs["present" + o.removeprefix("past")]] for name, o in traced.items()}
        self._rename = str
        self._values[groups.left[trace.traced - 1]] = self._values[groups.left[kind]]
        return presents

    def _past(self, name: str) -> ir.Value:
        axes = self._trace.part.axes_of(name, self._trace.states[name], "past")
        return self._nodes.input(self._client_name(name), ir.DataType.FLOAT, axes)

    def _client_name(self, name: str) -> str:
        """`past_key_values.N.key` for keys and values; `past_conv.N` and `past_recurrent.N` for states.

        Behind an encoder `past_key_values.N.decoder.key`, and `.encoder.key` of what the encoder gave.
        """
        _, kind, layer, *number = name.split("_")
        if not kind.endswith(("key", "value")):
            return ".".join([f"past_{kind}", layer, *(one for one in number if one != "0")])
        side = "encoder." if kind.startswith(CROSS) else "decoder."
        return f"past_key_values.{layer}.{'' if self._trace.part.decoder_only else side}{kind.removeprefix(CROSS)}"

    def _replay(self, nodes: Sequence[ir.Node]) -> None:
        joined = group_linear_layers(nodes) if self._trace.part.decoder_only else {node: [node] for node in nodes}
        gives = {give: (take, parts) for take, parts, give in find_mixtures(nodes)}
        inside = {node for take, parts in gives.values() for node in (take, *parts)}
        for node in nodes:
            if node in gives:
                self._mixture(*gives[node], node)
            elif node not in inside and joined.get(node, [node])[0] is node:
                self._write_node(node, joined)

    def _write_node(self, node: ir.Node, joined: Mapping[ir.Node, Sequence[ir.Node]]) -> None:
        own = node.op_type if node.domain == DOMAIN and node.op_type != Placeholder.CROSS_ATTENTION else ""
        writers: dict[str, Callable[[], Sequence[ir.Value]]] = {
            Placeholder.PARAMETER: lambda: [self._weights.vector(self._rename(string_attribute(node, "name")))],
            Placeholder.LINEAR: lambda: self._products(joined[node]),
            Placeholder.EMBEDDING: lambda: [self._rows(node)],
            Placeholder.LENGTHS: lambda: self._lengths(self._values[node.inputs[0]]),
            Placeholder.ROTARY: lambda: write_rotary(self._nodes, node, self._tables),
            Placeholder.BLOCK_INPUT: lambda: [self._stream or self._values[node.inputs[0]]],
            **dict.fromkeys(
                (Placeholder.BLOCK_OUTPUT, Placeholder.SHARED_OUTPUT), lambda: [self._values[node.inputs[0]]]
            ),
            **dict.fromkeys(RECURRENCES, partial(self._recurrence, node)),
            "": lambda: self._copy(node),
        }
        if node.op_type == "Identity":
            self._values[node.outputs[0]] = self._values[node.inputs[0]]
            return
        olds = [layer.outputs[0] for layer in joined[node]] if own == Placeholder.LINEAR else node.outputs
        for old, new in zip(olds, writers[own](), strict=True):
            self._values[old] = new
            if own in ("", Placeholder.EMBEDDING, Placeholder.LINEAR, *RECURRENCES):
                new.shape, new.type = old.shape, old.type

    def _lengths(self, mask: ir.Value) -> Sequence[ir.Value]:
        """What the attention is told: how long each row is and all are, or, where it reads that itself, the mask."""
        return [mask, mask] if self._trace.part.takes_positions else write_lengths(self._nodes, mask)

    def _copy(self, node: ir.Node) -> Sequence[ir.Value]:
        return self._nodes.copy(node, self._rename(_module(node)) or "graph", self._mapped(node), self._values)

    def _recurrence(self, node: ir.Node) -> Sequence[ir.Value]:
        return RECURRENCES[node.op_type](self._nodes, self._rename(_module(node)), self._mapped(node))

    def _mapped(self, node: ir.Node) -> list[Any]:
        """The new graph's values for a traced node's inputs."""
        return [None if value is None else self._values[value] for value in node.inputs]

    def _products(self, layers: Sequence[ir.Node]) -> Sequence[ir.Value]:
        """The products of layers that are given the same value: one product where their weights are of one kind."""
        modules, value = (
            [self._rename(string_attribute(layer, "module")) for layer in layers],
            self._values[layers[0].inputs[0]],
        )
        if modules == [self._head]:
            return [self._logits(value)]
        scope, leaves = modules[0].rpartition(".")[0], [module.rpartition(".")[2] for module in modules]
        products = self._weights.project(scope, leaves, value, bool(layers[0].attributes["transposed"].as_int()))
        if len(products) == len(layers):
            return products
        inputs = [products[0], self._nodes.integers(*(_size(layer.outputs[0]) for layer in layers))]
        return self._nodes.several("Split", f"{scope}.apart", inputs, len(layers), axis=-1)

    def _logits(self, value: ir.Value) -> ir.Value:
        if self._settings.last_token_only:
            bounds = [self._nodes.integers(bound) for bound in (-1, np.iinfo(np.int64).max, 1)]
            value = self._nodes.op("Slice", f"{self._head}.last", [value, *bounds])
        if self._trace.part.tokens != IDS and not self._checkpoint.holds(self._head_bias):
            # Nothing is looked up in this graph, so that the table is stored as products take it.
            scope, _, leaf = self._head_table.rpartition(".")
            return self._weights.project(scope, [leaf], value)[0]
        return self._weights.head(self._head_table, value, self._head_bias)

    def _rows(self, node: ir.Node) -> ir.Value:
        module, ids = self._table_of(self._rename(string_attribute(node, "module"))), self._values[node.inputs[0]]
        table: Any = self._trace.model.get_submodule(string_attribute(node, "module"))
        if ids.const_value is not None and np.array_equal(ids.const_value.numpy(), np.arange(table.num_embeddings)):
            return self._weights.vector(f"{module}.weight")  # every row in its place
        return self._weights.look_up(module, ids, module == self._head_table != self._head)

    def _mixture(self, take: ir.Node, parts: Sequence[ir.Node], give: ir.Node) -> None:
        """Every expert, each with the rows that are sent to it; written as the first is in the trace."""
        hidden, chosen, shares = (self._values[give.inputs[index]] for index in (1, 2, 3))
        module, outer = self._rename(string_attribute(give, "module")), self._rename
        found = []
        for number in range(give.attributes["count"].as_int()):
            name = f"{module}.{number}"
            sent = route_to_expert(self._nodes, name, number, hidden, chosen, shares)
            self._values[take.outputs[0]] = sent.rows
            self._rename = partial(_moved, f"{string_attribute(give, 'module')}.0", name)
            self._replay(parts)
            found.append((sent, self._values[give.inputs[0]]))
        self._rename = outer
        self._values[give.outputs[0]] = combine_experts(self._nodes, module, hidden, found)
        self._values[give.outputs[0]].shape = give.outputs[0].shape


def _module(node: ir.Node) -> str:
    """The module that a traced node is in."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]).removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""


def _moved(old: str, new: str, name: str) -> str:
    """``name`` below ``new`` where it is below ``old``."""
    return new + name.removeprefix(old) if name.startswith(f"{old}.") else name


def _size(value: ir.Value) -> int:
    """Of the last axis."""
    return int(value.shape[-1])


def _of_layer(name: str, layer: int) -> str:
    past, kind, _, *number = name.split("_")
    return "_".join([past, kind, str(layer), *number])
