"""Removal of `QuantizeLinear` and `DequantizeLinear` that no integer kernel of ONNX Runtime's processor uses.

Other quantizers put them where other runtimes benefit: around additions, lookups, products of two activations. ONNX
Runtime computes those in float, so such a pair costs time twice, and accuracy. Layers that stay float between
integers are protected from ONNX Runtime's own rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant
from compress.formats.onnx.int8.fuse_integer_ops import quantized_source
from compress.formats.onnx.int8.select_nodes import BRIDGES

_BELOW_ZERO_TOO = ("Add", "Conv", "MatMul", "Gemm", "BatchNormalization", "Concat")


def drop_redundant_qdq(model: ir.Model) -> int:
    """Lead readers that stay float past the pairs, in place; return how many readers.

    Stored integers that only such readers use become float again.
    """
    count = 0
    # A removed pair may make the pair before it redundant.
    while changed := sum(
        _lead_past(model.graph, node) for node in list(model.graph) if node.op_type == "DequantizeLinear"
    ):
        count += changed
    clean(model)
    return count


def _lead_past(graph: ir.Graph, node: ir.Node) -> int:
    """Return the number of readers of one dequantized value that now read the original."""
    idle = [use for use in list(node.outputs[0].uses()) if not _useful(use.node)]
    if not idle:
        return 0
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    # These quantizations make an integer kernel or replace an activation function, so they stay.
    if maker is not None and (_ends_convolution(maker) or _clips(maker)):
        return 0
    if maker is not None and maker.op_type == "QuantizeLinear":
        original = maker.inputs[0]
    # Stored integers become float again.
    elif source is not None and constant(source) is not None:
        original = add_initializer(graph, f"{source.name}_float", restored(node))
    else:
        return 0
    for use in idle:
        use.node.replace_input_with(use.idx, original)
    return len(idle)


def _ends_convolution(node: ir.Node) -> bool:
    """Return whether a quantization gives the preceding convolution an integer kernel."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is not None and producer.op_type in ("Relu", "Clip") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Conv" and _useful(producer)


def _clips(node: ir.Node) -> bool:
    """Return whether a quantization replaces a `Relu` that the quantizer removed: negative values have no integer."""
    zero = constant(node.inputs[2]) if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
    if zero is None or zero.size != 1 or zero.item() != np.iinfo(zero.dtype).min:
        return False
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return producer is not None and producer.op_type in _BELOW_ZERO_TOO


def _useful(node: ir.Node) -> bool:
    """Return whether a reader of dequantized values becomes an integer kernel."""
    if node.op_type in ("MatMul", "Gemm"):
        weight = quantized_source(node.inputs[1])
        return (
            quantized_source(node.inputs[0]) is not None
            and weight is not None
            and constant(weight.integers) is not None
        )
    if node.op_type == "Conv":
        return all(quantized_source(value) is not None for value in node.inputs[:2])
    # A bridge is an integer kernel if everything around it is integers.
    if node.op_type in BRIDGES:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        readers = [use.node for output in node.outputs for use in output.uses()]
        return all(quantized_source(value) is not None for value in computed) and all(
            reader.op_type == "QuantizeLinear" for reader in readers
        )
    return False


def restored(node: ir.Node) -> np.ndarray:
    """Return the float32 array of a `DequantizeLinear` of stored integers."""
    integers, scale = constant(node.inputs[0]), constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert integers is not None and scale is not None, "stored integers have stored scales"
    shape = [1] * integers.ndim
    if scale.ndim and scale.size > 1:
        # Scales of channels apply along the axis of the operator.
        shape[node.attributes.get_int("axis", 1)] = scale.size
    shift = 0.0 if zero is None else zero.astype(np.float32).reshape(shape if zero.size > 1 else ())
    array: np.ndarray = (integers.astype(np.float32) - shift) * scale.reshape(shape if scale.size > 1 else ())
    return array.astype(np.float32)


_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def protect_float_layers(model: ir.Model) -> list[str]:
    """Give the input of each float layer a scale per channel, in place; return the layers' names.

    ONNX Runtime rounds the float weights of a layer whose input comes from a `DequantizeLinear` with one scale, to 8
    bits with one scale for the whole tensor, when it loads a graph (its WeightBiasQuantization). It skips inputs that
    are dequantized with a scale per channel. Such layers get the same scale once for each channel, which computes the
    same numbers.
    """
    protected = []
    for node in list(model.graph):
        channels = _channels(node) if node.op_type in _OPERATORS else None
        source = quantized_source(node.inputs[0]) if channels is not None else None
        if channels is None or source is None:
            continue
        scale = constant(source.scale)
        # Scales per channel protect the layer already.
        if scale is None or scale.size != 1:
            continue
        name = f"{node.name}_input"
        alike = add_initializer(model.graph, f"{name}_scale", np.full(channels, scale.item(), scale.dtype))
        inputs = [source.integers, alike]
        zero = constant(source.zero_point)
        if zero is not None:
            value = np.full(channels, zero.item(), zero.dtype)
            inputs.append(add_initializer(model.graph, f"{name}_zero_point", value))
        old = node.inputs[0]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_DequantizeLinear")
        dequantize.outputs[0].name = f"{name}_DequantizeLinear_Output"
        assert old is not None, "it is dequantized"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(0, dequantize.outputs[0])
        protected.append(str(node.name))
    clean(model)
    return protected


def _channels(node: ir.Node) -> int | None:
    """Return the number of input channels of a layer with stored float weights, or None for another node."""
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
