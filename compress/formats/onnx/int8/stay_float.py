"""Layers in float between integers, protected from ONNX Runtime.

When it loads a graph, ONNX Runtime rounds the float weights of a `Conv`, `ConvTranspose` or `Gemm` whose input comes
out of a `DequantizeLinear` with one scale: to 8 bits with one scale for the whole tensor, though nobody asked for it
(its WeightBiasQuantization). It leaves alone what is dequantized with a scale for each channel. So such layers are
given that: the same scale, once for each channel, which computes the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.fusions.graph import add_initializer, clean, constant
from compress.formats.onnx.int8.kernels import quantized

_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def protect_float_layers(model: ir.Model) -> list[str]:
    """Give each float layer that reads dequantized values scales of its own, in place; returns their names."""
    found = []
    for node in list(model.graph):
        channels = _channels(node) if node.op_type in _OPERATORS else None
        given = quantized(node.inputs[0]) if channels is not None else None
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
