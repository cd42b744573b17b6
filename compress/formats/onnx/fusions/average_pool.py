"""A mean over height and width as `GlobalAveragePool`, which runtimes keep in the layout and the type that images have.

For a `ReduceMean` ONNX Runtime puts blocked channels back in order, and turns 8-bit images and makes them float first.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.formats.onnx.fusions.graph import clean, constant


def pool_globally(model: ir.Model) -> int:
    """Replace each `ReduceMean` over the last two of four axes that keeps them, in place; returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if not _is_pooling(node):
            continue
        old = node.outputs[0]
        pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        new = pool.outputs[0]
        new.type, new.shape = old.type, old.shape
        graph.insert_before(node, pool)
        name, old.name = old.name, None
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name = name
        graph.remove(node, safe=True)
        count += 1
    if count:
        clean(model)
    return count


def _is_pooling(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx"):
        return False
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) != 4:
        return False
    if node.attributes.get_int("keepdims", 1) != 1 or value.dtype != ir.DataType.FLOAT:
        return False
    # An attribute before opset 18, an input since.
    listed = constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", ())
    return listed is not None and sorted(int(axis) % 4 for axis in listed) == [2, 3]
