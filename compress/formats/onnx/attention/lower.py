"""Attention of a traced graph as ONNX Runtime's operators: `Attention` where it can project too, `MultiHeadAttention`.

`com.microsoft.Attention` takes packed projections with a bias, with which `MultiHeadAttention` is slow. Its
quantized form is a single integer kernel (`QAttention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.attention.find import MASK_INPUT
from compress.formats.onnx.attention.tracing import BIAS, DOMAIN, OPERATOR, QUERY
from compress.formats.onnx.graph_edits import (
    MICROSOFT,
    add_initializer,
    clean,
    constant,
    input_at,
    only_consumer,
    producer,
    without_absent_end,
)

_MASK_FILL = float(np.finfo(np.float32).min)


def lower_attention(model: ir.Model) -> int:
    """Replace every attention by an operator of ONNX Runtime, in place; return how many.

    Expects a graph in which the three projections are packed into one product.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == OPERATOR]
    # Biases come before the split first, so that the packed product is found with its bias.
    _bias_before_split(graph)
    clean(model)
    casts: dict[ir.Value, ir.Value] = {}
    for index, node in enumerate(attentions):
        _lower(graph, node, index, casts)
    if attentions:
        model.opset_imports.pop(DOMAIN, None)
        model.opset_imports.setdefault(MICROSOFT, 1)
        clean(model)
    return len(attentions)


def _lower(graph: ir.Graph, node: ir.Node, index: int, casts: dict[ir.Value, ir.Value]) -> None:
    """Replace one attention; ``casts`` holds the casts of the mask that were written before."""
    query, key, value, padding, bias = (*node.inputs, None, None)[: BIAS + 1]
    attributes = {"num_heads": node.attributes.get_int("num_heads"), "scale": node.attributes.get_float("scale")}
    causal = node.attributes.get_int("unidirectional", 0)
    attributes |= {"unidirectional": 1} if causal else {}
    if padding is not None:
        # The lowest float hides padding completely; the operator's default is -10000.
        attributes["mask_filter_value"] = _MASK_FILL
        padding = _plain_cast(graph, padding, casts)
    # The operators take [batch, length, heads * size], which the values were before their heads were split.
    flat = [_before_split_heads(operand) for operand in (query, key, value)]
    name, kind = f"attention_{index}", "MultiHeadAttention"
    inputs = [*flat, None, padding, bias]
    # `Attention` has no input for a full bias that its quantized form supports.
    if bias is None and (packed := _packed(flat)) is not None:
        product, added = packed
        kind, inputs = "Attention", [*product.inputs, add_initializer(graph, f"{name}_bias", added), padding]
    else:
        inputs = without_absent_end(inputs)
    fused = ir.node(kind, inputs, attributes=attributes, domain=MICROSOFT, name=name)
    old, new = node.outputs[0], fused.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, fused)
    # The reshapes around the output cancel each other out.
    end = _merged_again(old)
    end.replace_all_uses_with(new, replace_graph_outputs=True)
    if end is not old:
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)


def _plain_cast(graph: ir.Graph, padding: ir.Value, casts: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return the mask as int32, with one cast of the graph input that all attentions share."""
    source: ir.Value | None = padding
    while (cast := producer(source, "Cast")) is not None:
        source = cast.inputs[0]
    if source is None or not source.is_graph_input() or source.name != MASK_INPUT:
        return padding
    if source not in casts:
        cast = ir.node("Cast", [source], attributes={"to": ir.DataType.INT32})
        cast_mask = casts[source] = cast.outputs[0]
        cast_mask.name, cast_mask.dtype, cast_mask.shape = f"{MASK_INPUT}_int32", ir.DataType.INT32, source.shape
        graph.insert_before(graph[0], cast)
    return casts[source]


def _before_split_heads(value: ir.Value | None) -> ir.Value | None:
    """Return ``value`` before reshapes that split its last axis into heads and merged it again."""
    current = value
    while (reshape := producer(current, "Reshape")) is not None:
        current = reshape.inputs[0]
        if current is not None and current.shape is not None and len(current.shape) == 3 and value is not None:
            return current if value.shape is None or current.shape[2] == value.shape[2] else value
    return value


def _merged_again(value: ir.Value) -> ir.Value:
    """Return the value after the last axis of ``value`` was split into heads and merged."""
    split = only_consumer(value, "Reshape")
    merged = only_consumer(split.outputs[0], "Reshape") if split is not None else None
    if merged is None or value.shape is None:
        return value
    end = merged.outputs[0]
    same = end.shape is not None and len(end.shape) == 3 and end.shape[2] == value.shape[2]
    return end if same else value


def _product(value: ir.Value | None) -> ir.Node | None:
    """Return the product with a stored matrix that computes ``value``."""
    node = producer(value, "MatMul")
    return node if node is not None and constant(node.inputs[1]) is not None else None


def _packed(values: Sequence[ir.Value | None]) -> tuple[ir.Node, np.ndarray] | None:
    """Return the product whose split gives three values of one width, in this order, and its bias."""
    split = producer(values[QUERY], "Split")
    if split is None or list(values) != list(split.outputs):
        return None
    # `Attention` needs three projections of one width, each read by the attention alone.
    packed_value, sizes = split.inputs[0], constant(input_at(split, 1))
    if sizes is None or len(set(sizes.tolist())) != 1 or any(len(part.uses()) != 1 for part in split.outputs):
        return None
    bias: np.ndarray | None = np.zeros(int(sizes.sum()), np.float32)
    if (added := producer(packed_value, "Add")) is not None:
        packed_value, bias = added.inputs[0], constant(added.inputs[1])
    product = _product(packed_value)
    return None if product is None or bias is None else (product, bias)


def _bias_before_split(graph: ir.Graph) -> None:
    """Add biases before a split instead of to each part, in place, because the product's kernel fuses one addition."""
    for count, split in enumerate(node for node in list(graph) if node.op_type == "Split"):
        packed_value, widths = split.inputs[0], constant(input_at(split, 1))
        if packed_value is None or widths is None or _product(packed_value) is None:
            continue
        added = [only_consumer(output, "Add") for output in split.outputs]
        biases = [_vector(node, output) for node, output in zip(added, split.outputs, strict=True)]
        if all(bias is None for bias in biases):
            continue
        # Parts without a bias, such as Whisper's keys, get zeros.
        parts = [
            np.zeros(width, np.float32) if bias is None else bias for bias, width in zip(biases, widths, strict=True)
        ]
        packed_bias = add_initializer(graph, f"packed_bias_{count}", np.concatenate(parts))
        total = ir.node("Add", [packed_value, packed_bias], name=f"packed_bias_{count}_add")
        total.outputs[0].type, total.outputs[0].shape = packed_value.type, packed_value.shape
        graph.insert_before(split, total)
        split.replace_input_with(0, total.outputs[0])
        for node, bias, output in zip(added, biases, split.outputs, strict=True):
            if node is not None and bias is not None:
                node.outputs[0].replace_all_uses_with(output)


def _vector(node: ir.Node | None, output: ir.Value) -> np.ndarray | None:
    """Return the bias that an addition gives ``output``, one number for each entry of its last axis."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    array = next((stored_array for value in node.inputs if (stored_array := constant(value)) is not None), None)
    width = None if output.shape is None else output.shape[-1]
    return array if array is not None and array.ndim == 1 and array.shape[0] == width else None
