"""Graph rewrites that make an exported model smaller and faster. Each is exact up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant

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
        if _fold_lookup(graph, node, count):
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


def _fold_lookup(graph: ir.Graph, lookup: ir.Node, index: int) -> bool:
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


def split_skip_normalization(model: ir.Model) -> int:
    """Replace each `SkipLayerNormalization` whose other outputs are unused, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "SkipLayerNormalization" or any(output.uses() for output in node.outputs[1:]):
            continue
        if len(node.inputs) < 4:
            continue
        _split(graph, node)
        count += 1
    if count:
        clean(model)
    return count


def _split(graph: ir.Graph, node: ir.Node) -> None:
    product, skip, gamma, beta = node.inputs[:4]
    bias = node.inputs[4] if len(node.inputs) > 4 else None
    old = node.outputs[0]
    added = []
    if bias is not None:
        added.append(ir.node("Add", [product, bias]))
        product = added[-1].outputs[0]
    added.append(ir.node("Sum", [product, skip]))
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    added.append(
        ir.node(
            "LayerNormalization",
            [added[-1].outputs[0], gamma, beta],
            attributes={"axis": -1, "epsilon": epsilon},
        )
    )
    for new in added:
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, added)
    new = added[-1].outputs[0]
    name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name
    graph.remove(node, safe=True)


_POSITION_WISE = (
    "MatMul",
    "Add",
    "Sum",
    "BiasGelu",
    "Gelu",
    "FastGelu",
    "Relu",
    "Tanh",
    "LayerNormalization",
    "SkipLayerNormalization",
)


def select_first_token_early(model: ir.Model) -> int:
    """Move a `Gather` of one token up through position-wise nodes, in place; returns how many it passed.

    Hidden states [batch, length, width] become [batch, width] where the choice now comes first.
    """
    graph = model.graph
    select = next((node for node in graph if _selects_one_token(node)), None)
    if select is None or select.inputs[0] is None:
        return 0
    last = select.inputs[0]
    moved = _only_feeding(last, select)
    chosen: dict[ir.Value, ir.Value] = {}
    for node in moved:
        for position, value in enumerate(node.inputs):
            if value is None or constant(value) is not None or value.producer() in moved:
                continue
            if value not in chosen:
                chosen[value] = _select(graph, select, value, len(chosen))
            node.replace_input_with(position, chosen[value])
        for output in node.outputs:
            output.shape = None
    if moved:
        select.outputs[0].replace_all_uses_with(last)
        graph.remove(select, safe=True)
        clean(model)
    return len(moved)


def _selects_one_token(node: ir.Node) -> bool:
    """A `Gather` along the length axis with a scalar constant index."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1 or node.outputs[0].is_graph_output():
        return False
    index = constant(node.inputs[1])
    return index is not None and index.ndim == 0


def _only_feeding(last: ir.Value, select: ir.Node) -> dict[ir.Node, None]:
    """Position-wise nodes whose outputs reach nothing but ``select``, in an order that is the same in every process."""
    moved: dict[ir.Node, None] = {}
    pending = [last.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in moved or node.op_type not in _POSITION_WISE:
            continue
        readers = {usage.node for output in node.outputs for usage in output.uses()}
        outward = any(output.is_graph_output() for output in node.outputs)
        if outward or not readers <= {*moved, select} or not _keeps_last_axis(node):
            continue
        moved[node] = None
        pending += [value.producer() for value in node.inputs if value is not None]
    return moved


def _keeps_last_axis(node: ir.Node) -> bool:
    """Whether constant operands are matrices or vectors along the last axis, so that a leading axis may go."""
    limit = 2 if node.op_type == "MatMul" else 1
    arrays = [array for value in node.inputs if (array := constant(value)) is not None]
    return all(array.ndim <= limit for array in arrays)


def _select(graph: ir.Graph, select: ir.Node, value: ir.Value, index: int) -> ir.Value:
    node = ir.node("Gather", [value, select.inputs[1]], attributes={"axis": 1}, name=f"first_token_{index}")
    output = node.outputs[0]
    output.name, output.type = f"first_token_{index}", value.type
    if value.shape is not None and len(value.shape) == 3:
        output.shape = ir.Shape([value.shape[0], value.shape[2]])
    graph.append(node)
    return output


def pool_globally(model: ir.Model) -> int:
    """Replace each `ReduceMean` over the last two of four axes that keeps them, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if not _is_pooling(node):
            continue
        old = node.outputs[0]
        pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        new = pool.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(node, pool)
        name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
        graph.remove(node, safe=True)
        count += 1
    if count:
        clean(model)
    return count


def _is_pooling(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx"):
        return False
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    if node.attributes.get_int("keepdims", 1) != 1 or value.dtype != ir.DataType.FLOAT:
        return False
    # An attribute before opset 18, an input since.
    listed = constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", ())
    return listed is not None and sorted(int(axis) % 4 for axis in listed) == [2, 3]


REWRITES: dict[str, Callable[[ir.Model], int]] = {
    "constant_embeddings": fold_constant_embeddings,
    "skip_normalization": split_skip_normalization,
    "first_token": select_first_token_early,
    "average_pool": pool_globally,
}
"""In the order in which they are applied; each works without the others."""


def optimize_graph(model: ir.Model, leave_out: Collection[str] = ()) -> dict[str, int]:
    """Apply every rewrite but those in ``leave_out``, in place; returns how often each one matched."""
    return {name: rewrite(model) for name, rewrite in REWRITES.items() if name not in leave_out}
