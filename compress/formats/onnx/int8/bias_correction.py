"""Compensation of rounding on calibration data: corrected biases, and weights whose rounding errors cancel.

Bias correction subtracts from a layer's bias the shift of its mean output by rounding. Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with means from the
calibration data (appendix D): the shift of output k is sum_j E[Q(x_j)] Q(w_jk) - E[x_j] w_jk.

Convolutions that compute differences of neighbours lose most by rounding to the nearest: their weights are large,
and their outputs small. Rounding with error feedback leaves the grid, the ranges and the file size as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from compress.formats.onnx.graph_edits import constant, input_at, only_consumer, other_operand, producer, rank
from compress.formats.onnx.int8.fuse_integer_ops import DequantizedValue, quantized_source
from compress.formats.onnx.int8.observers import ActivationStatistics, Feed, stream_activations
from compress.formats.onnx.int8.qdq_cleanup import restored
from compress.formats.onnx.int8.select_nodes import WEIGHTED, QuantizableLayer


def mean_errors(
    graph: onnx.ModelProto,
    coarse: onnx.ModelProto,
    layers: Sequence[QuantizableLayer],
    observed: Mapping[str, ActivationStatistics],
    feeds: Iterable[Feed],
) -> dict[str, np.ndarray]:
    """Return the shift of each output's mean [outputs] by layer, for layers that have a bias.

    The inputs of rounded layers are the float graph's, so that each shift is caused by the layer alone.

    Args:
        graph: The float graph.
        coarse: The graph with `QuantizeLinear` and `DequantizeLinear` around the layers.
        layers: The layers.
        observed: Statistics of the float graph's activations.
        feeds: Calibration data.
    """
    exact = {str(node.name): node for node in ir.from_proto(graph).graph}
    rounded = {str(node.name): node for node in ir.from_proto(coarse).graph}
    scales, shifts = {}, {}
    for layer in layers:
        value = exact[layer.name].inputs[0]
        stored = quantized_source(rounded[layer.name].inputs[0])
        # Only layers with a bias can be corrected.
        if value is not None and stored is not None and bias_of(exact[layer.name]) is not None:
            scales[str(value.name)] = (stored, layer.channel_axis)
    # The means of rounded inputs come from the float graph's activations.
    means = _rounded_means(graph, scales, feeds)
    for layer in layers:
        node = exact[layer.name]
        name = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        weight = constant(node.inputs[WEIGHTED[layer.operator]])
        # The float weights that the rounded layer's integers represent.
        dequantize = producer(rounded[layer.name].inputs[WEIGHTED[layer.operator]], "DequantizeLinear")
        if name in means and weight is not None and dequantize is not None and bias_of(node) is not None:
            exact_means = _means_out(node, weight, observed[name].mean)
            shifts[layer.name] = _means_out(node, restored(dequantize), means[name]) - exact_means
    return shifts


def correct_biases(graph: onnx.ModelProto, errors: Mapping[str, np.ndarray]) -> None:
    """Subtract the shifts from the layers' biases, in place."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in ir.from_proto(graph).graph:
        if str(node.name) in errors:
            bias = bias_of(node)
            assert bias is not None, "only layers with a bias have a shift"
            tensor = stored[str(bias.name)]
            array = numpy_helper.to_array(tensor) - errors[str(node.name)].astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return the stored bias that only this node reads: an input of the node, or of the addition after it."""
    bias = input_at(node, 2)
    if node.op_type == "MatMul":
        # A product's bias is added by the node after it.
        end = only_consumer(node.outputs[0], "Add", "BiasGelu")
        bias = None if end is None else other_operand(end, node.outputs[0])
    array = constant(bias)
    return bias if bias is not None and array is not None and array.ndim == 1 and len(bias.uses()) == 1 else None


def _rounded_means(
    graph: onnx.ModelProto, scales: Mapping[str, tuple[DequantizedValue, int]], feeds: Iterable[Feed]
) -> dict[str, np.ndarray]:
    """Return E[Q(x)] by channel."""
    totals: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for values in stream_activations(graph, list(scales), feeds):
        for name, array in values.items():
            stored, axis = scales[name]
            scale, zero = constant(stored.scale), constant(stored.zero_point)
            assert scale is not None and zero is not None, "scales are stored"
            # Round as `QuantizeLinear` and `DequantizeLinear` do.
            limits, shift = np.iinfo(zero.dtype), np.float32(zero)
            rounded = (np.clip(np.rint(array / scale) + shift, limits.min, limits.max) - shift) * scale
            # Channels last, so that every row is one position.
            rows = np.moveaxis(rounded, axis, -1).reshape(-1, array.shape[axis])
            totals[name] = totals.get(name, 0.0) + rows.sum(axis=0, dtype=np.float64)
            counts[name] = counts.get(name, 0) + len(rows)
    return {name: total / counts[name] for name, total in totals.items()}


def _means_out(node: ir.Node, weight: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return the mean output without bias for mean inputs [channels]; padding at image borders makes it inexact."""
    result: np.ndarray
    if node.op_type in ("MatMul", "Gemm"):
        result = means @ (weight.T if node.attributes.get_int("transB", 0) else weight)
        return result
    # Away from the borders a convolution sums its kernel over constant means.
    groups = node.attributes.get_int("group", 1)
    kernel = weight.reshape(*weight.shape[:2], -1).sum(axis=-1)
    grouped = kernel.reshape(groups, -1, kernel.shape[1])
    result = np.einsum("goi,gi->go", grouped, means.reshape(groups, -1)).reshape(-1)
    return result


_FEEDS = 48
"""Number of examples whose every position counts: enough for the few inputs of a convolution."""


def input_products(
    graph: onnx.ModelProto, layers: Sequence[QuantizableLayer], feeds: Iterable[Feed]
) -> dict[str, torch.Tensor]:
    """Return the sum of x x^T over all patches [groups, inputs, inputs] by layer, for convolutions among ``layers``."""
    nodes = {str(node.name): node for node in ir.from_proto(graph).graph}
    # Convolutions with two spatial axes and explicit padding.
    chosen = {
        layer.name: node
        for layer in layers
        if (node := nodes[layer.name]).op_type == "Conv"
        and rank(node.inputs[1]) == 4
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    }
    names = {name: str(node.inputs[0].name) for name, node in chosen.items() if node.inputs[0] is not None}
    totals: dict[str, torch.Tensor] = {}
    for index, values in enumerate(stream_activations(graph, sorted(set(names.values())), feeds)):
        if index == _FEEDS:
            break
        for name, node in chosen.items():
            patches = _patches(node, torch.from_numpy(values[names[name]]))
            product = patches @ patches.transpose(1, 2)
            totals[name] = totals[name] + product if name in totals else product
    return totals


def round_weights(
    graph: onnx.ModelProto, model: ir.Model, layers: Sequence[QuantizableLayer], products: Mapping[str, torch.Tensor]
) -> None:
    """Replace the nearest integers that `insert_qdq` wrote by ones with error feedback, in place.

    Args:
        graph: The quantized graph.
        model: The float graph.
        layers: The layers to round.
        products: Sum of x x^T by layer.
    """
    nodes = {str(node.name): node for node in model.graph}
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for layer in layers:
        integers, scale = stored.get(f"{layer.weight}_quantized"), stored.get(f"{layer.weight}_scale")
        if layer.name not in products or integers is None or scale is None:
            continue
        nearest = numpy_helper.to_array(integers)
        weight = constant(nodes[layer.name].inputs[WEIGHTED[layer.operator]])
        if nearest.dtype != np.int8 or weight is None:
            continue
        groups, inputs = products[layer.name].shape[:2]
        shape = (groups, weight.shape[0] // groups, inputs)
        # The grid of the nearest integers is unchanged: same scales, same largest magnitude.
        steps = np.broadcast_to(numpy_helper.to_array(scale).reshape(-1), weight.shape[0]).reshape(shape[:2])
        rounded = round_with_feedback(
            torch.from_numpy(weight.reshape(shape).copy()),
            torch.from_numpy(steps.copy()),
            products[layer.name],
            int(np.abs(nearest.astype(int)).max()),
        )
        integers.CopyFrom(numpy_helper.from_array(rounded.numpy().reshape(weight.shape), integers.name))


def _patches(node: ir.Node, values: torch.Tensor) -> torch.Tensor:
    """Return the inputs of each weight [groups, inputs, positions]."""
    weight = constant(node.inputs[1])
    assert weight is not None, "looked at before"
    kernel = weight.shape[2:]
    top, left, bottom, right = node.attributes.get_ints("pads", [0, 0, 0, 0])
    padded = torch.nn.functional.pad(values, (left, right, top, bottom))
    stride, dilation = (tuple(node.attributes.get_ints(name, [1, 1])) for name in ("strides", "dilations"))
    unfolded = torch.nn.functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    groups = node.attributes.get_int("group", 1)
    return unfolded.transpose(0, 1).reshape(groups, weight[0].size, -1)


def round_with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, highest: int, damping: float = 0.01
) -> torch.Tensor:
    """Round weights so that errors cancel on real inputs.

    Inputs are rounded in turn, and each error e_j is spread over those that follow, W_k -= e_j U_jk / U_jj with U the
    upper Cholesky factor of the damped Hessian's inverse (GPTQ, Frantar et al. 2023, section 3.3).

    Args:
        weight: Float weights [groups, outputs, inputs].
        scales: Step sizes [groups, outputs].
        hessian: Sum of x x^T over the inputs of a group [groups, inputs, inputs].
        highest: Largest magnitude of an integer.
        damping: Share of the mean diagonal that is added to the diagonal.

    Returns:
        int8 of the shape of ``weight``.
    """
    inputs = weight.shape[-1]
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    added = (damping * diagonal.mean(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
    # Damping keeps the Hessian invertible where inputs are correlated.
    damped = hessian.double() + torch.diag_embed(added.double()[:, None].expand(-1, inputs))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left, steps = weight.double().clone(), scales.double()
    integers = torch.empty(weight.shape, dtype=torch.int8)
    for index in range(inputs):
        column = left[..., index]
        steps_of_column = (column / steps).round().clamp(-highest, highest)
        integers[..., index] = steps_of_column.to(torch.int8)
        # The error of this input is spread over the inputs that are not rounded yet.
        error = (column - steps_of_column * steps) / upper[:, index, index, None]
        left[..., index + 1 :] -= error[..., None] * upper[:, None, index, index + 1 :]
    return integers
