"""A decoder's ONNX graph as a stateful IR, which openvino-genai and optimum-intel open: the runtime keeps the cache.

Inputs are `input_ids` and `position_ids` [batch, length], `attention_mask` [batch, total length] and `beam_idx`
[batch], which row each one goes on from; the output is `logits`. Attention becomes OpenVINO's own operator. Few-bit
weights keep their integers and scales, in the form that its plugins multiply without making them float: a constant of 4
or 8 bits, less its zero points, times its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.generation.decoder import present_of
from compress.formats.onnx.decoder.stored_weight import pack
from compress.formats.openvino.runtime import BEAMS, IDS

_MICROSOFT = "com.microsoft"
_STATE = "past_"
_TURNED = [0, 2, 1, 3]
_ZEROS, _BIAS = 3, 5
"""Inputs of `MatMulNBits` that may be left out."""
_BYTE, _FEWEST = 8, 4
"""Bits, and those that OpenVINO multiplies with at least."""


def read_stateful(graph: Path) -> Any:
    """Read the ONNX graph at a path, as `compress.formats.onnx.decoder` writes it; raise `RuntimeError`."""
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    weights = _Weights()
    writers = {
        "GroupQueryAttention": _attention,
        "MatMulNBits": weights.product,
        "GatherBlockQuantized": weights.rows,
    }
    for kind, write in writers.items():
        core.add_extension(ConversionExtension(kind, _MICROSOFT, write))
    model = core.read_model(graph)
    _multiply_turned(model)
    keep_states(model)
    return model


def _multiply_turned(model: Any) -> None:
    """Products with a stored matrix that is turned first take it as it is stored."""
    for product in model.get_ops():
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_b"]:
            continue
        turned = product.input_value(1).get_node()
        if turned.get_type_name() == "Transpose" and turned.input_value(0).get_node().get_type_name() == "Constant":
            product.set_arguments([product.input_value(0), turned.input_value(0)])
            product.set_attribute("transpose_b", True)


def keep_states(model: Any) -> None:
    """Make the cache's inputs and outputs states, whose rows follow `beam_idx`, and which begin empty or zero."""
    from openvino import PartialShape, Type
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    pasts = [port.any_name for port in model.inputs if port.any_name.startswith(_STATE)]
    rows = model.input(IDS).get_partial_shape()[0]
    beams = ops.parameter(PartialShape([rows]), Type.i32, BEAMS)
    model.add_parameters([beams])
    beams.output(0).get_tensor().set_names({BEAMS})
    for name in pasts:
        past = model.input(name)
        readers = past.get_target_inputs()
        chosen = ops.gather(past, beams, ops.constant(0, Type.i64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: present_of(name) for name in pasts})
    ids = model.input(IDS)
    batch = ops.gather(ops.shape_of(ids, Type.i64), ops.constant([0], Type.i64), ops.constant(0, Type.i64))
    for state in model.get_ops():
        if state.get_type_name() == "ReadValue":
            sizes = [axis.get_min_length() for axis in state.get_output_partial_shape(0)]
            axes = [batch, *(ops.constant([size], Type.i64) for size in sizes[1:])]
            zeros = ops.broadcast(ops.constant(0, state.get_output_element_type(0)), ops.concat(axes, 0))
            state.set_arguments([zeros])
    model.validate_nodes_and_infer_types()


def _heads(value: Any, heads: int) -> Any:
    """[batch, length, heads * size] as [batch, heads, length, size]; what was turned the other way before is undone."""
    from openvino import opset13 as ops

    flat = value.get_node()
    if flat.get_type_name() == "Reshape":
        turned = flat.input_value(0).get_node()
        if turned.get_type_name() == "Transpose" and _constant(turned.input_value(1)).tolist() == _TURNED:
            return turned.input_value(0)
    apart = ops.reshape(value, ops.constant([0, 0, heads, -1]), special_zero=True)
    return ops.transpose(apart, ops.constant(_TURNED)).output(0)


def _constant(value: Any) -> np.ndarray:
    data: np.ndarray = value.get_node().data
    return data


def _attention(node: Any) -> Sequence[Any]:
    """Causal attention over what is past and new; rows of the mask that are 0 are hidden."""
    heads, shared = node.get_attribute("num_heads"), node.get_attribute("kv_num_heads")
    query, key, value = (node.get_input(index) for index in range(3))
    query, key, value = _heads(query, heads), _heads(key, shared), _heads(value, shared)
    past, mask = (node.get_input(3), node.get_input(4)), node.get_input(5)
    scale = node.get_attribute("scale") if node.has_attribute("scale") else None
    return [one.output(0) for one in attention((query, key, value), past, mask, heads // shared, scale)]


def attention(
    made: Sequence[Any], past: Sequence[Any], mask: Any, times: int, scale: float | None = None
) -> tuple[Any, Any, Any]:
    """Of query, key and value [batch, heads, length, size], each of the latter shared by so many heads of the former.

    Gives what they mix, [batch, length, heads * size], and the keys and values behind those that are ``past``.
    """
    from openvino import Type
    from openvino import opset13 as ops

    query, *new = made
    keys, values = (ops.concat([old, one], -2) for old, one in zip(past, new, strict=True))
    inputs = [query, *(_repeated(one, times) for one in (keys, values)), _visible(query, mask)]
    if scale is not None:
        inputs.append(ops.constant(np.float32(scale), Type.f32))
    found = ops.scaled_dot_product_attention(*inputs)
    flat = ops.reshape(ops.transpose(found, ops.constant(_TURNED)), ops.constant([0, 0, -1]), special_zero=True)
    return flat, keys, values


def _repeated(value: Any, times: int) -> Any:
    """Repeat each head of [batch, heads, length, size] for the queries that share it."""
    from openvino import opset13 as ops

    if times == 1:
        return value
    shape = ops.constant([1, 1, times, 1, 1])
    each = ops.broadcast(ops.unsqueeze(value, ops.constant(2)), shape, None, "bidirectional")
    shared, size = (value.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
    return ops.reshape(each, ops.constant([0, shared * times, -1, size]), special_zero=True)


def _visible(query: Any, mask: Any) -> Any:
    """Return which keys each query sees, boolean [batch, 1, length, total length].

    Each query sees its own key at least. A query on left padding would otherwise see no key, which OpenVINO's
    definition of attention turns into NaN.
    """
    from openvino import Type
    from openvino import opset13 as ops

    zero, one = ops.constant(0, Type.i64), ops.constant(1, Type.i64)
    total = ops.gather(ops.shape_of(mask, Type.i64), one, zero)
    length = ops.gather(ops.shape_of(query, Type.i64), ops.constant(2, Type.i64), zero)
    places = ops.range(zero, total, one, Type.i64)
    own = ops.unsqueeze(ops.range(ops.subtract(total, length), total, one, Type.i64), one)
    causal, itself = (compare(ops.unsqueeze(places, zero), own) for compare in (ops.less, ops.equal))
    given = ops.unsqueeze(ops.convert(mask, "boolean"), ops.constant([1, 2], Type.i64))
    before = ops.logical_and(ops.unsqueeze(causal, ops.constant([0, 1], Type.i64)), given)
    return ops.logical_or(before, ops.unsqueeze(itself, ops.constant([0, 1], Type.i64)))


class _Weights:
    """Writes what reads few-bit weights; a table that is looked up and multiplied with is stored once."""

    def __init__(self) -> None:
        self._written: dict[str, Any] = {}

    def product(self, node: Any) -> Sequence[Any]:
        """`MatMulNBits`."""
        from openvino import opset13 as ops

        zeros, bias = (_given(node, place) for place in (_ZEROS, _BIAS))
        weight = self._weight(node.get_input(1), node.get_input(2), zeros, node.get_attribute("bits"))
        product = ops.matmul(node.get_input(0), _whole(weight, node.get_attribute("K")), False, True)
        return [(product if bias is None else ops.add(product, bias)).output(0)]

    def rows(self, node: Any) -> Sequence[Any]:
        """`GatherBlockQuantized`."""
        from openvino import opset13 as ops

        table, ids = (node.get_input(place) for place in range(2))
        if table.get_node().get_type_name() == "Reshape":
            table = table.get_node().input_value(0)
        weight = self._weight(table, node.get_input(2), _given(node, 3), node.get_attribute("bits"))
        return [ops.gather(weight, ids, ops.constant(0)).output(0)]

    def _weight(self, integers: Any, scales: Any, zeros: Any, bits: int) -> Any:
        """Float32 [rows, columns]; about the middle of the integers where no zero points are given."""
        from openvino import opset13 as ops

        name = integers.get_node().get_friendly_name()
        if name not in self._written:
            packed, factors = _constant(integers), _constant(scales.get_node().input_value(0))
            shape = [*factors.shape, packed.shape[2] * _BYTE // bits]
            lows = None if zeros is None else _unpacked(_constant(zeros), bits)[:, : shape[1], np.newaxis]
            if bits < _FEWEST:
                lift = np.uint8((1 << _FEWEST - 1) - (1 << bits - 1) if zeros is None else 0)
                packed, bits = pack(_unpacked(packed.reshape(1, -1), bits) + lift, _FEWEST), _FEWEST
            made = _stored(packed, shape, bits, zeros is None, name)
            if lows is not None:
                held = _stored(pack(lows.reshape(1, -1), bits), lows.shape, bits, False, f"{name}/zero_point")
                made = ops.subtract(made, held)
            halves = ops.constant(factors[..., np.newaxis])
            halves.set_friendly_name(f"{name}/scale")
            flat = ops.reshape(ops.multiply(made, halves), ops.constant([shape[0], shape[1] * shape[2]]), False)
            self._written[name] = ops.convert(flat, "f32")
        return self._written[name]


def _given(node: Any, place: int) -> Any:
    """Return an optional input of a node, or None if it is left out."""
    if node.get_input_size() <= place:
        return None
    found = node.get_input(place)
    return None if found.get_node().get_type_name() == "NullNode" else found


def _stored(packed: np.ndarray, shape: Sequence[int], bits: int, signed: bool, name: str) -> Any:
    """A constant of integers as float16. ``signed``: they are about their middle, which becomes 0."""
    from openvino import Shape, Tensor, Type
    from openvino import opset13 as ops
    from openvino.op import Constant

    # The middle is the highest bit of each, which is the sign's where numbers are signed.
    middles = sum(1 << place for place in range(bits - 1, _BYTE, bits))
    content = packed.reshape(-1) ^ np.uint8(middles) if signed else np.array(packed.reshape(-1))
    kind = {4: (Type.u4, Type.i4), 8: (Type.u8, Type.i8)}[bits][signed]
    constant = Constant(Tensor(content, Shape(shape), kind), shared_memory=False)
    constant.set_friendly_name(name)
    return ops.convert(constant, "f16")


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the integers of each row of bytes, the first in the low bits."""
    apart = [packed >> np.uint8(place) & np.uint8((1 << bits) - 1) for place in range(0, _BYTE, bits)]
    return np.stack(apart, axis=-1).reshape(len(packed), -1)


def _whole(weight: Any, columns: int) -> Any:
    """Without what fills the last block."""
    from openvino import opset13 as ops

    if weight.get_output_shape(0)[1] == columns:
        return weight
    ends = [ops.constant([end]) for end in (0, columns, 1, 1)]
    return ops.slice(weight, *ends)
