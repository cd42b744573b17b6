"""SmoothQuant: large input channels are made smaller, and their weights larger, where that costs nothing at run time.

Xiao et al. 2023, "SmoothQuant", equation 4: channel j is divided by s_j = max|x_j|^a / max|w_j|^(1 - a). The division
goes into what makes the channel: the gain and bias of a normalisation that only products read, or, before the last
product of an attention, the columns of the values. A normalisation that a residual reads too (BERT's) is left alone,
since there the division would be an operator more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.fusions.graph import add_initializer, constant
from compress.formats.onnx.int8.observers import Observed
from compress.formats.onnx.int8.select_nodes import QuantizableLayer
from compress.numerics.smoothing import smoothing_factors

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def smooth(
    model: ir.Model, layers: Sequence[QuantizableLayer], observed: Mapping[str, Observed], alpha: float
) -> list[str]:
    """Even out the inputs of `MatMul` and `Gemm` in place; returns the names of the layers concerned."""
    nodes = {str(node.name): node for node in model.graph}
    products = {layer.name: nodes[layer.name] for layer in layers if layer.operator in ("MatMul", "Gemm")}
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in products.values():
        if node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    done: list[str] = []
    for value, readers in by_input.items():
        if {use.node for use in value.uses()} != set(readers) or value.is_graph_output():
            continue
        largest = observed[str(value.name)].largest
        if largest is None or any(len(list(_weight(node).uses())) > 1 for node in readers):
            continue
        factors = smoothing_factors(largest, [_rows(node) for node in readers], alpha)
        if _divide(model.graph, value, factors):
            for node in readers:
                _multiply(model.graph, node, factors)
                done.append(str(node.name))
    return done


def _weight(node: ir.Node) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None, "a product has weights"
    return weight


def _rows(node: ir.Node) -> np.ndarray:
    """The weights as [channels, outputs]."""
    array = constant(_weight(node))
    assert array is not None, "chosen layers have stored weights"
    return array.T if node.attributes.get_int("transB", 0) else array


def _multiply(graph: ir.Graph, node: ir.Node, factors: np.ndarray) -> None:
    rows = _rows(node) * factors[:, None]
    array = rows.T if node.attributes.get_int("transB", 0) else rows
    node.replace_input_with(1, add_initializer(graph, f"{_weight(node).name}_smoothed", array))


def _divide(graph: ir.Graph, value: ir.Value, factors: np.ndarray) -> bool:
    """Divide the channels of ``value`` where they are made; ``False`` where that can't be done."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in _NORMS and node.outputs[0] is value:
        return _scale_inputs(graph, node, range(1, len(node.inputs)), 1 / factors)
    if node.op_type == "MultiHeadAttention":
        return _divide_values(graph, node, factors)
    return False


def _scale_inputs(graph: ir.Graph, node: ir.Node, places: Sequence[int], by: np.ndarray) -> bool:
    given = [(place, node.inputs[place]) for place in places if node.inputs[place] is not None]
    arrays = [(place, value, constant(value)) for place, value in given]
    if any(array is None or array.shape[-1:] != by.shape for _, _, array in arrays):
        return False
    for place, value, array in arrays:
        assert value is not None and array is not None, "looked at above"
        node.replace_input_with(place, add_initializer(graph, f"{value.name}_smoothed", array * by))
    return True


def _divide_values(graph: ir.Graph, heads: ir.Node, factors: np.ndarray) -> bool:
    """The last third of an unpacked attention's weights and biases."""
    split = heads.inputs[2].producer() if heads.inputs[2] is not None else None
    added = split.inputs[0].producer() if split is not None and split.inputs[0] is not None else None
    if split is None or split.op_type != "Split" or added is None or added.op_type != "Add":
        return False
    product = added.inputs[0].producer() if added.inputs[0] is not None else None
    if product is None or product.op_type != "MatMul" or heads.inputs[2] is not split.outputs[2]:
        return False
    by = np.concatenate([np.ones(2 * factors.size, np.float32), 1 / factors])
    weight = constant(product.inputs[1])
    if weight is None or weight.shape[1] != by.size:
        return False
    return _scale_inputs(graph, product, [1], by) and _scale_inputs(graph, added, [1], by)
