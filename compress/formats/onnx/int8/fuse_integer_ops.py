"""Write products that a quantizer left as dequantize, multiply, add as the one integer operator that computes them.

`com.microsoft.Attention` is taken apart before, so that a quantizer sees its product, and put together again after.
ONNX Runtime fuses `DequantizeLinear` and `MatMul` when it loads a graph, though not the bias, and not attention;
`com.microsoft.MatMulIntegerToFloat` and `QAttention` are what it fuses into, with the bias inside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant, only_consumer

MICROSOFT = "com.microsoft"


class UnpackedAttention(NamedTuple):
    """Names of the nodes that stand for one attention; its product with the packed weights keeps its name.

    ``bias`` is the addition after it, ``split`` gives queries, keys and values, ``heads`` is `MultiHeadAttention`.
    """

    product: str
    bias: str
    split: str
    heads: str


def unpack_attention(model: ir.Model) -> list[UnpackedAttention]:
    """Replace each `Attention` of an encoder in place; one with a past, or no constant weights, is left alone.

    The product keeps the attention's name.
    """
    found = []
    for node in list(model.graph):
        if (node.domain, node.op_type) == (MICROSOFT, "Attention") and _is_plain(node):
            found.append(_unpack(model.graph, node))
    return found


def _is_plain(node: ir.Node) -> bool:
    inputs = node.inputs
    stored = all(value is not None and value.const_value is not None for value in inputs[1:3])
    rest = [value for value in inputs[4:] if value is not None]
    known = set(node.attributes) <= {"num_heads", "scale", "mask_filter_value", "unidirectional"}
    flat = len(inputs) < 4 or inputs[3] is None or _axes(inputs[3]) == 2
    return len(inputs) >= 3 and stored and not rest and known and flat and len(list(node.outputs[0].uses())) > 0


def _axes(value: ir.Value) -> int | None:
    """How many axes a mask has, where it or what it was cast from says so."""
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    before = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return None if before is None or before.shape is None else len(before.shape)


def _unpack(graph: ir.Graph, node: ir.Node) -> UnpackedAttention:
    parts = UnpackedAttention(str(node.name), *(f"{node.name}/{part}" for part in ("bias", "split", "heads")))
    hidden, weight, bias = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    kind = node.outputs[0].type
    product = ir.node("MatMul", [hidden, weight], name=parts.product)
    added = ir.node("Add", [product.outputs[0], bias], name=parts.bias)
    split = ir.node(
        "Split", [added.outputs[0]], attributes={"axis": -1, "num_outputs": 3}, num_outputs=3, name=parts.split
    )
    heads = ir.node(
        "MultiHeadAttention",
        [*split.outputs, None, mask],
        attributes=dict(node.attributes),
        domain=MICROSOFT,
        name=parts.heads,
    )
    for made in (product, added, split, heads):
        for place, output in enumerate(made.outputs):
            output.name = f"{made.name}_output_{place}"
            output.type = kind
    heads.outputs[0].shape = node.outputs[0].shape
    old = node.outputs[0]
    name = old.name
    graph.insert_before(node, [product, added, split, heads])
    old.replace_all_uses_with(heads.outputs[0])
    graph.remove(node, safe=True)
    heads.outputs[0].name = name
    return parts


def pack_attention(model: ir.Model, attentions: Collection[UnpackedAttention]) -> None:
    """Put each attention together again, in place: `Attention`, or `QAttention` where its product was quantized.

    That is where `fuse_products` has made it `MatMulIntegerToFloat`; one that is computed from dequantized values
    stays apart.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    for parts in attentions:
        product = nodes.get(parts.product)
        if product is None or (product.op_type == "MatMul" and quantized_source(product.inputs[1]) is not None):
            continue
        heads = nodes[parts.heads]
        mask = heads.inputs[4] if len(heads.inputs) > 4 else None
        if product.op_type == "MatMul":
            bias = nodes[parts.bias].inputs[1]
            packed = ir.node("Attention", [*product.inputs[:2], bias, mask], domain=MICROSOFT)
        else:
            integers, weight, scale, weight_scale, zero, weight_zero, bias = product.inputs
            inputs = [integers, weight, bias, scale, weight_scale, mask, zero, weight_zero]
            packed = ir.node("QAttention", inputs, domain=MICROSOFT)
        for attribute in heads.attributes.values():
            packed.attributes.add(attribute)
        packed.name = parts.product
        old, new = heads.outputs[0], packed.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(heads, packed)
        old.replace_all_uses_with(new)
        old.name, new.name = f"{old.name}_unpacked", old.name
    clean(model)


@dataclass(frozen=True)
class DequantizedValue:
    """A value that `DequantizeLinear` makes: ``integers``, ``scale`` and ``zero_point`` stand for it."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


def quantized_source(value: ir.Value | None) -> DequantizedValue | None:
    """What ``value`` is dequantized from, or ``None``."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    integers, scale = node.inputs[:2]
    assert integers is not None and scale is not None, "both are required"
    return DequantizedValue(integers, scale, node.inputs[2] if len(node.inputs) > 2 else None)


def make_unsigned(model: ir.Model, products: Collection[str] | None = None) -> None:
    """Signed activations as unsigned ones, in place: integers and zero point grow by 128, the values stay.

    That of ``products`` (all for None). ONNX Runtime has `QAttention` for unsigned ones alone, and is slow with signed
    ones on x86.
    """
    for node in list(model.graph):
        zero = constant(node.inputs[2]) if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
        if zero is None or zero.dtype != np.int8:
            continue
        restoring = [use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"]
        readers = {str(use.node.name) for each in restoring for use in each.outputs[0].uses()}
        if products is not None and not readers & set(products):
            continue
        moved = (zero.astype(np.int16) + 128).astype(np.uint8)
        value = add_initializer(model.graph, f"{node.outputs[0].name}_unsigned_zero_point", moved)
        node.outputs[0].dtype = ir.DataType.UINT8
        for each in (node, *restoring):
            each.replace_input_with(2, value)


def fuse_products(model: ir.Model) -> int:
    """Replace each `MatMul` and `Gemm` of quantized values with stored weights, in place; returns how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_affine(node)):
            count += _write(model.graph, node)
    clean(model)
    return count


def _is_affine(node: ir.Node) -> bool:
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    return plain and not node.attributes.get_int("transA", 0)


def _write(graph: ir.Graph, node: ir.Node) -> bool:
    given, weight = quantized_source(node.inputs[0]), quantized_source(node.inputs[1])
    if given is None or weight is None or constant(weight.integers) is None:
        return False
    scale = constant(given.scale)
    if scale is None or scale.size != 1:
        return False
    end, bias = _with_bias(node)
    integers = weight.integers
    if node.attributes.get_int("transB", 0):
        integers = add_initializer(graph, f"{integers.name}_transposed", constant(integers).T)  # type: ignore[union-attr]
    zero = given.zero_point
    inputs = [given.integers, integers, given.scale, weight.scale, zero, weight.zero_point, bias]
    made = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=node.name)
    node.name = f"{node.name}_float"
    output, old = made.outputs[0], end.outputs[0]
    output.type, output.shape = old.type, old.shape
    graph.insert_before(end, made)
    if end.op_type == "BiasGelu":
        gelu = ir.node("Gelu", [output], domain=MICROSOFT, name=end.name)
        end.name = f"{end.name}_with_bias"
        gelu.outputs[0].type, gelu.outputs[0].shape = old.type, old.shape
        output.name = f"{made.name}_output"
        graph.insert_before(end, gelu)
        output = gelu.outputs[0]
    name = old.name
    old.replace_all_uses_with(output, replace_graph_outputs=True)
    old.name, output.name = f"{name}_float", name
    return True


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The node that ends the product, and the stored bias that is added on the way."""
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return node, _as_float(node, bias)
    end = only_consumer(node.outputs[0], "Add", "BiasGelu")
    if end is None:
        return node, None
    bias = next((value for value in end.inputs if value is not node.outputs[0]), None)
    array = constant(bias)
    columns = constant(node.inputs[1].producer().inputs[0]).shape[-1]  # type: ignore[union-attr]
    return (end, bias) if array is not None and array.shape == (columns,) else (node, None)


def _as_float(node: ir.Node, bias: ir.Value | None) -> ir.Value | None:
    """A bias that was quantized to 32 bits, as what it stands for."""
    stored = quantized_source(bias)
    if stored is None or node.graph is None:
        return bias
    integers, scale = constant(stored.integers), constant(stored.scale)
    assert integers is not None and scale is not None, "a bias is stored"
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return add_initializer(graph, f"{stored.integers.name}_float", (integers * scale).astype(np.float32))
