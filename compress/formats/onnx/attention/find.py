"""Search for attention in ONNX graphs of models that do not compute it by transformers' attention interface.

The search starts at each `Softmax`. `MatMul(Softmax(MatMul(Q, Kᵀ) · scale + terms), V)` over heads becomes one
operator whose bias is the sum of the terms: relative positions (MPNet, DeBERTa), masks, or both. A wrong match is
detected, because the export stage compares the graph with torch on padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.attention.tracing import DOMAIN, OPERATOR
from compress.formats.onnx.graph_edits import NodeWriter, clean, constant, only_consumer, rank

MASK_INPUT = "attention_mask"
_SWAP_AXES = (0, 2, 1, 3)
"""Permutation between [batch, heads, length, size] and [batch, length, heads, size]; size is that of a head."""


@dataclass
class _Scores:
    """Scores before a softmax: ``scale`` times the product ``node`` of Q and Kᵀ, plus terms times their factors."""

    node: ir.Node
    scale: float
    terms: list[tuple[ir.Value, float]] = field(default_factory=list)


def find_attention(model: ir.Model) -> int:
    """Replace each attention over heads by the operator that `lower_attention` expects, in place; return how many."""
    graph, count = model.graph, 0
    # The list is a copy, since nodes are added to the graph meanwhile.
    for node in list(graph):
        if node.op_type == "Softmax" and _replace(graph, node, count):
            count += 1
    if count:
        model.opset_imports[DOMAIN] = 1
        clean(model)
    return count


def count_unfused(model: ir.Model) -> int:
    """Return the number of attentions that are left as separate nodes: a softmax whose result multiplies values."""
    return sum(node.op_type == "Softmax" and _along_keys(node) and bool(_product_after(node)) for node in model.graph)


def _along_keys(softmax: ir.Node) -> bool:
    """Return whether a softmax normalizes over the last axis."""
    return softmax.attributes.get_int("axis", -1) in (-1, (rank(softmax.outputs[0]) or 0) - 1)


def _product_after(softmax: ir.Node) -> ir.Node | None:
    """Return the product of the attention weights, possibly reshaped, and V."""
    following = only_consumer(softmax.outputs[0], "MatMul", "FusedMatMul", "Reshape")
    if following is not None and following.op_type == "Reshape":
        following = only_consumer(following.outputs[0], "MatMul", "FusedMatMul")
    return following


def _replace(graph: ir.Graph, softmax: ir.Node, index: int) -> bool:
    """Replace the attention around ``softmax`` and return True, or return False if it has another form."""
    weighted, score_value = _product_after(softmax), softmax.inputs[0]
    if weighted is None or weighted.op_type != "MatMul" or score_value is None:
        return False
    output = weighted if rank(weighted.outputs[0]) == 4 else only_consumer(weighted.outputs[0], "Reshape")
    # Walk up from the softmax to the product of queries and keys.
    scores = _find_scores(score_value)
    if scores is None or output is None or not _along_keys(softmax):
        return False
    # Q, K and V are read as [batch, heads, length, size], whatever their layout in the graph.
    query, key, value = (_trace_operand(operand) for operand in (*scores.node.inputs, weighted.inputs[1]))
    # Factors of Q and K become part of the scale below. The operator has none for V.
    if query is None or key is None or value is None or value.factor != 1:
        return False
    # The product reads the keys as [batch, heads, size, length].
    key = key.transposed((0, 1, 3, 2))
    # Heads and head size must be fixed, and equal in all three operands.
    heads, size = query.axes[1], value.axes[3]
    if not isinstance(heads, int) or not isinstance(size, int) or not heads == key.axes[1] == value.axes[1]:
        return False
    shape = [query.axes[0], heads, query.axes[2], size]
    # The result must be [batch, heads, length, size] as well.
    if rank(output.outputs[0]) != 4 or list(output.outputs[0].shape or ())[1::2] != [heads, size]:
        return False
    writer = NodeWriter(graph, output, f"attention_{index}")
    # Padding becomes a mask input, all other terms one bias.
    terms = _padding_and_bias(scores, writer)
    if terms is None:
        return False
    operands = [_merge_heads(writer, operand.transposed(_SWAP_AXES)) for operand in (query, key, value)]
    scale, flat_shape = scores.scale * query.factor * key.factor, [shape[0], shape[2], heads * size]
    attributes = {"num_heads": heads, "scale": scale, "unidirectional": 0}
    attended = writer.node(OPERATOR, [*operands, *terms], flat_shape, DOMAIN, **attributes)
    # The operator returns [batch, length, heads * size]; split the heads again for the existing readers. Sizes of 0
    # in a `Reshape` keep those of its input.
    split_shape = writer.constant(np.array([0, 0, heads, size]))
    split = writer.node("Reshape", [attended, split_shape], [shape[0], shape[2], heads, size])
    # Readers that transpose the result back to [batch, length, heads, size] read it directly.
    for use in list(output.outputs[0].uses()):
        if use.node.op_type == "Transpose" and tuple(use.node.attributes.get_ints("perm", ())) == _SWAP_AXES:
            use.node.outputs[0].replace_all_uses_with(split, replace_graph_outputs=True)
    transposed = writer.node("Transpose", [split], shape, perm=_SWAP_AXES)
    output.outputs[0].replace_all_uses_with(transposed, replace_graph_outputs=True)
    return True


@dataclass(frozen=True)
class _Operand:
    """Operand of a product: ``source``, a tensor of four axes, transposed by ``perm`` and multiplied by ``factor``."""

    source: ir.Value
    perm: tuple[int, ...]
    factor: float

    @property
    def axes(self) -> list[int | ir.SymbolicDim]:
        """Shape in the order of ``perm``."""
        return [self.source.shape[axis] for axis in self.perm]

    def transposed(self, perm: Sequence[int]) -> _Operand:
        """Return the tensor with its axes in another order."""
        return _Operand(self.source, tuple(self.perm[axis] for axis in perm), self.factor)


def _trace_operand(value: ir.Value | None) -> _Operand | None:
    """Trace an operand of a product back through transposes, factors and the merge of batch and heads into one axis.

    Returns None if the tensor found does not have four axes.
    """
    perm, factor = tuple(range(rank(value) or 0)), 1.0
    while value is not None and (node := value.producer()) is not None:
        multiplier = _constant_factor(node)
        if multiplier is not None:
            factor *= multiplier
        elif node.op_type == "Transpose":
            node_perm = node.attributes.get_ints("perm", ())
            perm = tuple(node_perm[axis] for axis in perm)
        # [batch * heads, ...] is read as [batch, heads, ...].
        elif node.op_type == "Reshape" and len(perm) == 3 and perm[0] == 0 and rank(node.inputs[0]) == 4:
            perm = (0, 1, perm[1] + 1, perm[2] + 1)
        else:
            break
        value = node.inputs[0]
    return _Operand(value, perm, factor) if value is not None and len(perm) == 4 and rank(value) == 4 else None


def _constant_factor(node: ir.Node) -> float | None:
    """Return the constant by which a `Mul` or `Div` multiplies its first input, or None for other nodes."""
    operand = constant(node.inputs[1]) if node.op_type in ("Mul", "Div") else None
    if operand is None or operand.size != 1:
        return None
    number = float(operand.reshape(()))
    return 1 / number if node.op_type == "Div" else number


def _find_scores(value: ir.Value | None, factor: float = 1.0) -> _Scores | None:
    """Return ``factor`` times ``value`` as scores, traced back to the product of Q and Kᵀ.

    ``factor`` collects the constants by which nodes on the way multiply. Returns None if there is another kind of
    node on the way, or if another node reads a value in between.
    """
    node = None if value is None else value.producer()
    if value is None or node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    first, second = (*node.inputs, None)[:2]
    # The product of Q and Kᵀ ends the search. Its operands must be computed: a constant one is a layer's weight.
    if node.op_type == "MatMul":
        computed = all(
            operand is not None and operand.const_value is None and rank(operand) in (3, 4) for operand in node.inputs
        )
        return _Scores(node, factor) if computed else None
    if (multiplier := _constant_factor(node)) is not None:
        return _find_scores(first, factor * multiplier)
    if node.op_type == "Add":
        # Either operand may be computed from the product.
        for product, term in ((first, second), (second, first)):
            if term is not None and (scores := _find_scores(product, factor)) is not None:
                scores.terms.append((term, factor))
                return scores
    if node.op_type == "Where":
        return _masked_scores(node, factor)
    return _scores_before_reshape(node, factor) if node.op_type == "Reshape" else None


def _scores_before_reshape(node: ir.Node, factor: float) -> _Scores | None:
    """Return scores before a reshape that splits batch and heads, or None for another reshape."""
    (source, shape), value = node.inputs, node.outputs[0]
    scores = _find_scores(source, factor) if (rank(source), rank(value)) == (3, 4) else None
    if scores is not None:
        # The terms were added to scores of [batch * heads, ...]. The operator adds them to [batch, heads, ...].
        # Nodes that are written for a match that fails later have no readers, and `clean` removes them.
        writer = NodeWriter(node.graph, node, f"{value.name}_split")
        scores.terms = [(writer.node("Reshape", [term, shape], value.shape), factor) for term, factor in scores.terms]
    return scores


def _masked_scores(node: ir.Node, factor: float) -> _Scores | None:
    """Return the scores of a `Where` that replaces masked ones by a constant, with the mask as an added term.

    The constant must be so low that the softmax of a masked score is 0.
    """
    # The inputs of `Where` are the condition and two values. Either of these may be the constant.
    for index in (1, 2):
        fill = constant(node.inputs[3 - index])
        if fill is None or fill.size != 1 or fill.reshape(()) > -1e4:
            continue
        if (scores := _find_scores(node.inputs[index], factor)) is not None:
            # For the softmax, the replacement is equivalent to adding 0 or the lowest float.
            writer = NodeWriter(node.graph, node, f"{node.outputs[0].name}_mask")
            zero = writer.constant(np.array(0, np.float32))
            lowest = writer.constant(np.array(np.finfo(np.float32).min))
            addends = [zero, lowest] if index == 1 else [lowest, zero]
            condition = node.inputs[0]
            scores.terms.append((writer.node("Where", [condition, *addends], condition and condition.shape), factor))
            return scores
    return None


def _merge_heads(writer: NodeWriter, operand: _Operand) -> ir.Value:
    """Reshape a tensor that is read as [batch, length, heads, size] to [batch, length, heads * size]."""
    source, axes = _transpose(writer, operand), operand.axes
    width = axes[2] * axes[3] if isinstance(axes[2], int) and isinstance(axes[3], int) else None
    return writer.node("Reshape", [source, writer.constant(np.array([0, 0, -1]))], [axes[0], axes[1], width])


def _transpose(writer: NodeWriter, operand: _Operand) -> ir.Value:
    """Return the tensor with its axes in the order of ``perm``, without its factor."""
    if operand.perm == (0, 1, 2, 3):
        return operand.source
    return writer.node("Transpose", [operand.source], operand.axes, perm=operand.perm)


def _padding_and_bias(scores: _Scores, writer: NodeWriter) -> tuple[ir.Value | None, ir.Value | None] | None:
    """Return the padding mask [batch, keys] and the bias, which is the sum of the other terms.

    Either is None if there is no such term. Returns None for a bias that is not [..., queries, keys], which the
    operator does not accept.
    """
    mask = next((value for value in writer.graph.inputs if value.name == MASK_INPUT), None)
    padding, bias, has_queries_and_keys = None, None, False
    for term, factor in scores.terms:
        axes = () if term.shape is None else tuple(term.shape)
        # A term that is the same for all heads and queries and computed from the mask is padding.
        may_be_padding = mask is not None and factor != 0 and len(axes) == 4 and axes[1] == axes[2] == 1
        if may_be_padding and _comes_from_mask(term, mask):
            # The operator computes the term from the mask itself.
            padding = mask
            continue
        if factor != 1:
            term = writer.node("Mul", [term, writer.constant(np.array(factor, np.float32))], term.shape)
        # The sum has all queries and keys if one term has.
        has_queries_and_keys |= len(axes) >= 3 and all(axis != 1 for axis in axes[-2:])
        bias = term if bias is None else writer.node("Add", [bias, term], None)
    if bias is not None and not has_queries_and_keys:
        return None
    if bias is not None and bias.shape is not None and len(bias.shape) == 3:
        bias = writer.node("Unsqueeze", [bias, writer.constant(np.array([0]))], [1, *bias.shape])
    if padding is not None:
        # The operator's mask is int32.
        cast = writer.node("Cast", [padding], padding.shape, to=ir.DataType.INT32)
        cast.dtype = ir.DataType.INT32
        padding = cast
    return padding, bias


def _comes_from_mask(value: ir.Value, mask: ir.Value | None) -> bool:
    """Return whether ``value`` is computed from ``mask`` and otherwise only from shapes and constants."""
    pending, visited, reaches_mask = [value], set[int](), False
    while pending:
        current = pending.pop()
        if id(current) in visited:
            continue
        visited.add(id(current))
        reaches_mask |= current is mask
        # Exported graphs take batch size and length from the shape of `input_ids`.
        if current.is_graph_input() and current is not mask and current.name != "input_ids":
            return False
        node = current.producer()
        # These operators indicate weights, such as those of relative positions.
        if node is not None and node.op_type in ("MatMul", "Gather", "LayerNormalization"):
            return False
        pending += [operand for operand in (() if node is None else node.inputs) if operand is not None]
    return reaches_mask
