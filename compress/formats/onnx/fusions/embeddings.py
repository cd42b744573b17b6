"""Embedding look-ups whose index is always zero, folded into the position embeddings.

An encoder exported for single texts looks up token type 0 for every token. That row is a constant, and adding it to
each position embedding once saves the look-up, its index arithmetic and an addition at each call.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.formats.onnx.fusions.graph import add_initializer, clean, constant

_PASSES_ZEROS_ON = (
    "Expand",
    "Slice",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Identity",
    "Cast",
    "GatherElements",
    "Gather",
)


def fold_constant_embeddings(model: ir.Model) -> int:
    """Fold look-ups at index zero into another look-up that they are added to, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "Gather" or constant(node.inputs[0]) is None or not _is_zero(node.inputs[1]):
            continue
        if _fold(graph, node, count):
            count += 1
    if count:
        clean(model)
    return count


def _is_zero(value: ir.Value | None) -> bool:
    array = constant(value)
    if array is not None:
        return not array.any()
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in _PASSES_ZEROS_ON and _is_zero(node.inputs[0])


def _fold(graph: ir.Graph, lookup: ir.Node, index: int) -> bool:
    """``Add(Add(words, types[0]), positions[i])`` -> ``Add(words, (positions + types[0])[i])``."""
    table = constant(lookup.inputs[0])
    uses = list(lookup.outputs[0].uses())
    if table is None or len(uses) != 1 or uses[0].node.op_type != "Add":
        return False
    inner = uses[0].node
    words = inner.inputs[1 - uses[0].idx]
    outer_uses = list(inner.outputs[0].uses())
    if words is None or len(outer_uses) != 1 or outer_uses[0].node.op_type != "Add":
        return False
    outer = outer_uses[0].node
    other = outer.inputs[1 - outer_uses[0].idx]
    positions = other.producer() if other is not None else None
    if positions is None or positions.op_type != "Gather" or len(list(positions.outputs[0].uses())) != 1:
        return False
    rows = constant(positions.inputs[0])
    source = positions.inputs[0]
    if rows is None or source is None or rows.ndim != 2 or rows.shape[1] != table.shape[-1]:
        return False
    merged = add_initializer(graph, f"{source.name}.with_token_type_{index}", rows + table[0])
    positions.replace_input_with(0, merged)
    inner.outputs[0].replace_all_uses_with(words)
    return True
