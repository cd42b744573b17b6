"""What makes up for rounding, by what layers are really given: their biases, and errors that cancel.

Bias correction takes off a layer's bias what rounding shifts its mean output by:
Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with means
from the calibration data (their appendix D): the shift of output k is sum_j E[Q(x_j)] Q(w_jk) - E[x_j] w_jk.

Filters that take differences of neighbours lose most by rounding to the nearest: their weights are large, and their
outputs small. Errors that make up for each other leave the grid, the ranges and the file as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from compress.formats.onnx.graph_edits import constant, only_consumer
from compress.formats.onnx.int8.fuse_integer_ops import DequantizedValue, quantized_source
from compress.formats.onnx.int8.observers import Feed, TensorStatistics, stream_activations
from compress.formats.onnx.int8.redundant_qdq import restored
from compress.formats.onnx.int8.select_nodes import WEIGHTED, QuantizableLayer


def mean_errors(
    graph: onnx.ModelProto,
    coarse: onnx.ModelProto,
    layers: Sequence[QuantizableLayer],
    observed: Mapping[str, TensorStatistics],
    feeds: Iterable[Feed],
) -> dict[str, np.ndarray]:
    """Layer -> the shift of each output's mean, [outputs], for layers that have a bias.

    ``coarse`` is ``graph`` with `QuantizeLinear` and `DequantizeLinear` around the layers; what they are given is the
    float graph's own, so that each layer answers for itself.
    """
    exact = {str(node.name): node for node in ir.from_proto(graph).graph}
    rounded = {str(node.name): node for node in ir.from_proto(coarse).graph}
    scales, found = {}, {}
    for layer in layers:
        value = exact[layer.name].inputs[0]
        stored = quantized_source(rounded[layer.name].inputs[0])
        if value is not None and stored is not None and bias_of(exact[layer.name]) is not None:
            scales[str(value.name)] = (stored, layer.channel_axis)
    means = _rounded_means(graph, scales, feeds)
    for layer in layers:
        node = exact[layer.name]
        name = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        weight, coarse_weight = constant(node.inputs[WEIGHTED[layer.operator]]), _restored(rounded[layer.name])
        if name in means and weight is not None and coarse_weight is not None and bias_of(node) is not None:
            before = _means_out(node, weight, observed[name].mean)
            found[layer.name] = _means_out(node, coarse_weight, means[name]) - before
    return found


def correct_biases(graph: onnx.ModelProto, errors: Mapping[str, np.ndarray]) -> None:
    """Take the shifts off the layers' biases, in place."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in ir.from_proto(graph).graph:
        if str(node.name) in errors:
            bias = bias_of(node)
            assert bias is not None, "only layers with a bias have a shift"
            _take_off(stored[str(bias.name)], errors[str(node.name)])


def correct_rounded(coarse: onnx.ModelProto, graph: onnx.ModelProto, errors: Mapping[str, np.ndarray]) -> None:
    """The same of ``coarse``, which was made of ``graph``: as rounding the layers anew would, their biases corrected.

    No more than biases changes by it, in float those of products, in integers those of other layers.
    """
    floats = {str(node.name): bias for node in ir.from_proto(graph).graph if (bias := bias_of(node)) is not None}
    stored = {tensor.name: tensor for tensor in coarse.graph.initializer}
    for node in ir.from_proto(coarse).graph:
        if str(node.name) not in errors:
            continue
        bias, error = floats[str(node.name)], errors[str(node.name)]
        held = None if node.op_type == "MatMul" else quantized_source(node.inputs[2])
        if held is None:
            _take_off(stored[str(bias.name)], error)
            continue
        array, scale = constant(bias), constant(held.scale)
        assert array is not None and scale is not None, "biases and their scales are stored"
        steps = np.rint((array - error.astype(np.float32)) / scale.reshape(-1).astype(np.float64))
        limits = np.iinfo(np.int32)
        tensor = stored[str(held.integers.name)]
        integers = np.clip(steps, limits.min, limits.max).astype(np.int32)
        tensor.CopyFrom(numpy_helper.from_array(integers, tensor.name))


def _take_off(tensor: onnx.TensorProto, error: np.ndarray) -> None:
    array = numpy_helper.to_array(tensor) - error.astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def bias_of(node: ir.Node) -> ir.Value | None:
    """The stored bias that no other node reads: an input of the node, or of the addition after it."""
    if node.op_type == "MatMul":
        end = only_consumer(node.outputs[0], "Add", "BiasGelu")
        candidates = [] if end is None else [value for value in end.inputs if value is not node.outputs[0]]
    else:
        candidates = list(node.inputs[2:3])
    bias = next((value for value in candidates if value is not None), None)
    array = constant(bias)
    return bias if bias is not None and array is not None and array.ndim == 1 and len(list(bias.uses())) == 1 else None


def _rounded_means(
    graph: onnx.ModelProto, scales: Mapping[str, tuple[DequantizedValue, int]], feeds: Iterable[Feed]
) -> dict[str, np.ndarray]:
    """E[Q(x)] by channel."""
    totals: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for values in stream_activations(graph, list(scales), feeds):
        for name, array in values.items():
            stored, axis = scales[name]
            rows = np.moveaxis(round_with(stored, array), axis, -1).reshape(-1, array.shape[axis])
            totals[name] = totals.get(name, 0.0) + rows.sum(axis=0, dtype=np.float64)
            counts[name] = counts.get(name, 0) + len(rows)
    return {name: total / counts[name] for name, total in totals.items()}


def round_with(stored: DequantizedValue, values: np.ndarray) -> np.ndarray:
    """What `QuantizeLinear` and `DequantizeLinear` with one scale make of ``values``."""
    scale, zero = constant(stored.scale), constant(stored.zero_point)
    assert scale is not None and zero is not None, "scales are stored"
    limits = np.iinfo(zero.dtype)
    shift = np.float32(zero)
    rounded: np.ndarray = (np.clip(np.rint(values / scale) + shift, limits.min, limits.max) - shift) * scale
    return rounded


def _restored(node: ir.Node) -> np.ndarray | None:
    """The weights that a node's integers stand for."""
    weight = node.inputs[WEIGHTED[node.op_type]]
    maker = weight.producer() if weight is not None else None
    return restored(maker) if maker is not None and maker.op_type == "DequantizeLinear" else None


def _means_out(node: ir.Node, weight: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Mean output without bias, of mean inputs [channels]; at the rim of an image padding makes this inexact."""
    result: np.ndarray
    if node.op_type == "MatMul":
        result = means @ weight
        return result
    if node.op_type == "Gemm":
        result = means @ (weight.T if node.attributes.get_int("transB", 0) else weight)
        return result
    groups = node.attributes.get_int("group", 1)
    kernel = weight.reshape(*weight.shape[:2], -1).sum(axis=-1)
    grouped = kernel.reshape(groups, -1, kernel.shape[1])
    result = np.einsum("goi,gi->go", grouped, means.reshape(groups, -1)).reshape(-1)
    return result


_FEEDS = 48
"""Examples whose every position counts: enough for the few inputs that a convolution has."""


def input_products(
    graph: onnx.ModelProto, layers: Sequence[QuantizableLayer], feeds: Iterable[Feed]
) -> dict[str, torch.Tensor]:
    """Layer -> sum of x x^T over its patches, [groups, inputs, inputs], of the convolutions among ``layers``."""
    nodes = {str(node.name): node for node in ir.from_proto(graph).graph}
    chosen = {
        layer.name: nodes[layer.name] for layer in layers if layer.operator == "Conv" and _is_plain(nodes[layer.name])
    }
    names = {name: str(node.inputs[0].name) for name, node in chosen.items() if node.inputs[0] is not None}
    totals: dict[str, torch.Tensor] = {}
    for place, values in enumerate(stream_activations(graph, sorted(set(names.values())), feeds)):
        if place == _FEEDS:
            break
        for name, node in chosen.items():
            found = _patches(node, torch.from_numpy(values[names[name]]))
            product = found @ found.transpose(1, 2)
            totals[name] = totals[name] + product if name in totals else product
    return totals


def round_weights(
    graph: onnx.ModelProto, model: ir.Model, layers: Sequence[QuantizableLayer], products: Mapping[str, torch.Tensor]
) -> None:
    """Better integers for ``graph``, in place, where `insert_qdq` has put the nearest to the weights of ``model``."""
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
        steps = np.broadcast_to(numpy_helper.to_array(scale).reshape(-1), weight.shape[0]).reshape(shape[:2])
        found = round_with_feedback(
            torch.from_numpy(weight.reshape(shape).copy()),
            torch.from_numpy(steps.copy()),
            products[layer.name],
            int(np.abs(nearest.astype(int)).max()),
        )
        integers.CopyFrom(numpy_helper.from_array(found.numpy().reshape(weight.shape), integers.name))


def _is_plain(node: ir.Node) -> bool:
    weight = constant(node.inputs[1])
    return weight is not None and weight.ndim == 4 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"


def _patches(node: ir.Node, values: torch.Tensor) -> torch.Tensor:
    """What each weight is multiplied with, [groups, inputs, positions]."""
    weight = constant(node.inputs[1])
    assert weight is not None, "looked at before"
    kernel = weight.shape[2:]
    top, left, bottom, right = node.attributes.get_ints("pads", [0, 0, 0, 0])
    padded = torch.nn.functional.pad(values, (left, right, top, bottom))
    stride, dilation = (tuple(node.attributes.get_ints(name, [1, 1])) for name in ("strides", "dilations"))
    found = torch.nn.functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    groups = node.attributes.get_int("group", 1)
    return found.transpose(0, 1).reshape(groups, weight[0].size, -1)


def round_with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, highest: int, damping: float = 0.01
) -> torch.Tensor:
    """Integers [groups, outputs, inputs] within +-``highest`` for ``weight`` of that shape.

    ``scales`` is [groups, outputs], ``hessian`` [groups, inputs, inputs] the sum of x x^T over what the group is given.
    Inputs are rounded in turn, and each error e_j is spread over those that follow, W_k -= e_j U_jk / U_jj with U the
    upper Cholesky factor of the damped Hessian's inverse (GPTQ, Frantar et al. 2023, section 3.3).
    """
    inputs = weight.shape[-1]
    diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
    added = (damping * diagonal.mean(dim=-1)).clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.double() + torch.diag_embed(added.double()[:, None].expand(-1, inputs))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    left, steps = weight.double().clone(), scales.double()
    found = torch.empty(weight.shape, dtype=torch.int8)
    for place in range(inputs):
        column = left[..., place]
        whole = (column / steps).round().clamp(-highest, highest)
        found[..., place] = whole.to(torch.int8)
        error = (column - whole * steps) / upper[:, place, place, None]
        left[..., place + 1 :] -= error[..., None] * upper[:, None, place, place + 1 :]
    return found
