"""Graph fusions that the exporter leaves out: an encoder's self-attention as one ONNX Runtime operator.

The exporter's own fusions leave attention as some twenty small nodes, because ONNX Runtime's `MultiHeadAttention`
is slow with a bias. `com.microsoft.Attention` takes packed projections and a padding mask instead, and its
quantized form is a single int8 kernel (`QAttention`). A wrong match cannot pass unseen: the export stage proves
the fused graph equal to torch on padded batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.fusions.graph import add_initializer, clean, constant, only_consumer

MASK_INPUT = "attention_mask"
_MASK_FILL = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class _SelfAttention:
    """A matched attention: the packed projection, its biases, and the value that ends it."""

    hidden: ir.Value
    weight: ir.Value
    bias: np.ndarray
    heads: int
    scale: float
    end: ir.Value


def fuse_encoder_attention(model: ir.Model) -> int:
    """Replace each padded bidirectional self-attention by `com.microsoft.Attention`, in place.

    Expects the exporter's ``ort_fusions`` graph, in which the three projections are packed into one product.
    Returns the number of attentions replaced; a graph without the pattern, or whose attention is masked by anything
    beside the ``attention_mask`` input, is left as it is.
    """
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == MASK_INPUT), None)
    if mask is None:
        return 0
    matches = [match for node in graph if (match := _match(node, mask)) is not None]
    if not matches:
        return 0
    cast = ir.node("Cast", [mask], attributes={"to": ir.DataType.INT32})
    cast.outputs[0].name = "attention_mask_int32"
    graph.insert_before(graph[0], cast)
    for index, match in enumerate(matches):
        _replace(graph, match, cast.outputs[0], index)
    clean(model)
    return len(matches)


def _match(split: ir.Node, mask: ir.Value) -> _SelfAttention | None:
    if split.op_type != "Split" or len(split.outputs) != 3 or split.inputs[0] is None:
        return None
    product = split.inputs[0].producer()
    if product is None or product.op_type != "MatMul" or constant(product.inputs[1]) is None:
        return None
    biases = [found for output in split.outputs if (found := _bias_after(output)) is not None]
    if len(biases) != 3:
        return None
    paths = [_to_operator(added, "MatMul") for added, _ in biases]
    scores = paths[0]
    if scores is None or paths[1] is not scores or paths[2] is None:
        return None
    chain: list[ir.Node] = [scores]
    for operator in ("Mul", "Add", "Softmax", "MatMul"):
        following = only_consumer(chain[-1].outputs[0], operator)
        if following is None:
            return None
        chain.append(following)
    _, scaled, masked, _, weighted = chain
    if weighted is not paths[2]:
        return None
    scale, heads = constant(scaled.inputs[1]), _heads(scores)
    if scale is None or scale.size != 1 or heads is None or not _comes_from_mask(masked.inputs[1], mask):
        return None
    end = _end(weighted)
    hidden, weight = product.inputs
    if end is None or hidden is None or weight is None:
        return None
    bias = np.concatenate([array for _, array in biases])
    return _SelfAttention(hidden, weight, bias, heads, float(scale.reshape(())), end)


def _bias_after(output: ir.Value) -> tuple[ir.Value, np.ndarray] | None:
    add = only_consumer(output, "Add")
    if add is None:
        return None
    bias = next((array for value in add.inputs if (array := constant(value)) is not None), None)
    return None if bias is None or bias.ndim != 1 else (add.outputs[0], bias)


def _to_operator(value: ir.Value, operator: str) -> ir.Node | None:
    """Follow ``value`` through reshapes and transposes to the one node of type ``operator`` that reads it."""
    node = only_consumer(value, "Reshape", "Transpose", operator)
    while node is not None and node.op_type != operator:
        node = only_consumer(node.outputs[0], "Reshape", "Transpose", operator)
    return node


def _heads(scores: ir.Node) -> int | None:
    """The number of heads, from the constant shape that the queries are split by."""
    value = scores.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Transpose", "Reshape"):
        if node.op_type == "Reshape":
            shape = constant(node.inputs[1])
            if shape is not None and shape.size == 4 and shape[2] > 0:
                return int(shape[2])
        value = node.inputs[0]
    return None


def _comes_from_mask(value: ir.Value | None, mask: ir.Value) -> bool:
    """Whether ``value`` is computed from ``mask`` and shapes alone."""
    pending, seen, found = [value], set[int](), False
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        found |= current is mask
        if current.is_graph_input() and current is not mask and current.name != "input_ids":
            return False
        node = current.producer()
        if node is not None and node.op_type not in ("MatMul", "Gather", "LayerNormalization"):
            pending.extend(node.inputs)
        elif node is not None:
            return False
    return found


def _end(weighted: ir.Node) -> ir.Value | None:
    """The value with heads merged that the output projection reads."""
    value = weighted.outputs[0]
    while True:
        node = only_consumer(value, "Transpose", "Reshape", "Where", "MatMul", "Gemm")
        if node is None:
            return None
        if node.op_type in ("MatMul", "Gemm"):
            return value
        value = node.outputs[0]


def _replace(graph: ir.Graph, match: _SelfAttention, mask: ir.Value, index: int) -> None:
    bias = add_initializer(graph, f"attention_{index}_bias", match.bias)
    node = ir.node(
        "Attention",
        [match.hidden, match.weight, bias, mask],
        attributes={"num_heads": match.heads, "scale": match.scale, "mask_filter_value": _MASK_FILL},
        domain="com.microsoft",
        name=f"attention_{index}",
    )
    output = node.outputs[0]
    output.type, output.shape = match.end.type, match.end.shape
    consumer = match.end.uses()[0].node
    graph.insert_before(consumer, node)
    match.end.replace_all_uses_with(output)
