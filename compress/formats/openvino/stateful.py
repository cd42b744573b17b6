"""Conversion of a decoder's ONNX graph to a stateful IR for openvino-genai and optimum-intel.

OpenVINO stores the key-value cache. The inputs are `input_ids` and `position_ids` [batch, length], `attention_mask`
[batch, total length] and `beam_idx` [batch], the row that each row continues. The output is `logits`. Attention
becomes OpenVINO's own operator. Few-bit weights keep their integers and scales in the pattern that OpenVINO's
plugins compute with: a constant of 4 or 8 bits, minus its zero points, times its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import present_of
from compress.formats.onnx.decoder.stored_weight import pack
from compress.formats.openvino.runtime import BEAMS, IDS

if TYPE_CHECKING:
    from openvino import Model, Node


_MICROSOFT = "com.microsoft"
_STATE = "past_"
_HEADS_FIRST = [0, 2, 1, 3]
_ZEROS, _BIAS = 3, 5
"""Optional inputs of `MatMulNBits`."""
_BYTE, _FEWEST = 8, 4
"""Bits of a byte, and the smallest width that OpenVINO multiplies with."""


def read_stateful(graph: Path) -> Model:
    """Read an ONNX graph that `compress.formats.onnx.decoder` wrote; raise `RuntimeError` on failure."""
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core, weights = openvino.Core(), _WeightConverter()
    core.add_extension(ConversionExtension("GroupQueryAttention", _MICROSOFT, _attention))
    core.add_extension(ConversionExtension("MatMulNBits", _MICROSOFT, weights.product))
    core.add_extension(ConversionExtension("GatherBlockQuantized", _MICROSOFT, weights.rows))
    model = core.read_model(graph)
    # Multiply with stored matrices as they are, instead of transposing them first.
    for product in model.get_ops():
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_b"]:
            continue
        transpose = product.input_value(1).get_node()
        if transpose.get_type_name() == "Transpose":
            matrix = transpose.input_value(0)
            if matrix.get_node().get_type_name() == "Constant":
                product.set_arguments([product.input_value(0), matrix])
                product.set_attribute("transpose_b", True)
    keep_states(model)
    return model


def keep_states(model: Model) -> None:
    """Turn the cache's inputs and outputs into states whose rows follow `beam_idx` and which start empty or zero."""
    from openvino import PartialShape, Type
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    pasts = [port.any_name for port in model.inputs if port.any_name.startswith(_STATE)]
    beams = ops.parameter(PartialShape([model.input(IDS).get_partial_shape()[0]]), Type.i32, BEAMS)
    model.add_parameters([beams])
    beams.output(0).get_tensor().set_names({BEAMS})
    # Each row continues the cache of the row that `beam_idx` names.
    for past in map(model.input, pasts):
        readers = past.get_target_inputs()
        selected = ops.gather(past, beams, ops.constant(0, Type.i64))
        for reader in readers:
            reader.replace_source_output(selected.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: present_of(name) for name in pasts})
    batch = ops.gather(ops.shape_of(model.input(IDS), Type.i64), ops.constant([0], Type.i64), ops.constant(0, Type.i64))
    # A state starts as zeros of the current batch size, with the smallest length of the other axes.
    for state in model.get_ops():
        if state.get_type_name() == "ReadValue":
            sizes = [axis.get_min_length() for axis in state.get_output_partial_shape(0)]
            axes = [batch, *(ops.constant([size], Type.i64) for size in sizes[1:])]
            state.set_arguments([ops.broadcast(ops.constant(0, state.get_output_element_type(0)), ops.concat(axes, 0))])
    model.validate_nodes_and_infer_types()


def _heads(value: Any, heads: int) -> Node:
    """Return [batch, length, heads * size] as [batch, heads, length, size], undoing a preceding transposition."""
    from openvino import opset13 as ops

    node = value.get_node()
    if node.get_type_name() == "Reshape":
        transpose = node.input_value(0).get_node()
        if transpose.get_type_name() == "Transpose" and _constant(transpose.input_value(1)).tolist() == _HEADS_FIRST:
            return transpose.input_value(0)
    split = ops.reshape(value, ops.constant([0, 0, heads, -1]), special_zero=True)
    return ops.transpose(split, ops.constant(_HEADS_FIRST)).output(0)


def _constant(value: Any) -> np.ndarray:
    data: np.ndarray = value.get_node().data
    return data


def _attention(node: Node) -> Sequence[Any]:
    """Convert `GroupQueryAttention` to causal attention over past and new keys, without the masked ones."""
    heads, shared = node.get_attribute("num_heads"), node.get_attribute("kv_num_heads")
    query, key, value = (node.get_input(index) for index in range(3))
    query, key, value = _heads(query, heads), _heads(key, shared), _heads(value, shared)
    past, mask = (node.get_input(3), node.get_input(4)), node.get_input(5)
    scale = node.get_attribute("scale") if node.has_attribute("scale") else None
    return [output.output(0) for output in attention((query, key, value), past, mask, heads // shared, scale)]


def attention(
    made: Sequence[object], past: Sequence[object], mask: object, times: int, scale: float | None = None
) -> tuple[Any, Any, Any]:
    """Build scaled dot-product attention.

    Args:
        made: Query, key and value [batch, heads, length, size].
        past: Cached keys and values.
        mask: Attention mask [batch, total length]; zeros hide keys.
        times: Number of query heads that share a key head.
        scale: Factor of the scores; None for the default.

    Returns:
        Attention output [batch, length, heads * size], and all keys and values so far.
    """
    from openvino import Type
    from openvino import opset13 as ops

    query, *new = made
    keys, values = (ops.concat([old, value], -2) for old, value in zip(past, new, strict=True))
    inputs = [query, *(_repeated(value, times) for value in (keys, values)), _visible(query, mask)]
    if scale is not None:
        inputs.append(ops.constant(np.float32(scale), Type.f32))
    outputs = ops.scaled_dot_product_attention(*inputs)
    flat = ops.reshape(ops.transpose(outputs, ops.constant(_HEADS_FIRST)), ops.constant([0, 0, -1]), special_zero=True)
    return flat, keys, values


def _repeated(value: Any, times: int) -> Node:
    """Repeat each head of [batch, heads, length, size] for the queries that share it."""
    from openvino import opset13 as ops

    if times == 1:
        return value
    shape = ops.constant([1, 1, times, 1, 1])
    expanded = ops.broadcast(ops.unsqueeze(value, ops.constant(2)), shape, None, "bidirectional")
    shared, size = (value.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
    return ops.reshape(expanded, ops.constant([0, shared * times, -1, size]), special_zero=True)


def _visible(query: object, mask: object) -> Node:
    """Return which keys each query sees, boolean [batch, 1, length, total length].

    Each query sees at least its own key. A query on left padding would otherwise see no key, and OpenVINO's
    definition of attention would return NaN.
    """
    from openvino import Type
    from openvino import opset13 as ops

    zero, unit = ops.constant(0, Type.i64), ops.constant(1, Type.i64)
    total = ops.gather(ops.shape_of(mask, Type.i64), unit, zero)
    length = ops.gather(ops.shape_of(query, Type.i64), ops.constant(2, Type.i64), zero)
    key_positions = ops.range(zero, total, unit, Type.i64)
    query_positions = ops.unsqueeze(ops.range(ops.subtract(total, length), total, unit, Type.i64), unit)
    causal, own_key = (
        compare(ops.unsqueeze(key_positions, zero), query_positions) for compare in (ops.less, ops.equal)
    )
    unmasked = ops.unsqueeze(ops.convert(mask, "boolean"), ops.constant([1, 2], Type.i64))
    causal_mask = ops.logical_and(ops.unsqueeze(causal, ops.constant([0, 1], Type.i64)), unmasked)
    return ops.logical_or(causal_mask, ops.unsqueeze(own_key, ops.constant([0, 1], Type.i64)))


class _WeightConverter:
    """Converter of operators that read few-bit weights; a table that is looked up and multiplied is stored once."""

    def __init__(self) -> None:
        self._written: dict[str, Any] = {}

    def product(self, node: Node) -> Sequence[Any]:
        """Convert `MatMulNBits`."""
        from openvino import opset13 as ops

        zeros, bias = (_optional_input(node, index) for index in (_ZEROS, _BIAS))
        weight = self._weight(node.get_input(1), node.get_input(2), zeros, node.get_attribute("bits"))
        # The last block may be filled with columns that are no weights.
        columns = node.get_attribute("K")
        if weight.get_output_shape(0)[1] != columns:
            weight = ops.slice(weight, *(ops.constant([end]) for end in (0, columns, 1, 1)))
        product = ops.matmul(node.get_input(0), weight, False, True)
        return [(product if bias is None else ops.add(product, bias)).output(0)]

    def rows(self, node: Node) -> Sequence[Any]:
        """Convert `GatherBlockQuantized`."""
        from openvino import opset13 as ops

        table, ids = (node.get_input(index) for index in range(2))
        if table.get_node().get_type_name() == "Reshape":
            table = table.get_node().input_value(0)
        weight = self._weight(table, node.get_input(2), _optional_input(node, 3), node.get_attribute("bits"))
        return [ops.gather(weight, ids, ops.constant(0)).output(0)]

    def _weight(self, integers: Any, scales: Any, zeros: Any, bits: int) -> Node:
        """Return dequantized weights [rows, columns]; without zero points, integers are centred on their range."""
        from openvino import opset13 as ops

        name = integers.get_node().get_friendly_name()
        if name not in self._written:
            packed, factors = _constant(integers), _constant(scales.get_node().input_value(0))
            shape = [*factors.shape, packed.shape[2] * _BYTE // bits]
            zero_integers = None if zeros is None else _unpacked(_constant(zeros), bits)[:, : shape[1], np.newaxis]
            if bits < _FEWEST:
                # Two and three bits become four. Centred integers move to the centre of the wider range.
                offset = np.uint8((1 << _FEWEST - 1) - (1 << bits - 1) if zeros is None else 0)
                packed, bits = pack(_unpacked(packed.reshape(1, -1), bits) + offset, _FEWEST), _FEWEST
            dequantized = _integer_constant(packed, shape, bits, zeros is None, name)
            if zero_integers is not None:
                zero_points = _integer_constant(
                    pack(zero_integers.reshape(1, -1), bits), zero_integers.shape, bits, False, f"{name}/zero_point"
                )
                dequantized = ops.subtract(dequantized, zero_points)
            scale_node = ops.constant(factors[..., np.newaxis])
            scale_node.set_friendly_name(f"{name}/scale")
            weights, flat_shape = ops.multiply(dequantized, scale_node), [shape[0], shape[1] * shape[2]]
            self._written[name] = ops.convert(ops.reshape(weights, ops.constant(flat_shape), False), "f32")
        return self._written[name]


def _optional_input(node: Node, index: int) -> Node | None:
    """Return an optional input of a node, or None if it is left out."""
    if node.get_input_size() <= index:
        return None
    value = node.get_input(index)
    return None if value.get_node().get_type_name() == "NullNode" else value


def _integer_constant(packed: np.ndarray, shape: Sequence[int], bits: int, signed: bool, name: str) -> Node:
    """Return a constant of integers as float16; ``signed`` integers are centred, so that their middle becomes 0."""
    from openvino import Shape, Tensor, Type
    from openvino import opset13 as ops
    from openvino.op import Constant

    # The middle is the highest bit of each, which is the sign's where numbers are signed.
    sign_bits = sum(1 << bit for bit in range(bits - 1, _BYTE, bits))
    # Flipping the highest bit of each integer turns an offset representation into two's complement.
    content = packed.reshape(-1) ^ np.uint8(sign_bits) if signed else np.array(packed.reshape(-1))
    kind = {4: (Type.u4, Type.i4), 8: (Type.u8, Type.i8)}[bits][signed]
    constant = Constant(Tensor(content, Shape(shape), kind), shared_memory=False)
    constant.set_friendly_name(name)
    return ops.convert(constant, "f16")


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers of each row of bytes, the first in the low bits."""
    digits = [packed >> np.uint8(shift) & np.uint8((1 << bits) - 1) for shift in range(0, _BYTE, bits)]
    return np.stack(digits, axis=-1).reshape(len(packed), -1)
