"""Attention of a decoder to what its encoder gave, as in optimum's merged decoders: prompt and tokens in one graph.

Inputs `input_ids` [batch, length], `encoder_hidden_states` [batch, positions, hidden], for text
`encoder_attention_mask` [batch, positions], `past_key_values.N.decoder.key`, `.decoder.value`, `.encoder.key`,
`.encoder.value` [batch, heads, past, size] and `use_cache_branch` [1]; outputs `logits` [batch, length, vocabulary]
and `present.` for each `past_key_values.`.

With `use_cache_branch` false the past is empty, and keys and values of the encoder are made of `encoder_hidden_states`.
With true those of the past are used as they are, and the outputs in their place are empty: a client keeps those it has,
which spares it a copy of megabytes for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.decoder import tracing_patches
from compress.formats.onnx.decoder.nodes import MICROSOFT, node_like

_KIND = "MultiHeadAttention"


def write_cross_attention(model: ir.Model, cached: ir.Value) -> None:
    """Write every `plug.CROSS_ATTENTION` as an `If` on ``cached``, in place.

    What only the first call needs, from the products that make keys and values on, moves into its branch.
    """
    for node in [node for node in model.graph if node.op_type == tracing_patches.CROSS_ATTENTION]:
        query, key, value, *others = node.inputs
        padding, bias, *past = others
        first = _taken_out(model.graph, node, {key, value})
        again, anew = (
            node_like(node, scope, _KIND, [query, *keys, None, padding, bias], node.attributes, MICROSOFT)
            for scope, keys in (("cached", past), ("first", (key, value)))
        )
        nothing = [_nothing(node, index, one) for index, one in enumerate(past)]
        branches = {
            "then_branch": _branch(again, [again, *nothing], [one.outputs[0] for one in (again, *nothing)]),
            "else_branch": _branch(anew, [*first, anew], [anew.outputs[0], key, value]),
        }
        made = node_like(node, "If", "If", [cached], branches, outputs=3)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [made], node.outputs, made.outputs)


def _taken_out(graph: ir.Graph, node: ir.Node, wanted: set[ir.Value | None]) -> list[ir.Node]:
    """The nodes that nothing but ``wanted`` of ``node`` needs, taken out of the graph in their order."""
    found: list[ir.Node] = []
    users = {node}
    for one in reversed(list(graph)):
        uses = [use for output in one.outputs for use in output.uses()]
        read = [use.node in users and (use.node is not node or node.inputs[use.idx] in wanted) for use in uses]
        if uses and all(read) and not any(output.is_graph_output() for output in one.outputs):
            users.add(one)
            found.insert(0, one)
    graph.remove(found)
    return found


def _nothing(node: ir.Node, index: int, past: ir.Value) -> ir.Node:
    """An empty tensor in the place of keys or values that a client has."""
    _, heads, _, size = past.shape
    empty = ir.Tensor(np.zeros((0, int(heads), 1, int(size)), np.float32))
    return node_like(node, f"nothing_{index}", "Constant", [], {"value": empty})


def _branch(last: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Graph:
    return ir.Graph([], outputs, nodes=nodes, name=(last.name or "").replace("/", "."))
