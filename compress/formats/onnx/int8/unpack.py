"""`com.microsoft.Attention` as a product, its bias and the rest, so that a quantizer sees the product; and back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.fusions.graph import clean

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Parts:
    """Names of the nodes that stand for one attention."""

    name: str

    @property
    def product(self) -> str:
        """Of hidden states with the packed weights."""
        return self.name

    @property
    def bias(self) -> str:
        """The addition after the product."""
        return f"{self.name}/bias"

    @property
    def split(self) -> str:
        """Into queries, keys and values."""
        return f"{self.name}/split"

    @property
    def heads(self) -> str:
        """`MultiHeadAttention`."""
        return f"{self.name}/heads"


def unpack_attention(model: ir.Model) -> list[Parts]:
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


def _unpack(graph: ir.Graph, node: ir.Node) -> Parts:
    parts = Parts(str(node.name))
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


def pack_attention(model: ir.Model, attentions: Collection[Parts]) -> None:
    """Put each attention together again, in place: `QAttention` where its product was quantized, else `Attention`.

    The product is quantized where `kernels` has written it as `MatMulIntegerToFloat`.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph}
    for parts in attentions:
        product, heads = nodes[parts.product], nodes[parts.heads]
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
        packed.name = parts.name
        old, new = heads.outputs[0], packed.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(heads, packed)
        old.replace_all_uses_with(new)
        old.name, new.name = f"{old.name}_unpacked", old.name
    clean(model)
