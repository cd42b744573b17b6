"""Graph rewrites that make an exported model smaller and faster. Each is exact up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from compress.formats.onnx.graph_edits import (
    MICROSOFT,
    NodeWriter,
    add_initializer,
    clean,
    constant,
    only_consumer,
    other_operand,
    producer,
    rank,
    replace_node,
)

_PASSES_ZEROS_ON = (
    *("Expand", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "GatherElements", "Gather"),
)


def fold_constant_embeddings(model: ir.Model) -> int:
    """Fold lookups at index zero into another lookup that they are added to, in place; return how many.

    ``Add(Add(words, types[0]), positions[i])`` becomes ``Add(words, (positions + types[0])[i])``. An encoder that is
    exported for single texts looks up token type 0 for every token. That row is a constant. Adding it to each position
    embedding once saves the lookup, its index arithmetic and an addition in each call.
    """
    graph, count = model.graph, 0
    for lookup in list(graph):
        # A lookup in a stored table whose index is zero for every token.
        table = constant(lookup.inputs[0]) if lookup.op_type == "Gather" else None
        if table is None or not _is_zero(lookup.inputs[1]):
            continue
        # The lookup must be added to something, and that sum to another lookup, and neither may be read elsewhere.
        inner = only_consumer(lookup.outputs[0], "Add")
        outer = None if inner is None else only_consumer(inner.outputs[0], "Add")
        if inner is None or outer is None:
            continue
        words = other_operand(inner, lookup.outputs[0])
        positions = producer(other_operand(outer, inner.outputs[0]), "Gather")
        source = positions.inputs[0] if positions is not None and len(positions.outputs[0].uses()) == 1 else None
        rows = constant(source)
        if words is None or positions is None or source is None or rows is None:
            continue
        if rows.ndim == 2 and rows.shape[1] == table.shape[-1]:
            # The row is added to every position embedding once, at export.
            merged = add_initializer(graph, f"{source.name}.with_token_type_{count}", rows + table[0])
            positions.replace_input_with(0, merged)
            inner.outputs[0].replace_all_uses_with(words)
            count += 1
    if count:
        clean(model)
    return count


def _is_zero(value: ir.Value | None) -> bool:
    """Return whether a value is zero everywhere, through operators that only move values."""
    array = constant(value)
    if array is not None:
        return not array.any()
    node = producer(value, *_PASSES_ZEROS_ON)
    return node is not None and _is_zero(node.inputs[0])


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
        product, skip, gamma, beta, bias = (*node.inputs, None)[:5]
        added = []
        if bias is not None:
            added.append(ir.node("Add", [product, bias]))
            product = added[-1].outputs[0]
        # `Sum` instead of `Add` keeps ONNX Runtime from fusing the pair again.
        total = ir.node("Sum", [product, skip])
        attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
        norm = ir.node("LayerNormalization", [total.outputs[0], gamma, beta], attributes)
        replace_node(graph, node, [*added, total, norm])
        count += 1
    if count:
        clean(model)
    return count


_POSITION_WISE = (
    *("MatMul", "Add", "Sum", "BiasGelu", "Gelu", "FastGelu", "Relu", "Tanh"),
    *("LayerNormalization", "SkipLayerNormalization"),
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
                name = f"first_token_{len(chosen)}"
                gather = ir.node("Gather", [value, select.inputs[1]], attributes={"axis": 1}, name=name)
                chosen[value] = output = gather.outputs[0]
                output.name, output.type = name, value.type
                if value.shape is not None and len(value.shape) == 3:
                    output.shape = ir.Shape([value.shape[0], value.shape[2]])
                graph.append(gather)
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
        if any(output.is_graph_output() for output in node.outputs) or not readers <= {*moved, select}:
            continue
        # Constant operands must apply along the last axis, so that a leading axis may be dropped.
        limit = 2 if node.op_type == "MatMul" else 1
        if all(array.ndim <= limit for value in node.inputs if (array := constant(value)) is not None):
            moved[node] = None
            pending += [value.producer() for value in node.inputs if value is not None]
    return moved


def pool_globally(model: ir.Model) -> int:
    """Replace each `ReduceMean` over height and width that keeps its axes by `GlobalAveragePool`; return how many.

    Runtimes keep a `GlobalAveragePool` in the layout and the type of the image. For a `ReduceMean` ONNX Runtime first
    reorders blocked channels, and transposes 8-bit images and converts them to float.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "ReduceMean" and node.domain in ("", "ai.onnx") else None
        if value is None or rank(value) != 4 or value.dtype != ir.DataType.FLOAT:
            continue
        # The axes are an attribute before opset 18, an input since.
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", ())
        over_image = axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]
        if over_image and node.attributes.get_int("keepdims", 1) == 1:
            replace_node(graph, node, [ir.node("GlobalAveragePool", [value], name=node.name)])
            count += 1
    if count:
        clean(model)
    return count


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


_FLAGS = (("transBatchA", "transA"), ("transBatchB", "transB"))


def unfold_batch_transposes(model: ir.Model) -> int:
    """Put a `Transpose` before each `FusedMatMul` that ONNX Runtime refuses, in place; return how many.

    onnxscript folds a `Transpose` into the operator without checking the other operand's rank. ONNX Runtime only
    transposes batch axes if both operands have the same rank above two. `nn.MultiheadAttention`, which pools in SigLIP,
    has such a product with its weights.
    """
    count = 0
    for node in list(model.graph):
        ranks = [rank(value) for value in node.inputs]
        # ONNX Runtime refuses operands of different or low rank.
        if (
            (node.domain, node.op_type) == (MICROSOFT, "FusedMatMul")
            and any(node.attributes.get_int(batch, 0) for batch, _ in _FLAGS)
            and None not in ranks
            and not (ranks[0] == ranks[1] and (ranks[0] or 0) > 2)
        ):
            _unfold(model.graph, node)
            count += 1
    return count


def _unfold(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose the operands explicitly, and make the node a plain `MatMul` if nothing else is fused into it."""
    for index, (batch, _) in enumerate(_FLAGS):
        value = node.inputs[index]
        if not node.attributes.get_int(batch, 0) or value is None or value.shape is None:
            continue
        # The first axis becomes the last but one.
        order = [*range(1, len(value.shape) - 1), 0, len(value.shape) - 1]
        shape = [value.shape[axis] for axis in order]
        moved = NodeWriter(graph, node, f"{node.name}_{batch}").node("Transpose", [value], shape, perm=order)
        node.replace_input_with(index, moved)
        node.attributes[batch] = ir.AttrInt64(batch, 0)
    if any(node.attributes.get_int(plain, 0) for _, plain in _FLAGS) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return
    # A plain product is what quantizers look for.
    node.op_type, node.domain = "MatMul", ""
    node.attributes.clear()
