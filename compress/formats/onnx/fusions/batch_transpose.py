"""`FusedMatMul` without the transpose of batch axes where ONNX Runtime has none: beside an operand of another rank.

onnxscript folds a `Transpose` into the operator without asking for the other operand's rank, and the runtime refuses
it; `nn.MultiheadAttention`, by which SigLIP pools, has such a product with its weights.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.formats.onnx.fusions.graph import Writer

_FUSED, _DOMAIN = "FusedMatMul", "com.microsoft"
_FLAGS = (("transBatchA", "transA"), ("transBatchB", "transB"))


def unfold_batch_transposes(model: ir.Model) -> int:
    """Put a `Transpose` before each such product, in place; returns before how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type == _FUSED and node.domain == _DOMAIN and _refused(node):
            _unfold(model.graph, node)
            count += 1
    return count


def _refused(node: ir.Node) -> bool:
    ranks = [_rank(value) for value in node.inputs]
    asked = any(node.attributes.get_int(batch, 0) for batch, _ in _FLAGS)
    return asked and None not in ranks and not (ranks[0] == ranks[1] and (ranks[0] or 0) > 2)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _unfold(graph: ir.Graph, node: ir.Node) -> None:
    for place, (batch, _) in enumerate(_FLAGS):
        value = node.inputs[place]
        if not node.attributes.get_int(batch, 0) or value is None or value.shape is None:
            continue
        # The first axis becomes the last but one.
        order = [*range(1, len(value.shape) - 1), 0, len(value.shape) - 1]
        shape = [value.shape[axis] for axis in order]
        moved = Writer(graph, node, f"{node.name}_{batch}").node("Transpose", [value], shape, perm=order)
        node.replace_input_with(place, moved)
        node.attributes[batch] = ir.AttrInt64(batch, 0)
    if any(node.attributes.get_int(plain, 0) for _, plain in _FLAGS) or node.attributes.get_float("alpha", 1.0) != 1.0:
        return
    # A plain product is what quantizers look for.
    node.op_type, node.domain = "MatMul", ""
    for name in list(node.attributes):
        del node.attributes[name]
