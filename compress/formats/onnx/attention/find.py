"""Search for attention in the graph of a model that computes it without transformers' interface, from its softmax.

`MatMul(Softmax(MatMul(Q, Kᵀ) · scale + terms), V)` over heads becomes one operator whose bias is the sum of the
terms: relative positions (MPNet, DeBERTa), masks, or both. A wrong match is detected, because the export
stage compares the graph with torch on padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.attention.tracing import DOMAIN, OPERATOR
from compress.formats.onnx.graph_edits import NodeWriter, clean, constant, only_consumer, rank

MASK_INPUT = "attention_mask"
_TURN = (0, 2, 1, 3)
"""Permutation between [batch, heads, length, size] and [batch, length, heads, size]."""


@dataclass
class _Scores:
    """Scores before a softmax: ``scale`` of the product ``node``, and added terms, each with a factor."""

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
    """Return the number of softmaxes whose weights multiply values: attention that is no operator."""
    return sum(node.op_type == "Softmax" and _along_keys(node) and bool(_product_after(node)) for node in model.graph)


def _along_keys(softmax: ir.Node) -> bool:
    """Return whether a softmax normalizes over the last axis."""
    return softmax.attributes.get_int("axis", -1) in (-1, (rank(softmax.outputs[0]) or 0) - 1)


def _product_after(softmax: ir.Node) -> ir.Node | None:
    """Return the product of the attention weights, possibly reshaped, and the values."""
    following = only_consumer(softmax.outputs[0], "MatMul", "FusedMatMul", "Reshape")
    if following is not None and following.op_type == "Reshape":
        following = only_consumer(following.outputs[0], "MatMul", "FusedMatMul")
    return following


def _replace(graph: ir.Graph, softmax: ir.Node, index: int) -> bool:
    """Replace the attention around ``softmax`` and return True, or return False if the form is not known."""
    weighted, score_value = _product_after(softmax), softmax.inputs[0]
    if weighted is None or weighted.op_type != "MatMul" or score_value is None:
        return False
    end = weighted if rank(weighted.outputs[0]) == 4 else only_consumer(weighted.outputs[0], "Reshape")
    # Walk up from the softmax to the product of queries and keys.
    scores = _walk(score_value)
    if scores is None or end is None or not _along_keys(softmax):
        return False
    # Q, K and V are read as [batch, heads, length, size], whatever their layout in the graph.
    query, key, value = (_heads(operand) for operand in (*scores.node.inputs, weighted.inputs[1]))
    if query is None or key is None or value is None or value.factor != 1:
        return False
    # The product reads the keys as [batch, heads, size, length].
    key = key.turned((0, 1, 3, 2))
    # Heads and head size must be fixed, and equal in all three operands.
    heads, size = query.axes[1], value.axes[3]
    if not isinstance(heads, int) or not isinstance(size, int) or not heads == key.axes[1] == value.axes[1]:
        return False
    shape = [query.axes[0], heads, query.axes[2], size]
    if rank(end.outputs[0]) != 4 or list(end.outputs[0].shape or ())[1::2] != [heads, size]:
        return False
    writer = NodeWriter(graph, end, f"attention_{index}")
    # Padding becomes a mask input, all other terms one bias.
    terms = _sorted(graph, scores, writer)
    if terms is None:
        return False
    operands = [_flat(writer, operand.turned(_TURN)) for operand in (query, key, value)]
    scale, flat_shape = scores.scale * query.factor * key.factor, [shape[0], shape[2], heads * size]
    attributes = {"num_heads": heads, "scale": scale, "unidirectional": 0}
    attended = writer.node(OPERATOR, [*operands, *terms], flat_shape, DOMAIN, **attributes)
    # The operator returns [batch, length, heads * size]; split the heads again for the existing readers.
    axes = writer.constant(np.array([0, 0, heads, size]))
    split = writer.node("Reshape", [attended, axes], [shape[0], shape[2], heads, size])
    # Readers that transpose the result back to [batch, length, heads, size] read it directly.
    for use in list(end.outputs[0].uses()):
        if use.node.op_type == "Transpose" and tuple(use.node.attributes.get_ints("perm", ())) == _TURN:
            use.node.outputs[0].replace_all_uses_with(split, replace_graph_outputs=True)
    turned = writer.node("Transpose", [split], shape, perm=_TURN)
    end.outputs[0].replace_all_uses_with(turned, replace_graph_outputs=True)
    return True


@dataclass(frozen=True)
class _Heads:
    """A tensor of four axes in another order, times a number: ``perm`` of ``source``, times ``factor``."""

    source: ir.Value
    perm: tuple[int, ...]
    factor: float

    @property
    def axes(self) -> list[int | ir.SymbolicDim]:
        """Shape in the order of ``perm``."""
        return [self.source.shape[axis] for axis in self.perm]

    def turned(self, perm: Sequence[int]) -> _Heads:
        """Return the tensor with its axes in another order."""
        return _Heads(self.source, tuple(self.perm[axis] for axis in perm), self.factor)


def _heads(value: ir.Value | None) -> _Heads | None:
    """Return the operand of a product before transposes, factors and the merge of batch and heads into one axis."""
    perm, factor = tuple(range(rank(value) or 0)), 1.0
    while value is not None and (node := value.producer()) is not None:
        number = _number(node)
        if number is not None:
            factor *= number
        elif node.op_type == "Transpose":
            node_perm = node.attributes.get_ints("perm", ())
            perm = tuple(node_perm[axis] for axis in perm)
        # [batch * heads, ...] is read as [batch, heads, ...].
        elif node.op_type == "Reshape" and len(perm) == 3 and perm[0] == 0 and rank(node.inputs[0]) == 4:
            perm = (0, 1, perm[1] + 1, perm[2] + 1)
        else:
            break
        value = node.inputs[0]
    return _Heads(value, perm, factor) if value is not None and len(perm) == 4 and rank(value) == 4 else None


def _number(node: ir.Node) -> float | None:
    """Return the number by which a node multiplies its first input."""
    factor = constant(node.inputs[1]) if node.op_type in ("Mul", "Div") else None
    if factor is None or factor.size != 1:
        return None
    number = float(factor.reshape(()))
    return 1 / number if node.op_type == "Div" else number


def _walk(value: ir.Value | None, share: float = 1.0) -> _Scores | None:
    """Return the product that ``value``, times ``share``, is computed from by scaling and adding.

    No other node may read the values in between.
    """
    node = None if value is None else value.producer()
    if value is None or node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    first, second = (*node.inputs, None)[:2]
    # The product itself ends the walk; its operands must be computed.
    if node.op_type == "MatMul":
        computed = all(
            operand is not None and operand.const_value is None and rank(operand) in (3, 4) for operand in node.inputs
        )
        return _Scores(node, share) if computed else None
    if (by := _number(node)) is not None:
        return _walk(first, share * by)
    if node.op_type == "Add":
        # Either operand may hold the scores.
        for scored, term in ((first, second), (second, first)):
            if term is not None and (scores := _walk(scored, share)) is not None:
                scores.terms.append((term, share))
                return scores
    if node.op_type == "Where":
        return _filled(node, share)
    return _reshaped(node, share) if node.op_type == "Reshape" else None


def _reshaped(node: ir.Node, share: float) -> _Scores | None:
    """Return scores before a reshape that splits batch and heads, or None for another reshape."""
    source, value = node.inputs[0], node.outputs[0]
    scores = _walk(source, share) if (rank(source), rank(value)) == (3, 4) else None
    if scores is not None:
        # The terms, which are added after it, are reshaped from [batch * heads, ...] to [batch, heads, ...] too.
        writer = NodeWriter(node.graph, node, f"{value.name}_split")
        scores.terms = [(writer.node("Reshape", [term, node.inputs[1]], value.shape), by) for term, by in scores.terms]
    return scores


def _filled(node: ir.Node, share: float) -> _Scores | None:
    """Return scores that a condition replaces by a value low enough to vanish in the softmax."""
    for index in (1, 2):
        # The value must be low enough for every score to vanish beside it.
        fill = constant(node.inputs[3 - index])
        if fill is None or fill.size != 1 or fill.reshape(()) > -1e4:
            continue
        if (scores := _walk(node.inputs[index], share)) is not None:
            # The replacement is equivalent to adding 0 or the lowest float.
            writer = NodeWriter(node.graph, node, f"{node.outputs[0].name}_mask")
            zero = writer.constant(np.array(0, np.float32))
            lowest = writer.constant(np.array(np.finfo(np.float32).min))
            parts = [zero, lowest] if index == 1 else [lowest, zero]
            condition = node.inputs[0]
            scores.terms.append((writer.node("Where", [condition, *parts], condition and condition.shape), share))
            return scores
    return None


def _flat(writer: NodeWriter, heads: _Heads) -> ir.Value:
    """Return [batch, length, heads * size] of a tensor read as [batch, length, heads, size]."""
    source, axes = _read(writer, heads), heads.axes
    width = axes[2] * axes[3] if isinstance(axes[2], int) and isinstance(axes[3], int) else None
    return writer.node("Reshape", [source, writer.constant(np.array([0, 0, -1]))], [axes[0], axes[1], width])


def _read(writer: NodeWriter, heads: _Heads) -> ir.Value:
    """Return the tensor with its axes in the order in which it is read."""
    if heads.perm == (0, 1, 2, 3):
        return heads.source
    return writer.node("Transpose", [heads.source], heads.axes, perm=heads.perm)


def _sorted(graph: ir.Graph, scores: _Scores, writer: NodeWriter) -> tuple[ir.Value | None, ir.Value | None] | None:
    """Return the padding mask [batch, keys] and the sum of the other terms; None if the sum lacks keys or queries."""
    mask = next((value for value in graph.inputs if value.name == MASK_INPUT), None)
    padding, bias, complete = None, None, False
    for term, factor in scores.terms:
        axes = () if term.shape is None else tuple(term.shape)
        # A term that is the same for all heads and queries and computed from the mask is padding.
        same = mask is not None and factor != 0 and len(axes) == 4 and axes[1] == axes[2] == 1
        if same and _comes_from_mask(term, mask):
            padding = mask
            continue
        if factor != 1:
            term = writer.node("Mul", [term, writer.constant(np.array(factor, np.float32))], term.shape)
        # Some term must have every query and key.
        complete |= len(axes) >= 3 and all(axis != 1 for axis in axes[-2:])
        bias = term if bias is None else writer.node("Add", [bias, term], None)
    if bias is not None and not complete:
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
    """Return whether ``value`` is computed only from ``mask`` and shapes."""
    pending, visited, reaches_mask = [value], set[int](), False
    while pending:
        current = pending.pop()
        if id(current) in visited:
            continue
        visited.add(id(current))
        reaches_mask |= current is mask
        if current.is_graph_input() and current is not mask and current.name != "input_ids":
            return False
        node = current.producer()
        # These compute with weights, so the term depends on more than the mask.
        if node is not None and node.op_type in ("MatMul", "Gather", "LayerNormalization"):
            return False
        pending += [operand for operand in (() if node is None else node.inputs) if operand is not None]
    return reaches_mask
