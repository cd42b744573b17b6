"""Weights of convolutions rounded so that their errors cancel on what the layers are really given.

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

from compress.formats.onnx.fusions.graph import constant
from compress.formats.onnx.int8.choose import WEIGHTED, QuantizableLayer
from compress.formats.onnx.int8.observe import Feed, tap

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
    for place, values in enumerate(tap(graph, sorted(set(names.values())), feeds)):
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
