"""Conversion of a trace without weights to a graph: every block is written, and placeholders are replaced.

A decoder without an encoder has the inputs `input_ids` and `attention_mask` [batch, length and total length],
`past_key_values.N.key` and `.value` [batch, heads, past, size], `past_conv.N` and `past_recurrent.N`, and the
outputs `logits` [batch, length, vocabulary] and a `present` for each past, as transformers.js and onnxruntime-genai
expect. Positions follow from the mask. Rows of a batch may be padded on the right. The attention kernel would read
padding on the left as text, so the node `padding_on_the_left_is_refused` fails on it. For a decoder with an encoder
see `compress.formats.onnx.decoder.graph_builder`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.generation.decoder import present_of
from compress.formats.onnx.decoder.caches import CROSS, layer_index
from compress.formats.onnx.decoder.graph_builder import (
    RECURRENCES,
    GraphBuilder,
    combine_experts,
    route_to_expert,
    write_cross_attention,
    write_lengths,
    write_rotary,
)
from compress.formats.onnx.decoder.rewrites import (
    NodeGroups,
    find_mixtures,
    group_linear_layers,
    string_attribute,
    tidy,
)
from compress.formats.onnx.decoder.trace import Trace
from compress.formats.onnx.decoder.traced_parts import BATCH, CACHED, IDS, Axes
from compress.formats.onnx.decoder.tracing_patches import DOMAIN, Placeholder
from compress.formats.onnx.decoder.weights import GraphSettings, Weights
from compress.formats.onnx.model import SHARED_CACHE
from compress.models.checkpoint import Checkpoint
from compress.utils.errors import ModelError

_SCOPES = "pkg.torch.onnx.name_scopes"


def write_graph(checkpoint: Checkpoint, trace: Trace, settings: GraphSettings) -> onnx.ModelProto:
    """Return the graph of a checkpoint. Raises `ModelError` for weights that are missing or do not fit."""
    if settings.expand_on_load and any(node.op_type == Placeholder.EXPERT_INPUT for node in trace.program.graph):
        raise ModelError(
            "Experts cannot be expanded when the graph is opened.",
            where="expand_on_load",
            expected="a dense model",
            hint="leave expand_on_load out",
        )
    return ir.to_proto(_Writer(checkpoint, trace, settings).write())


class _Writer:
    """Copy of the trace into a new graph, with every placeholder replaced."""

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
        """Write the whole graph."""
        graph, groups, part = self._trace.program.graph, self._trace.groups, self._trace.part
        # Inputs of the new graph take the place of the trace's.
        inputs = {value.name: value for value in graph.inputs}
        for name, (dtype, axes) in part.inputs.items():
            new = self._values[inputs[name]] = self._nodes.input(name, dtype, axes)
            new.shape = inputs[name].shape
        for name, value in graph.initializers.items():
            tensor, parameter_name = value.const_value, name.removeprefix("model.")
            # A constant that belongs to the model is the checkpoint's tensor.
            if parameter_name in self._checkpoint.files and tensor.dtype == ir.DataType.FLOAT:
                self._values[value] = self._weights.vector(parameter_name)
            else:
                self._values[value] = self._nodes.constant(f"constants.{name}", tensor.numpy())
            self._values[value].shape = ir.Shape(tensor.shape)
        # The nodes before the blocks and the blocks, then those after them.
        presents = self._blocks(groups, inputs)
        self._replay(groups.after)
        cached = None if part.decoder_only or not part.cached else self._nodes.input(CACHED, ir.DataType.BOOL, [1])
        answer = next(value for value in graph.outputs if value.name == part.output)
        # With `last_token_only` the logits have a single position.
        axes = [BATCH, 1] if self._settings.last_token_only and part.cached else part.axes
        results: dict[str, tuple[ir.Value, Axes]] = {part.output: (self._values[answer], [*axes, _size(answer)])}
        for name, value in presents.items():
            axes = part.axes_of(name, self._trace.states[name], "present")
            results[present_of(self._client_name(name))] = value, axes
        for name, (value, axes) in results.items():
            # An input, or a value that is an output already, cannot be renamed to the output.
            if value.producer() is None or value in self._nodes.outputs:
                value = self._nodes.op("Identity", f"{value.name}.output", [value])
            self._nodes.output(value, name, ir.DataType.FLOAT, axes)
        # The attention kernel writes new keys and values behind the old ones where both are one buffer.
        shared = part.decoder_only and not (part.takes_positions or self._trace.unfused or self._trace.keeps_states)
        model = self._nodes.model(type(self._trace.model).__name__, {SHARED_CACHE: "1"} if shared else {})
        # Cross attention becomes an `If` only after the rewrites, which do not enter branches.
        tidy(model, part.cached and not part.takes_positions)
        if cached is not None:
            write_cross_attention(model, cached)
        # Shapes of the trace are replaced by the named axes that clients expect.
        for value in model.graph.inputs:
            if value.name in part.inputs:
                value.shape = ir.Shape(part.inputs[value.name][1])
        return model

    def _table_of(self, module: str) -> str:
        """Return the module that stores the table of ``module``: the one that it is tied to, unless the two differ."""
        weight_name = f"{module}.weight"
        source = self._trace.model.all_tied_weights_keys.get(weight_name)
        if source is None:
            return module
        # A checkpoint may store a tied table twice, or store different values in spite of the config.
        held = [name for name in (weight_name, source) if name in self._checkpoint.files]
        values = [self._checkpoint.stored(name) for name in held] if len(held) > 1 else []
        separate = held == [weight_name] or (values and not values[0].equal(values[1]))
        return module if separate else str(source).removesuffix(".weight")

    def _blocks(self, groups: NodeGroups, inputs: Mapping[str | None, ir.Value]) -> dict[str, ir.Value]:
        """Write every block; return the updated value of each tensor of the cache by its name in the trace."""
        trace = self._trace
        outputs = {value.name: value for value in trace.program.graph.outputs}
        pasts = {
            name: self._nodes.input(self._client_name(name), ir.DataType.FLOAT, trace.part.axes_of(name, shape, "past"))
            for name, shape in trace.states.items()
        }
        self._values |= {inputs[name]: value for name, value in pasts.items() if name in inputs}
        self._replay(groups.before)
        presents: dict[str, ir.Value] = {}
        for index, block in enumerate(trace.blocks):
            # A block that was not traced is written from the nodes of the block that it resembles, with its own names.
            kind = index if index < trace.traced else block.kind
            traced = {name: re.sub(r"\d+", str(kind), name, count=1) for name in pasts if layer_index(name) == index}
            self._values |= {inputs[traced_name]: pasts[name] for name, traced_name in traced.items()}
            # Names of the traced block are replaced by those of the written one.
            self._rename = partial(_moved, trace.blocks[kind].prefix, block.prefix)
            self._replay(groups.blocks[kind])
            self._stream = self._values[groups.left[kind]]
            presents |= {name: self._values[outputs["present" + o.removeprefix("past")]] for name, o in traced.items()}
        # The nodes after the blocks read the hidden states of the last one.
        self._rename = str
        self._values[groups.left[trace.traced - 1]] = self._values[groups.left[kind]]
        return presents

    def _client_name(self, name: str) -> str:
        """Return the name that clients use for a tensor of the cache.

        It is `past_key_values.N.key` for keys and values, `past_conv.N` and `past_recurrent.N` for states. With an
        encoder it is `past_key_values.N.decoder.key`, and `.encoder.key` for keys of the encoder's output.
        """
        _, kind, layer, *number = name.split("_")
        if not kind.endswith(("key", "value")):
            return ".".join([f"past_{kind}", layer, *(index for index in number if index != "0")])
        side = "encoder." if kind.startswith(CROSS) else "decoder."
        return f"past_key_values.{layer}.{'' if self._trace.part.decoder_only else side}{kind.removeprefix(CROSS)}"

    def _replay(self, nodes: Sequence[ir.Node]) -> None:
        """Write nodes of the trace; linear layers with the same input are joined."""
        joined = group_linear_layers(nodes) if self._trace.part.decoder_only else {node: [node] for node in nodes}
        gives = {give: (take, parts) for take, parts, give in find_mixtures(nodes)}
        inside = {node for take, parts in gives.values() for node in (take, *parts)}
        for node in nodes:
            if node in gives:
                self._mixture(*gives[node], node)
            elif node not in inside and joined.get(node, [node])[0] is node:
                self._write_node(node, joined)

    def _write_node(self, node: ir.Node, joined: Mapping[ir.Node, Sequence[ir.Node]]) -> None:
        """Write one node, or the nodes that its placeholder stands for."""
        # The trace has identities between modules, which are dropped.
        if node.op_type == "Identity":
            self._values[node.outputs[0]] = self._values[node.inputs[0]]
            return
        reads_mask = self._trace.part.takes_positions
        placeholder = node.op_type if node.domain == DOMAIN and node.op_type != Placeholder.CROSS_ATTENTION else ""
        # The new graph's values for a traced node's inputs.
        inputs = [None if value is None else self._values[value] for value in node.inputs]
        present_inputs, scope = [value for value in inputs if value is not None], self._rename(_module(node))
        writers: dict[str, Callable[[], Sequence[ir.Value]]] = {
            Placeholder.PARAMETER: lambda: [self._weights.vector(self._rename(string_attribute(node, "name")))],
            Placeholder.LINEAR: lambda: self._products(joined[node]),
            Placeholder.EMBEDDING: lambda: [self._rows(node)],
            # Where positions are an input, the attention reads the mask itself.
            Placeholder.LENGTHS: lambda: (
                2 * present_inputs if reads_mask else write_lengths(self._nodes, *present_inputs)
            ),
            Placeholder.ROTARY: lambda: write_rotary(self._nodes, node, self._tables),
            Placeholder.BLOCK_INPUT: lambda: [self._stream] if self._stream is not None else present_inputs,
            **dict.fromkeys((Placeholder.BLOCK_OUTPUT, Placeholder.SHARED_OUTPUT), lambda: present_inputs),
            **{kind: partial(write, self._nodes, scope, present_inputs) for kind, write in RECURRENCES.items()},
            "": lambda: self._nodes.copy(node, scope or "graph", inputs, self._values),
        }
        olds = [layer.outputs[0] for layer in joined[node]] if placeholder == Placeholder.LINEAR else node.outputs
        for old, new in zip(olds, writers[placeholder](), strict=True):
            self._values[old] = new
            if placeholder in ("", Placeholder.EMBEDDING, Placeholder.LINEAR, *RECURRENCES):
                new.shape, new.type = old.shape, old.type

    def _products(self, layers: Sequence[ir.Node]) -> Sequence[ir.Value]:
        """Return the products of layers with the same input, as one product where their weights can be joined."""
        modules = [self._rename(string_attribute(layer, "module")) for layer in layers]
        value = self._values[layers[0].inputs[0]]
        if modules == [self._head]:
            return [self._logits(value)]
        scope, leaves = modules[0].rpartition(".")[0], [module.rpartition(".")[2] for module in modules]
        products = self._weights.project(scope, leaves, value, bool(layers[0].attributes["transposed"].as_int()))
        if len(products) == len(layers):
            return products
        # The joined product is split into the outputs of its layers.
        inputs = [products[0], self._nodes.integers(*(_size(layer.outputs[0]) for layer in layers))]
        return self._nodes.several("Split", f"{scope}.apart", inputs, len(layers), axis=-1)

    def _logits(self, value: ir.Value) -> ir.Value:
        """Return the logits of ``value``, of the last token alone if the settings say so."""
        if self._settings.last_token_only:
            bounds = [self._nodes.integers(bound) for bound in (-1, np.iinfo(np.int64).max, 1)]
            value = self._nodes.op("Slice", f"{self._head}.last", [value, *bounds])
        if self._trace.part.tokens != IDS and not self._checkpoint.holds(self._head_bias):
            # Nothing is looked up in this graph, so that the table is stored as products take it.
            scope, _, leaf = self._head_table.rpartition(".")
            return self._weights.project(scope, [leaf], value)[0]
        return self._weights.head(self._head_table, value, self._head_bias)

    def _rows(self, node: ir.Node) -> ir.Value:
        """Return the rows of an embedding table."""
        module, ids = self._table_of(self._rename(string_attribute(node, "module"))), self._values[node.inputs[0]]
        table: Any = self._trace.model.get_submodule(string_attribute(node, "module"))
        # A table of positions that is read completely is a constant.
        if ids.const_value is not None and np.array_equal(ids.const_value.numpy(), np.arange(table.num_embeddings)):
            return self._weights.vector(f"{module}.weight")  # every row in its place
        return self._weights.look_up(module, ids, module == self._head_table != self._head)

    def _mixture(self, take: ir.Node, parts: Sequence[ir.Node], give: ir.Node) -> None:
        """Write every expert, each for the rows that are routed to it, from the nodes of the traced first one."""
        hidden, chosen, shares = (self._values[give.inputs[index]] for index in (1, 2, 3))
        module, outer = self._rename(string_attribute(give, "module")), self._rename
        expert_outputs = []
        for number in range(give.attributes["count"].as_int()):
            name = f"{module}.{number}"
            sent = route_to_expert(self._nodes, name, number, hidden, chosen, shares)
            # The traced nodes of the first expert are written again with the names of this one.
            self._values[take.outputs[0]] = sent.rows
            self._rename = partial(_moved, f"{string_attribute(give, 'module')}.0", name)
            self._replay(parts)
            expert_outputs.append((sent, self._values[give.inputs[0]]))
        self._rename = outer
        self._values[give.outputs[0]] = combine_experts(self._nodes, module, hidden, expert_outputs)
        self._values[give.outputs[0]].shape = give.outputs[0].shape


def _module(node: ir.Node) -> str:
    """Return the module that a traced node belongs to."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]).removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""


def _moved(old: str, new: str, name: str) -> str:
    """Return ``name`` with the prefix ``old`` replaced by ``new``."""
    return new + name.removeprefix(old) if name.startswith(f"{old}.") else name


def _size(value: ir.Value) -> int:
    """Return the size of the last axis."""
    return int(value.shape[-1])
