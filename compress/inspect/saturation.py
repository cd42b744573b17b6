"""What an 8-bit graph suffers where pairs of products are added in 16 bits, layer by layer, on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.fusions.graph import constant
from compress.formats.onnx.int8.kernels import quantized
from compress.formats.onnx.int8.observe import Feed, tap
from compress.numerics.saturation import pairs_at_risk, pairwise_saturating

_INTEGER_INPUTS = {
    "MatMulInteger": (0, 1, 2),
    "QAttention": (0, 1, 6),
    "MatMulIntegerToFloat": (0, 1, 4),
    "QLinearMatMul": (0, 3, 2),
}
"""Operator -> where activations, weights and the activations' zero point stand."""
MOST_ROWS = 512
"""Rows of activations that are computed for a layer; each costs as much as its product."""
_NOTICEABLE = 1e-3


@dataclass(frozen=True)
class Saturation:
    """One layer. ``risk`` is the share of weight pairs that some input would cut off, ``cut`` that of the sums that
    real inputs did; ``error`` the root mean square change of the layer's products over their own.

    Without real inputs ``cut`` and ``error`` are None.
    """

    layer: str
    operator: str
    risk: float
    cut: float | None = None
    error: float | None = None

    @property
    def matters(self) -> bool:
        """Whether a person should do something about it."""
        return self.risk > 0 if self.error is None else self.error > _NOTICEABLE


@dataclass(frozen=True, eq=False)
class _Product:
    """``weights`` are [inner, outer]; ``unfold`` makes rows [n, inner] of the activations and their zero point.

    ``seen`` says whether the activations can be had as an output of the whole graph.
    """

    layer: str
    operator: str
    activations: str
    zero_point: str | int
    weights: np.ndarray
    unfold: Callable[[np.ndarray, int], np.ndarray]
    seen: bool


def find_saturation(graph: onnx.ModelProto, feeds: Iterable[Feed] | None) -> list[Saturation]:
    """Every unsigned by signed product with stored weights, from ``feeds`` where there are any.

    Products of unsigned by unsigned bytes don't use that instruction, and those of signed by signed neither. One in a
    branch is judged by its weights alone if its activations are made there.
    """
    every = list(_products(ir.from_proto(graph)))
    products = [each for each in every if each.seen and feeds is not None]
    at_risk = [
        Saturation(each.layer, each.operator, pairs_at_risk(each.weights)) for each in every if each not in products
    ]
    if feeds is None:
        return at_risk
    names = list(dict.fromkeys(name for each in products for name in _tapped(each)))
    seen: dict[str, list[Mapping[str, np.ndarray]]] = {each.layer: [] for each in products}
    rows = dict.fromkeys(seen, 0)
    for values in tap(graph, names, feeds):
        for each in products:
            if rows[each.layer] < MOST_ROWS:
                zero = each.zero_point if isinstance(each.zero_point, int) else int(values[each.zero_point].item())
                array = _some(each.unfold(values[each.activations], zero), MOST_ROWS - rows[each.layer])
                seen[each.layer].append({"rows": array, "zero": np.array(zero)})
                rows[each.layer] += len(array)
    return [*(_judge(each, seen[each.layer]) for each in products), *at_risk]


def _tapped(product: _Product) -> list[str]:
    zero = [] if isinstance(product.zero_point, int) else [product.zero_point]
    return [product.activations, *zero]


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of the rows, evenly spread."""
    if len(rows) <= count:
        return rows
    spread: np.ndarray = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return spread


def _products(model: ir.Model) -> Iterable[_Product]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _INTEGER_INPUTS:
            given, weights, zero = (
                node.inputs[place] if place < len(node.inputs) else None for place in _INTEGER_INPUTS[node.op_type]
            )
        elif node.op_type in ("MatMul", "Gemm", "Conv"):
            first, second = quantized(node.inputs[0]), quantized(node.inputs[1])
            if first is None or second is None:
                continue
            given, weights, zero = first.integers, second.integers, first.zero_point
        else:
            continue
        array = constant(weights)
        if (
            given is None
            or array is None
            or array.dtype != np.int8
            or array.ndim != (4 if node.op_type == "Conv" else 2)
        ):
            continue
        # Depthwise and other grouped convolutions have kernels of their own, which sum in 32 bits.
        if node.attributes.get_int("group", 1) != 1:
            continue
        stored = np.array(0) if zero is None else constant(zero)
        if stored is not None and stored.dtype == np.int8:
            continue
        place = int(stored.item()) if stored is not None else str(zero.name)  # type: ignore[union-attr]
        matrix, unfold = _as_product(node, array)
        maker = given.producer()
        seen = maker is None or maker.graph is model.graph
        yield _Product(str(node.name), node.op_type, str(given.name), place, matrix, unfold, seen)


def _as_product(node: ir.Node, array: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray, int], np.ndarray]]:
    """Weights [inner, outer], and what makes rows of the activations."""
    if node.op_type != "Conv":
        matrix = array.T if node.attributes.get_int("transB", 0) else array
        return matrix, lambda values, zero: values.reshape(-1, matrix.shape[0])
    # ONNX Runtime's integer convolution sums over kernel positions, and over channels within each.
    matrix = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    kernel = array.shape[2:]
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    strides = node.attributes.get_ints("strides", [1, 1])
    dilations = node.attributes.get_ints("dilations", [1, 1])

    def unfold(values: np.ndarray, zero: int) -> np.ndarray:
        around = ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3]))
        padded = np.pad(values, around, constant_values=zero)
        reach = [(size - 1) * apart + 1 for size, apart in zip(kernel, dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
        windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
        rows: np.ndarray = windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, matrix.shape[0])
        return rows

    return matrix, unfold


def _judge(product: _Product, seen: list[Mapping[str, np.ndarray]]) -> Saturation:
    cut, pairs, wrong, whole = 0, 0, 0.0, 0.0
    for values in seen:
        rows, zero = values["rows"], int(values["zero"])
        found, count = pairwise_saturating(rows, product.weights)
        # Exact in double: sums stay far below 2^53.
        exact = rows.astype(np.float64) @ product.weights.astype(np.float64)
        cut += count
        pairs += rows.shape[0] * -(-rows.shape[1] // 2) * product.weights.shape[1]
        wrong += float(np.square(found - exact).sum())
        whole += float(np.square(exact - zero * product.weights.sum(axis=0, dtype=np.float64)).sum())
    error = float(np.sqrt(wrong / whole)) if whole else 0.0
    return Saturation(product.layer, product.operator, pairs_at_risk(product.weights), cut / max(pairs, 1), error)
