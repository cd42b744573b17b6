"""Choose the first token before the last layer's position-wise work instead of after it.

A classifier reads one token of the last hidden states. Everything after the last attention works on each token by
itself, so it need only be computed for that token: exact, and it saves most of the last layer.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.formats.onnx.fusions.graph import clean, constant

_POSITION_WISE = (
    "MatMul",
    "Add",
    "Sum",
    "BiasGelu",
    "Gelu",
    "FastGelu",
    "Relu",
    "Tanh",
    "LayerNormalization",
    "SkipLayerNormalization",
)


def select_first_token_early(model: ir.Model) -> int:
    """Move a `Gather` of one token up through position-wise nodes, in place; returns how many it passed.

    Hidden states [batch, length, width] become [batch, width] where the choice now comes first.
    """
    graph = model.graph
    select = next((node for node in graph if _selects_one_token(node)), None)
    if select is None or select.inputs[0] is None:
        return 0
    last = select.inputs[0]
    moved = _only_feeding(last, select)
    chosen: dict[ir.Value, ir.Value] = {}
    for node in moved:
        for position, value in enumerate(node.inputs):
            if value is None or constant(value) is not None or value.producer() in moved:
                continue
            if value not in chosen:
                chosen[value] = _select(graph, select, value, len(chosen))
            node.replace_input_with(position, chosen[value])
        for output in node.outputs:
            output.shape = None
    if moved:
        select.outputs[0].replace_all_uses_with(last)
        graph.remove(select, safe=True)
        clean(model)
    return len(moved)


def _selects_one_token(node: ir.Node) -> bool:
    """A `Gather` along the length axis with a scalar constant index."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1 or node.outputs[0].is_graph_output():
        return False
    index = constant(node.inputs[1])
    return index is not None and index.ndim == 0


def _only_feeding(last: ir.Value, select: ir.Node) -> dict[ir.Node, None]:
    """Position-wise nodes whose outputs reach nothing but ``select``, in an order that is the same in every process."""
    moved: dict[ir.Node, None] = {}
    pending = [last.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in moved or node.op_type not in _POSITION_WISE:
            continue
        readers = {usage.node for output in node.outputs for usage in output.uses()}
        outward = any(output.is_graph_output() for output in node.outputs)
        if outward or not readers <= {*moved, select} or not _keeps_last_axis(node):
            continue
        moved[node] = None
        pending += [value.producer() for value in node.inputs if value is not None]
    return moved


def _keeps_last_axis(node: ir.Node) -> bool:
    """Whether constant operands are matrices or vectors along the last axis, so that a leading axis may go."""
    limit = 2 if node.op_type == "MatMul" else 1
    arrays = [array for value in node.inputs if (array := constant(value)) is not None]
    return all(array.ndim <= limit for array in arrays)


def _select(graph: ir.Graph, select: ir.Node, value: ir.Value, index: int) -> ir.Value:
    node = ir.node("Gather", [value, select.inputs[1]], attributes={"axis": 1}, name=f"first_token_{index}")
    output = node.outputs[0]
    output.name, output.type = f"first_token_{index}", value.type
    if value.shape is not None and len(value.shape) == 3:
        output.shape = ir.Shape([value.shape[0], value.shape[2]])
    graph.append(node)
    return output
