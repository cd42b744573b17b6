"""Products of unsigned and signed bytes with stored weights, in which x86 processors without VNNI saturate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from compress.formats.onnx.graph_edits import constant, input_at
from compress.formats.onnx.int8.fuse_integer_ops import DequantizedValue, quantized_source
from compress.formats.onnx.model import all_graphs
from compress.numerics.int8_activations import cut_pairs, pairs_at_risk, without_saturation

_INTEGER_INPUTS = {
    "MatMulInteger": (0, 1, 2),
    "QAttention": (0, 1, 6),
    "MatMulIntegerToFloat": (0, 1, 4),
    "QLinearMatMul": (0, 3, 2),
}
"""Operator -> indices of its activations, weights and the activations' zero point."""
_QUANTIZED, _SCALE, _TURNED = "_quantized", "_scale", "_Transposed"
"""Suffixes that ONNX Runtime's quantizer adds to the name of a weight."""


@dataclass(frozen=True, eq=False)
class ByteProduct:
    """A product with ``weights`` [inner, outer].

    ``unfold`` turns activations and their zero point into rows [n, groups * inner]; each of the ``groups`` computes as
    many columns from its part of the rows. ``stored`` is the name of the weights in the graph, ``bias`` the source of
    an integer bias. ``observable``: the activations can become an output of the graph.
    """

    layer: str
    operator: str
    activations: str
    zero_point: str | int
    stored: str
    weights: np.ndarray
    as_matrix: Callable[[np.ndarray], np.ndarray]
    as_stored: Callable[[np.ndarray], np.ndarray]
    unfold: Callable[[np.ndarray, int], np.ndarray]
    groups: int
    bias: DequantizedValue | None
    observable: bool


def byte_products(model: ir.Model) -> Iterator[ByteProduct]:
    """Yield every product of unsigned and signed bytes, in branches too; other kernels multiply equal signedness."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        bias = None
        if node.op_type in _INTEGER_INPUTS:
            activations, weights, zero = (input_at(node, index) for index in _INTEGER_INPUTS[node.op_type])
        elif node.op_type in ("MatMul", "Gemm", "Conv"):
            # Standard operators between `DequantizeLinear` become integer kernels when the graph is loaded.
            first, second = quantized_source(node.inputs[0]), quantized_source(node.inputs[1])
            if first is None or second is None:
                continue
            activations, weights, zero = first.integers, second.integers, first.zero_point
            bias = quantized_source(input_at(node, 2))
        else:
            continue
        array = constant(weights)
        if activations is None or weights is None or array is None or array.dtype != np.int8:
            continue
        if array.ndim < 3 if node.op_type == "Conv" else array.ndim != 2:
            continue
        groups = node.attributes.get_int("group", 1)
        # Depthwise convolutions have kernels of their own, which sum in 32 bits.
        if groups > 1 and array.shape[:2] == (groups, 1):
            continue
        stored = np.array(0) if zero is None else constant(zero)
        # Signed activations are multiplied by another instruction.
        if stored is not None and stored.dtype == np.int8:
            continue
        maker = activations.producer()
        to, back, unfold = _layout(node, array)
        yield ByteProduct(
            layer=str(node.name),
            operator=node.op_type,
            activations=str(activations.name),
            zero_point=int(stored.item()) if stored is not None else str(zero.name),  # type: ignore[union-attr]
            stored=str(weights.name),
            weights=to(array),
            as_matrix=to,
            as_stored=back,
            unfold=unfold,
            groups=groups,
            bias=bias,
            observable=maker is None or maker.graph is model.graph,
        )


def keep_from_saturating(graph: onnx.ModelProto, source: onnx.ModelProto) -> list[str]:
    """Replace weights that may saturate by ones on a coarser grid, in place; return the layers concerned.

    ``source`` is the float graph that ``graph`` was quantized from. Integer biases are rescaled.
    """
    tensors, floats = _stored_tensors(graph), _stored_tensors(source)
    products = [candidate for candidate in byte_products(ir.from_proto(graph)) if pairs_at_risk(candidate.weights)]
    for product in {candidate.stored: candidate for candidate in products}.values():
        # The quantizer's names lead back to the float weights.
        name = product.stored.removesuffix(_QUANTIZED)
        scale = tensors[name + _SCALE]
        old_scale = numpy_helper.to_array(scale)
        weights = _weights(product, old_scale.reshape(-1), floats.get(name.removesuffix(_TURNED)))
        integers, flat = without_saturation(weights, old_scale.reshape(-1))
        _write(tensors[product.stored], product.as_stored(integers))
        _write(scale, flat.reshape(old_scale.shape))
        # A bias is stored in steps of input scale times weight scale, so it follows the weights' scale.
        if product.bias is not None:
            held, steps = (tensors[str(value.name)] for value in (product.bias.integers, product.bias.scale))
            wider = flat.reshape(old_scale.shape) / old_scale
            _write(held, (numpy_helper.to_array(held) / wider).round().astype(np.int32))
            _write(steps, numpy_helper.to_array(steps) * wider)
    return [candidate.layer for candidate in products]


def cut_saturating(graph: onnx.ModelProto) -> list[str]:
    """Reduce pairs of weights that may saturate, in place, with unchanged scales; return the layers concerned."""
    tensors = _stored_tensors(graph)
    products = [candidate for candidate in byte_products(ir.from_proto(graph)) if pairs_at_risk(candidate.weights)]
    for product in products:
        _write(tensors[product.stored], product.as_stored(cut_pairs(product.weights)))
    return [candidate.layer for candidate in products]


def _stored_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return all initializers by name, those of branches included."""
    return {tensor.name: tensor for graph in all_graphs(model.graph) for tensor in graph.initializer}


def _weights(product: ByteProduct, scales: np.ndarray, tensor: onnx.TensorProto | None) -> np.ndarray:
    """Return float weights [inner, outer] of ``tensor``, possibly transposed, or those that the integers represent."""
    rounded: np.ndarray = product.weights * scales
    for array in () if tensor is None else (numpy_helper.to_array(tensor), numpy_helper.to_array(tensor).T):
        if array.shape == product.as_stored(rounded).shape:
            matrix = product.as_matrix(array)
            # The tensor is only used if the integers are its rounded values.
            if np.abs(matrix - rounded).max() <= scales.max():
                return matrix
    return rounded


def _write(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    """Replace the values of a stored tensor."""
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def _layout(node: ir.Node, array: np.ndarray) -> tuple[Callable[..., np.ndarray], ...]:
    """Return functions that convert stored weights to [inner, outer] and back, and activations to rows."""
    if node.op_type != "Conv":
        turned = bool(node.attributes.get_int("transB", 0))

        def turn(matrix: np.ndarray) -> np.ndarray:
            return matrix.T if turned else matrix

        return turn, turn, lambda values, zero: values.reshape(-1, array.shape[1 if turned else 0])
    # ONNX Runtime's integer convolution sums over kernel positions, and over channels within each.
    outer, channels, *kernel = array.shape
    axes = len(kernel)
    pads = node.attributes.get_ints("pads", [0] * 2 * axes)
    strides = node.attributes.get_ints("strides", [1] * axes)
    dilations = node.attributes.get_ints("dilations", [1] * axes)

    def as_matrix(weights: np.ndarray) -> np.ndarray:
        return np.moveaxis(weights, (1, 0), (-2, -1)).reshape(-1, outer)

    def as_stored(matrix: np.ndarray) -> np.ndarray:
        return np.moveaxis(matrix.reshape(*kernel, channels, outer), (-2, -1), (1, 0))

    def unfold(values: np.ndarray, zero: int) -> np.ndarray:
        # Padding has the value of the zero point.
        around = ((0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True))
        padded = np.pad(values, around, constant_values=zero)
        reach = [(size - 1) * apart + 1 for size, apart in zip(kernel, dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
        steps = (slice(None, None, step) for step in (*strides, *dilations))
        windows = windows[:, :, *steps]
        split = np.moveaxis(windows, 1, -1).reshape(-1, math.prod(kernel), padded.shape[1] // channels, channels)
        rows: np.ndarray = split.swapaxes(1, 2).reshape(len(split), -1)
        return rows

    return as_matrix, as_stored, unfold
