"""Take out `QuantizeLinear` and `DequantizeLinear` that no integer kernel of ONNX Runtime's processor takes up.

Other people's quantizers put them where their own runtime gains by it: around additions, look-ups, products of two
activations. ONNX Runtime computes those in float, so there such a pair costs time twice, and accuracy. What stays float
between integers is protected from ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant
from compress.formats.onnx.int8.fuse_integer_ops import quantized_source
from compress.formats.onnx.int8.select_nodes import BRIDGES

_BELOW_ZERO_TOO = ("Add", "Conv", "MatMul", "Gemm", "BatchNormalization", "Concat")


def drop_redundant_qdq(model: ir.Model) -> int:
    """Lead readers that stay in float past the pairs, in place; returns how many readers.

    Stored integers that only such a reader uses become float again.
    """
    count = 0
    while changed := sum(_lead_past(model.graph, node) for node in list(model.graph) if _is_restored(node)):
        count += changed
    clean(model)
    return count


def _is_restored(node: ir.Node) -> bool:
    return bool(node.op_type == "DequantizeLinear")


def _lead_past(graph: ir.Graph, node: ir.Node) -> int:
    """Readers of one dequantized value that now read what was quantized."""
    idle = [use for use in list(node.outputs[0].uses()) if not _useful(use.node)]
    if not idle:
        return 0
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    if maker is not None and (_ends_convolution(maker) or _clips(maker)):
        return 0
    if maker is not None and maker.op_type == "QuantizeLinear":
        before = maker.inputs[0]
    elif source is not None and constant(source) is not None:
        before = add_initializer(graph, f"{source.name}_float", restored(node))
    else:
        return 0
    for use in idle:
        use.node.replace_input_with(use.idx, before)
    return len(idle)


def _ends_convolution(node: ir.Node) -> bool:
    """Whether a quantization is what makes an integer kernel of the convolution before it."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is not None and before.op_type in ("Relu", "Clip") and before.inputs[0] is not None:
        before = before.inputs[0].producer()
    return before is not None and before.op_type == "Conv" and _useful(before)


def _clips(node: ir.Node) -> bool:
    """Whether a quantization stands for a `Relu` that the quantizer took out: nothing below zero has an integer."""
    zero = constant(node.inputs[2]) if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
    if zero is None or zero.size != 1 or zero.item() != np.iinfo(zero.dtype).min:
        return False
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    return before is not None and before.op_type in _BELOW_ZERO_TOO


def _useful(node: ir.Node) -> bool:
    """Whether a reader of dequantized values becomes an integer kernel."""
    if node.op_type in ("MatMul", "Gemm"):
        weight = quantized_source(node.inputs[1])
        return (
            quantized_source(node.inputs[0]) is not None
            and weight is not None
            and constant(weight.integers) is not None
        )
    if node.op_type == "Conv":
        return all(quantized_source(value) is not None for value in node.inputs[:2])
    if node.op_type in BRIDGES:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        readers = [use.node for output in node.outputs for use in output.uses()]
        return all(quantized_source(value) is not None for value in computed) and all(
            reader.op_type == "QuantizeLinear" for reader in readers
        )
    return False


def restored(node: ir.Node) -> np.ndarray:
    """The float32 array that a `DequantizeLinear` of stored integers makes."""
    integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert integers is not None and scale is not None, "stored integers have stored scales"
    shape = [1] * integers.ndim
    if scale.ndim and scale.size > 1:
        shape[node.attributes.get_int("axis", 1)] = scale.size
    shift = 0.0 if zero is None else zero.astype(np.float32).reshape(shape if zero.size > 1 else ())
    array: np.ndarray = (integers.astype(np.float32) - shift) * scale.reshape(shape if scale.size > 1 else ())
    return array.astype(np.float32)


_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def protect_float_layers(model: ir.Model) -> list[str]:
    """Give each float layer that reads dequantized values scales of its own, in place; returns their names.

    When it loads a graph, ONNX Runtime rounds the float weights of a layer whose input comes out of a
    `DequantizeLinear` with one scale: to 8 bits with one scale for the whole tensor, though nobody asked for it (its
    WeightBiasQuantization). It leaves alone what is dequantized with a scale for each channel. So such layers are given
    that: the same scale, once for each channel, which computes the same numbers.
    """
    found = []
    for node in list(model.graph):
        channels = _channels(node) if node.op_type in _OPERATORS else None
        given = quantized_source(node.inputs[0]) if channels is not None else None
        if channels is None or given is None:
            continue
        scale = constant(given.scale)
        if scale is None or scale.size != 1:
            continue
        name = f"{node.name}_input"
        alike = add_initializer(model.graph, f"{name}_scale", np.full(channels, scale.item(), scale.dtype))
        inputs = [given.integers, alike]
        zero = constant(given.zero_point)
        if zero is not None:
            value = np.full(channels, zero.item(), zero.dtype)
            inputs.append(add_initializer(model.graph, f"{name}_zero_point", value))
        old = node.inputs[0]
        made = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_DequantizeLinear")
        made.outputs[0].name = f"{name}_DequantizeLinear_Output"
        assert old is not None, "it is dequantized"
        made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, made)
        node.replace_input_with(0, made.outputs[0])
        found.append(str(node.name))
    clean(model)
    return found


def _channels(node: ir.Node) -> int | None:
    """Of the input of a layer with stored float weights."""
    array = constant(node.inputs[1])
    if array is None or array.dtype != np.float32:
        return None
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return None
        return int(array.shape[1 if node.attributes.get_int("transB", 0) else 0])
    if node.op_type == "ConvTranspose":
        return int(array.shape[0])
    return int(array.shape[1]) * int(node.attributes.get_int("group", 1))
