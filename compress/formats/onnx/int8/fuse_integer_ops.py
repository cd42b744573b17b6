"""Fusion of dequantize, multiply and add into one integer operator, as ONNX Runtime's quantizer leaves them.

`com.microsoft.Attention` is unpacked before quantization, so that a quantizer sees its product, and packed again
after it. ONNX Runtime fuses `DequantizeLinear` and `MatMul` when it loads a graph, but neither the bias nor
attention. `com.microsoft.MatMulIntegerToFloat` and `QAttention` are the fused operators with the bias.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import (
    MICROSOFT,
    add_initializer,
    clean,
    constant,
    input_at,
    only_consumer,
    other_operand,
    producer,
    rank,
)


class UnpackedAttention(NamedTuple):
    """Names of the nodes that replace one attention; its product with the packed weights keeps its name.

    ``bias`` is the addition after it, ``split`` returns queries, keys and values, ``heads`` is `MultiHeadAttention`.
    """

    product: str
    bias: str
    split: str
    heads: str


def unpack_attention(model: ir.Model) -> list[UnpackedAttention]:
    """Replace each `Attention` of an encoder, in place; one with a past or without constant weights stays.

    The product gets the attention's name.
    """
    attentions = [node for node in model.graph if (node.domain, node.op_type) == (MICROSOFT, "Attention")]
    return [_unpack(model.graph, node) for node in attentions if _is_plain(node)]


def _is_plain(node: ir.Node) -> bool:
    """Return whether an attention has only inputs and attributes that the unpacked form supports."""
    mask = input_at(node, 3)
    # The shape of a cast mask may be recorded for the value that it was cast from alone.
    cast = producer(mask, "Cast") if mask is not None and mask.shape is None else None
    return (
        len(node.inputs) >= 3
        and all(constant(value) is not None for value in node.inputs[1:3])
        and all(value is None for value in node.inputs[4:])
        and set(node.attributes) <= {"num_heads", "scale", "mask_filter_value", "unidirectional"}
        and (mask is None or rank(mask if cast is None else cast.inputs[0]) == 2)
        and len(node.outputs[0].uses()) > 0
    )


def _unpack(graph: ir.Graph, node: ir.Node) -> UnpackedAttention:
    """Replace one attention by product, bias, split and `MultiHeadAttention`."""
    parts = UnpackedAttention(str(node.name), *(f"{node.name}/{part}" for part in ("bias", "split", "heads")))
    hidden, weight, bias = node.inputs[:3]
    old = node.outputs[0]
    product = ir.node("MatMul", [hidden, weight], name=parts.product)
    added = ir.node("Add", [product.outputs[0], bias], name=parts.bias)
    split = ir.node("Split", [added.outputs[0]], {"axis": -1, "num_outputs": 3}, num_outputs=3, name=parts.split)
    inputs = [*split.outputs, None, input_at(node, 3)]
    heads = ir.node("MultiHeadAttention", inputs, dict(node.attributes), domain=MICROSOFT, name=parts.heads)
    for new_node in (product, added, split, heads):
        for index, output in enumerate(new_node.outputs):
            output.name, output.type = f"{new_node.name}_output_{index}", old.type
    heads.outputs[0].shape = old.shape
    graph.insert_before(node, [product, added, split, heads])
    old.replace_all_uses_with(heads.outputs[0])
    graph.remove(node, safe=True)
    # The attention's output keeps its name.
    heads.outputs[0].name = old.name
    return parts


def pack_attention(model: ir.Model, attentions: Collection[UnpackedAttention]) -> None:
    """Join each unpacked attention again, in place: `Attention`, or `QAttention` if its product was quantized.

    The product is quantized if `fuse_products` made it `MatMulIntegerToFloat`. An attention whose product reads
    dequantized values stays unpacked.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    for parts in attentions:
        product = nodes.get(parts.product)
        # The product was removed, or stayed in float with integer weights.
        if product is None or (product.op_type == "MatMul" and quantized_source(product.inputs[1]) is not None):
            continue
        heads = nodes[parts.heads]
        mask = input_at(heads, 4)
        if product.op_type == "MatMul":
            kind, inputs = "Attention", [*product.inputs[:2], nodes[parts.bias].inputs[1], mask]
        else:
            # The operands of `MatMulIntegerToFloat` in the order of `QAttention`.
            integers, weight, scale, weight_scale, zero, weight_zero, bias = product.inputs
            kind, inputs = "QAttention", [integers, weight, bias, scale, weight_scale, mask, zero, weight_zero]
        packed = ir.node(kind, inputs, dict(heads.attributes), domain=MICROSOFT, name=parts.product)
        old, new = heads.outputs[0], packed.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(heads, packed)
        old.replace_all_uses_with(new)
        old.name, new.name = f"{old.name}_unpacked", old.name
    clean(model)


@dataclass(frozen=True)
class DequantizedValue:
    """Inputs of a `DequantizeLinear`: ``integers``, ``scale`` and ``zero_point``."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


def quantized_source(value: ir.Value | None) -> DequantizedValue | None:
    """Return the integers that ``value`` is dequantized from, or None."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        return None
    integers, scale = node.inputs[:2]
    assert integers is not None and scale is not None, "both are required"
    return DequantizedValue(integers, scale, input_at(node, 2))


def make_unsigned(model: ir.Model) -> None:
    """Turn signed activations into unsigned ones, in place: integers and zero point grow by 128, the values stay.

    ONNX Runtime has `QAttention` for unsigned activations only, and is slow with signed ones on x86.
    """
    for node in list(model.graph):
        zero = constant(input_at(node, 2)) if node.op_type == "QuantizeLinear" else None
        if zero is None or zero.dtype != np.int8:
            continue
        # The zero point is shared by the quantization and all dequantizations of the value.
        restoring = [use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"]
        moved = (zero.astype(np.int16) + 128).astype(np.uint8)
        value = add_initializer(model.graph, f"{node.outputs[0].name}_unsigned_zero_point", moved)
        node.outputs[0].dtype = ir.DataType.UINT8
        for consumer in (node, *restoring):
            consumer.replace_input_with(2, value)


def fuse_products(model: ir.Model) -> int:
    """Replace each `MatMul` and `Gemm` of quantized values with stored weights, in place; return how many."""
    count = 0
    for node in list(model.graph):
        # A `Gemm` must be a plain product with a bias; `MatMul` has none of these attributes.
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if node.op_type in ("MatMul", "Gemm") and factors == [1, 1] and not node.attributes.get_int("transA", 0):
            count += _write(model.graph, node)
    clean(model)
    return count


def _write(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace one product and return True, or return False if its operands are not quantized."""
    activations, weight = quantized_source(node.inputs[0]), quantized_source(node.inputs[1])
    if activations is None or weight is None or constant(weight.integers) is None:
        return False
    scale = constant(activations.scale)
    if scale is None or scale.size != 1:
        return False
    end, bias = _with_bias(node)
    integers = weight.integers
    # The integer operator has no transposition.
    if node.attributes.get_int("transB", 0):
        integers = add_initializer(graph, f"{integers.name}_transposed", constant(integers).T)  # type: ignore[union-attr]
    zero = activations.zero_point
    inputs = [activations.integers, integers, activations.scale, weight.scale, zero, weight.zero_point, bias]
    fused = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)
    node.name = f"{node.name}_float"
    output, old = fused.outputs[0], end.outputs[0]
    output.type, output.shape = old.type, old.shape
    graph.insert_before(end, fused)
    # The bias moves into the product, so a plain `Gelu` is left.
    if end.op_type == "BiasGelu":
        gelu = ir.node("Gelu", [output], domain=MICROSOFT, name=end.name)
        end.name = f"{end.name}_with_bias"
        gelu.outputs[0].type, gelu.outputs[0].shape = old.type, old.shape
        output.name = f"{fused.name}_output"
        graph.insert_before(end, gelu)
        output = gelu.outputs[0]
    name = old.name
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    # The new node takes over the name of the output.
    old.name, output.name = f"{name}_float", name
    return True


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """Return the last node of the product, and the stored bias that is added."""
    if node.op_type == "Gemm":
        return node, _as_float(node, input_at(node, 2))
    end = only_consumer(node.outputs[0], "Add", "BiasGelu")
    if end is None:
        return node, None
    bias = other_operand(end, node.outputs[0])
    array = constant(bias)
    # Only a vector with one entry per column is a bias of the product.
    columns = constant(node.inputs[1].producer().inputs[0]).shape[-1]  # type: ignore[union-attr]
    return (end, bias) if array is not None and array.shape == (columns,) else (node, None)


def _as_float(node: ir.Node, bias: ir.Value | None) -> ir.Value | None:
    """Return an int32 bias as floats."""
    stored = quantized_source(bias)
    if stored is None or node.graph is None:
        return bias
    integers, scale = constant(stored.integers), constant(stored.scale)
    assert integers is not None and scale is not None, "a bias is stored"
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, f"{stored.integers.name}_float", (integers * scale).astype(np.float32))
