"""Attention in the graph of a model that computes it past transformers' interface, found from its softmax.

`MatMul(Softmax(MatMul(Q, Kᵀ) · scale + terms), V)` over heads becomes one operator whose bias is the sum of the terms:
relative positions (MPNet, DeBERTa, Swin v2), masks, or both. A wrong match cannot pass unseen: the export stage proves
the graph equal to torch on padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.attention.tracing import DOMAIN, OPERATOR
from compress.formats.onnx.graph_edits import NodeWriter, clean, constant, only_consumer

MASK_INPUT = "attention_mask"
_TURN = (0, 2, 1, 3)
"""Between [batch, heads, length, size] and [batch, length, heads, size]."""


@dataclass
class _Scores:
    """Walked up from a softmax: ``scale`` of the product ``node``, and what is added, each with a factor.

    ``by``: what each head's are multiplied by, [heads, 1, 1].
    """

    node: ir.Node
    scale: float
    by: ir.Value | None = None
    terms: list[tuple[ir.Value, float]] = field(default_factory=list)


def find_attention(model: ir.Model) -> int:
    """Replace each attention over heads by the operator that `lower` writes, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type == "Softmax" and _replace(graph, node, count):
            count += 1
    if count:
        model.opset_imports[DOMAIN] = 1
        clean(model)
    return count


def count_unfused(model: ir.Model) -> int:
    """Softmaxes whose weights multiply values: attention that is no operator."""
    return sum(node.op_type == "Softmax" and _along_keys(node) and bool(_product_after(node)) for node in model.graph)


def _along_keys(softmax: ir.Node) -> bool:
    return softmax.attributes.get_int("axis", -1) in (-1, (_rank(softmax.outputs[0]) or 0) - 1)


def _product_after(softmax: ir.Node) -> ir.Node | None:
    """The product of weights, which may be reshaped on the way, and values."""
    following = only_consumer(softmax.outputs[0], "MatMul", "FusedMatMul", "Reshape")
    if following is not None and following.op_type == "Reshape":
        following = only_consumer(following.outputs[0], "MatMul", "FusedMatMul")
    return following


def _replace(graph: ir.Graph, softmax: ir.Node, index: int) -> bool:
    weighted, given = _product_after(softmax), softmax.inputs[0]
    if weighted is None or weighted.op_type != "MatMul" or given is None:
        return False
    end = weighted if _rank(weighted.outputs[0]) == 4 else only_consumer(weighted.outputs[0], "Reshape")
    scores = _walk(given)
    if scores is None or end is None or not _along_keys(softmax):
        return False
    query, key, value = (_heads(each) for each in (*scores.node.inputs, weighted.inputs[1]))
    if query is None or key is None or value is None or value.factor != 1:
        return False
    key = key.turned((0, 1, 3, 2))
    heads, size = query.axes[1], value.axes[3]
    if not isinstance(heads, int) or not isinstance(size, int) or not heads == key.axes[1] == value.axes[1]:
        return False
    shape = [query.axes[0], heads, query.axes[2], size]
    if _rank(end.outputs[0]) != 4 or list(end.outputs[0].shape or ())[1::2] != [heads, size]:
        return False
    writer = NodeWriter(graph, end, f"attention_{index}")
    terms = _sorted(graph, scores, writer)
    if terms is None:
        return False
    if scores.by is not None:
        turned = query.turned(_TURN)
        by = writer.node("Reshape", [scores.by, writer.constant(np.array([heads, 1]))], [heads, 1])
        query = _Heads(writer.node("Mul", [_read(writer, turned), by], turned.axes), _TURN, query.factor)
    attended = writer.node(
        OPERATOR,
        [*(_flat(writer, each.turned(_TURN)) for each in (query, key, value)), *terms],
        [shape[0], shape[2], heads * size],
        DOMAIN,
        num_heads=heads,
        scale=scores.scale * query.factor * key.factor,
        unidirectional=0,
    )
    axes = writer.constant(np.array([0, 0, heads, size]))
    split = writer.node("Reshape", [attended, axes], [shape[0], shape[2], heads, size])
    for use in list(end.outputs[0].uses()):
        if use.node.op_type == "Transpose" and tuple(use.node.attributes.get_ints("perm", ())) == _TURN:
            use.node.outputs[0].replace_all_uses_with(split, replace_graph_outputs=True)
    turned = writer.node("Transpose", [split], shape, perm=_TURN)
    end.outputs[0].replace_all_uses_with(turned, replace_graph_outputs=True)
    return True


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


@dataclass(frozen=True)
class _Heads:
    """A tensor of four axes read in another order, and multiplied: ``perm`` of ``source``, times ``factor``."""

    source: ir.Value
    perm: tuple[int, ...]
    factor: float

    @property
    def axes(self) -> list[int | ir.SymbolicDim]:
        """Its shape, as read."""
        return [self.source.shape[axis] for axis in self.perm]

    def turned(self, perm: Sequence[int]) -> _Heads:
        """The same with axes in another order."""
        return _Heads(self.source, tuple(self.perm[axis] for axis in perm), self.factor)


def _heads(value: ir.Value | None) -> _Heads | None:
    """What a product reads, before turns, factors and the merge of batch and heads into one axis."""
    perm, factor = tuple(range(_rank(value) or 0)), 1.0
    while value is not None and (node := value.producer()) is not None:
        number = _number(node)
        if number is not None:
            factor *= number
        elif node.op_type == "Transpose":
            before = node.attributes.get_ints("perm", ())
            perm = tuple(before[axis] for axis in perm)
        elif node.op_type == "Reshape" and len(perm) == 3 and perm[0] == 0 and _rank(node.inputs[0]) == 4:
            perm = (0, 1, perm[1] + 1, perm[2] + 1)
        else:
            break
        value = node.inputs[0]
    return _Heads(value, perm, factor) if value is not None and len(perm) == 4 and _rank(value) == 4 else None


def _number(node: ir.Node) -> float | None:
    """What a node multiplies all of its first input by."""
    factor = constant(node.inputs[1]) if node.op_type in ("Mul", "Div") else None
    if factor is None or factor.size != 1:
        return None
    number = float(factor.reshape(()))
    return 1 / number if node.op_type == "Div" else number


def _walk(value: ir.Value | None, share: float = 1.0) -> _Scores | None:
    """The product that ``value``, times ``share``, is made of by scaling and adding; nothing else may read what lies
    between.
    """
    node = None if value is None else value.producer()
    if value is None or node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    first, second = (*node.inputs, None)[:2]
    if node.op_type == "MatMul":
        computed = all(each is not None and each.const_value is None and _rank(each) in (3, 4) for each in node.inputs)
        return _Scores(node, share) if computed else None
    if (by := _number(node)) is not None:
        return _walk(first, share * by)
    if node.op_type == "Mul" and _of_heads(second):
        found = _walk(first, share)
        if found is None or found.terms or found.by is not None:
            return None
        found.by = second
        return found
    if node.op_type in ("Add", "Sub"):
        subtracted = node.op_type == "Sub"
        for scored, term in ((first, second),) if subtracted else ((first, second), (second, first)):
            if term is not None and (found := _walk(scored, share)) is not None:
                found.terms.append((term, -share if subtracted else share))
                return found
    if node.op_type == "Where":
        return _filled(node, share)
    ranks = _rank(first), _rank(value)
    if node.op_type != "Reshape" or ranks not in ((3, 4), (4, 5), (5, 4)):
        return None
    if ranks == (5, 4):
        return _of_windows(node, first, share)
    found = _walk(first, share)
    if found is not None and ranks == (3, 4):
        # Scores [batch * heads, ...] as [batch, heads, ...], and all that was added to them.
        writer = NodeWriter(node.graph, node, f"{value.name}_split")
        found.terms = [(writer.node("Reshape", [one, node.inputs[1]], value.shape), by) for one, by in found.terms]
    return found


def _of_heads(value: ir.Value | None) -> bool:
    """Whether a tensor has a number for each head, and nothing else: [heads, 1, 1]."""
    axes = () if value is None or value.shape is None else tuple(value.shape)
    return len(axes) == 3 and isinstance(axes[0], int) and axes[1:] == (1, 1)


def _of_windows(node: ir.Node, apart: ir.Value | None, share: float) -> _Scores | None:
    """Scores [pictures * windows, heads, ...] with all that was added to them as [pictures, windows, heads, ...]."""
    found = _walk(apart, share)
    query = None if found is None else _heads(found.node.inputs[0])
    if found is None or query is None:
        return None
    if any(_rank(term) == 5 and not _for_each_window(term) for term, _ in found.terms):
        return None
    writer = NodeWriter(node.graph, node, f"{node.outputs[0].name}_windows")
    terms = []
    for term, factor in found.terms:
        if _rank(term) == 5 and term.shape is not None:
            windows, *_, rows, columns = term.shape[1:]
            all_of_them = writer.node("Shape", [query.source], [1], start=query.perm[0], end=query.perm[0] + 1)
            pictures = writer.node("Div", [all_of_them, writer.constant(np.array([windows]))], [1])
            axes = writer.node("Concat", [pictures, writer.constant(np.ones(4, np.int64))], [5], axis=0)
            for numbers in (all_of_them, pictures, axes):
                numbers.dtype = ir.DataType.INT64
            each = writer.node("Expand", [term, axes], [None, *term.shape[1:]])
            term = writer.node(
                "Reshape", [each, writer.constant(np.array([-1, 1, rows, columns]))], [None, 1, rows, columns]
            )
        terms.append((term, factor))
    found.terms = terms
    return found


def _for_each_window(term: ir.Value) -> bool:
    """Whether a term is [1, windows, 1, queries, keys], the same for every picture and head."""
    axes = () if term.shape is None else tuple(term.shape)
    return all(isinstance(axis, int) for axis in axes) and (axes[0], axes[2]) == (1, 1)


def _filled(node: ir.Node, share: float) -> _Scores | None:
    """Scores that a condition replaces by a value low enough that what they were no longer counts."""
    for place in (1, 2):
        fill = constant(node.inputs[3 - place])
        if fill is None or fill.size != 1 or fill.reshape(()) > -1e4:
            continue
        if (found := _walk(node.inputs[place], share)) is not None:
            writer = NodeWriter(node.graph, node, f"{node.outputs[0].name}_mask")
            zero = writer.constant(np.array(0, np.float32))
            lowest = writer.constant(np.array(np.finfo(np.float32).min))
            parts = [zero, lowest] if place == 1 else [lowest, zero]
            condition = node.inputs[0]
            found.terms.append((writer.node("Where", [condition, *parts], condition and condition.shape), share))
            return found
    return None


def _flat(writer: NodeWriter, heads: _Heads) -> ir.Value:
    """[batch, length, heads * size] of a tensor read as [batch, length, heads, size]."""
    source, axes = _read(writer, heads), heads.axes
    whole = axes[2] * axes[3] if isinstance(axes[2], int) and isinstance(axes[3], int) else None
    return writer.node("Reshape", [source, writer.constant(np.array([0, 0, -1]))], [axes[0], axes[1], whole])


def _read(writer: NodeWriter, heads: _Heads) -> ir.Value:
    """The tensor with its axes in the order in which it is read."""
    if heads.perm == (0, 1, 2, 3):
        return heads.source
    return writer.node("Transpose", [heads.source], heads.axes, perm=heads.perm)


def _sorted(graph: ir.Graph, scores: _Scores, writer: NodeWriter) -> tuple[ir.Value | None, ir.Value | None] | None:
    """Padding [batch, keys] and the sum of all other terms; ``None`` where that hasn't every key of every query."""
    mask = next((value for value in graph.inputs if value.name == MASK_INPUT), None)
    padding, bias, whole = None, None, False
    for term, factor in scores.terms:
        if mask is not None and factor != 0 and _one_row(term) and _comes_from_mask(term, mask):
            padding = mask
            continue
        if factor != 1:
            term = writer.node("Mul", [term, writer.constant(np.array(factor, np.float32))], term.shape)
        whole |= _has_rows(term)
        bias = term if bias is None else writer.node("Add", [bias, term], None)
    if bias is not None and not whole:
        return None
    if bias is not None and bias.shape is not None and len(bias.shape) == 3:
        bias = writer.node("Unsqueeze", [bias, writer.constant(np.array([0]))], [1, *bias.shape])
    if padding is not None:
        cast = writer.node("Cast", [padding], padding.shape, to=ir.DataType.INT32)
        cast.dtype = ir.DataType.INT32
        padding = cast
    return padding, bias


def _one_row(term: ir.Value) -> bool:
    """Whether a term is the same for every head and query."""
    return _rank(term) == 4 and term.shape is not None and term.shape[1] == 1 and term.shape[2] == 1


def _has_rows(term: ir.Value) -> bool:
    return term.shape is not None and len(term.shape) >= 3 and all(axis != 1 for axis in term.shape[-2:])


def _comes_from_mask(value: ir.Value, mask: ir.Value) -> bool:
    """Whether ``value`` is computed from ``mask`` and shapes alone."""
    pending, seen, found = [value], set[int](), False
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        found |= current is mask
        if current.is_graph_input() and current is not mask and current.name != "input_ids":
            return False
        node = current.producer()
        if node is None:
            continue
        if node.op_type in ("MatMul", "Gather", "LayerNormalization"):
            return False
        pending.extend(each for each in node.inputs if each is not None)
    return found
