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
    """Fold lookups at index zero into another lookup that they are added to, in place; return how many.

    An encoder that is exported for single texts looks up token type 0 for every token. That row is a constant. Adding
    it to each position embedding once saves the lookup, its index arithmetic and an addition in each call.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        # A lookup in a stored table whose index is zero for every token.
        if node.op_type != "Gather" or constant(node.inputs[0]) is None or not _is_zero(node.inputs[1]):
            continue
        if _fold_lookup(graph, node, count):
            count += 1
    if count:
        clean(model)
    return count


def _is_zero(value: ir.Value | None) -> bool:
    """Return whether a value is zero everywhere, through operators that only move values."""
    array = constant(value)
    if array is not None:
        return not array.any()
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in _PASSES_ZEROS_ON and _is_zero(node.inputs[0])


def _fold_lookup(graph: ir.Graph, lookup: ir.Node, index: int) -> bool:
    """``Add(Add(words, types[0]), positions[i])`` -> ``Add(words, (positions + types[0])[i])``."""
    table = constant(lookup.inputs[0])
    # The lookup must be added to something, and that sum to another lookup, and neither may be read elsewhere.
    uses = list(lookup.outputs[0].uses())
    if table is None or len(uses) != 1 or uses[0].node.op_type != "Add":
        return False
    inner = uses[0].node
    words = inner.inputs[1 - uses[0].idx]
    outer_uses = list(inner.outputs[0].uses())
    if words is None or len(outer_uses) != 1 or outer_uses[0].node.op_type != "Add":
        return False
    outer = outer_uses[0].node
    other_term = outer.inputs[1 - outer_uses[0].idx]
    positions = other_term.producer() if other_term is not None else None
    if positions is None or positions.op_type != "Gather" or len(list(positions.outputs[0].uses())) != 1:
        return False
    rows = constant(positions.inputs[0])
    source = positions.inputs[0]
    if rows is None or source is None or rows.ndim != 2 or rows.shape[1] != table.shape[-1]:
        return False
    # The row is added to every position embedding once, at export.
    merged = add_initializer(graph, f"{source.name}.with_token_type_{index}", rows + table[0])
    positions.replace_input_with(0, merged)
    inner.outputs[0].replace_all_uses_with(words)
    return True


def split_skip_normalization(model: ir.Model) -> int:
    """Replace each `SkipLayerNormalization` whose other outputs are unused, in place; return how many.

    ONNX Runtime's CPU kernel adds and sums in scalar code. `LayerNormalization` is vectorised, and the preceding matrix
    product takes over the bias addition. On short inputs through an int8 student this saved a quarter of the latency
    (measured with ONNX Runtime 1.32; see docs/architecture.md).
    """
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "SkipLayerNormalization" or any(output.uses() for output in node.outputs[1:]):
            continue
        # Without a beta the node has no equivalent in `LayerNormalization` here.
        if len(node.inputs) < 4:
            continue
        _split(graph, node)
        count += 1
    if count:
        clean(model)
    return count


def _split(graph: ir.Graph, node: ir.Node) -> None:
    """Write one node as `Add` of the bias, `Sum` of the residual and `LayerNormalization`."""
    product, skip, gamma, beta = node.inputs[:4]
    bias = node.inputs[4] if len(node.inputs) > 4 else None
    old = node.outputs[0]
    added = []
    if bias is not None:
        added.append(ir.node("Add", [product, bias]))
        product = added[-1].outputs[0]
    # `Sum` instead of `Add` keeps ONNX Runtime from fusing the pair again.
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
    # A graph output keeps its name, so the new value takes it over.
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
    """Move a `Gather` of one token up through position-wise nodes, in place; return how many it passed.

    A classifier reads one token of the last hidden states. Everything after the last attention computes each token
    separately, so it is only needed for that token. This is exact and saves most of the last layer. Hidden states
    [batch, length, width] become [batch, width] behind the new `Gather`.
    """
    graph = model.graph
    select = next((node for node in graph if _selects_one_token(node)), None)
    if select is None or select.inputs[0] is None:
        return 0
    last = select.inputs[0]
    moved = _only_feeding(last, select)
    chosen: dict[ir.Value, ir.Value] = {}
    # Each computed input from outside the moved nodes is reduced to the token, once for all readers.
    for node in moved:
        for position, value in enumerate(node.inputs):
            if value is None or constant(value) is not None or value.producer() in moved:
                continue
            if value not in chosen:
                chosen[value] = _select(graph, select, value, len(chosen))
            node.replace_input_with(position, chosen[value])
        # The length axis is gone, so recorded shapes no longer hold.
        for output in node.outputs:
            output.shape = None
    if moved:
        select.outputs[0].replace_all_uses_with(last)
        graph.remove(select, safe=True)
        clean(model)
    return len(moved)


def _selects_one_token(node: ir.Node) -> bool:
    """Return whether a node is a `Gather` along the length axis with a scalar constant index."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1 or node.outputs[0].is_graph_output():
        return False
    index = constant(node.inputs[1])
    return index is not None and index.ndim == 0


def _only_feeding(last: ir.Value, select: ir.Node) -> dict[ir.Node, None]:
    """Return position-wise nodes whose outputs reach nothing but ``select``, in a deterministic order."""
    moved: dict[ir.Node, None] = {}
    pending = [last.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in moved or node.op_type not in _POSITION_WISE:
            continue
        readers = {usage.node for output in node.outputs for usage in output.uses()}
        # A node that the rest of the graph reads must keep all tokens.
        outward = any(output.is_graph_output() for output in node.outputs)
        if outward or not readers <= {*moved, select} or not _keeps_last_axis(node):
            continue
        moved[node] = None
        pending += [value.producer() for value in node.inputs if value is not None]
    return moved


def _keeps_last_axis(node: ir.Node) -> bool:
    """Return whether constant operands apply along the last axis, so that a leading axis may be dropped."""
    limit = 2 if node.op_type == "MatMul" else 1
    arrays = [array for value in node.inputs if (array := constant(value)) is not None]
    return all(array.ndim <= limit for array in arrays)


def _select(graph: ir.Graph, select: ir.Node, value: ir.Value, index: int) -> ir.Value:
    """Add a `Gather` of the token of ``value`` and return its output."""
    node = ir.node("Gather", [value, select.inputs[1]], attributes={"axis": 1}, name=f"first_token_{index}")
    output = node.outputs[0]
    output.name, output.type = f"first_token_{index}", value.type
    if value.shape is not None and len(value.shape) == 3:
        output.shape = ir.Shape([value.shape[0], value.shape[2]])
    graph.append(node)
    return output


def pool_globally(model: ir.Model) -> int:
    """Replace each `ReduceMean` over height and width that keeps its axes by `GlobalAveragePool`; return how many.

    Runtimes keep a `GlobalAveragePool` in the layout and the type of the image. For a `ReduceMean` ONNX Runtime first
    reorders blocked channels, and transposes 8-bit images and converts them to float.
    """
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
    """Return whether a node is a mean over the last two of four axes that keeps them."""
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
"""Rewrites in the order in which they are applied; each works without the others."""


def optimize_graph(model: ir.Model, leave_out: Collection[str] = ()) -> dict[str, int]:
    """Apply every rewrite except those in ``leave_out``, in place; return how often each one matched."""
    return {name: rewrite(model) for name, rewrite in REWRITES.items() if name not in leave_out}
