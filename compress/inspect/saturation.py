"""What an 8-bit graph suffers where pairs of products are added in 16 bits, layer by layer, on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from compress.models.fusions.graph import constant
from compress.models.int8.kernels import quantized
from compress.models.int8.observe import Feed, tap
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


@dataclass(frozen=True)
class _Product:
    layer: str
    operator: str
    activations: str
    zero_point: str | int
    weights: np.ndarray


def find_saturation(graph: onnx.ModelProto, feeds: Iterable[Feed] | None) -> list[Saturation]:
    """Every unsigned by signed product with stored weights, from ``feeds`` where there are any.

    Products of unsigned by unsigned bytes don't use that instruction, and those of signed by signed neither.
    """
    products = list(_products(ir.from_proto(graph)))
    if feeds is None:
        return [Saturation(each.layer, each.operator, pairs_at_risk(each.weights)) for each in products]
    names = list(dict.fromkeys(name for each in products for name in _tapped(each)))
    seen: dict[str, list[Mapping[str, np.ndarray]]] = {each.layer: [] for each in products}
    rows = dict.fromkeys(seen, 0)
    for values in tap(graph, names, feeds):
        for each in products:
            if rows[each.layer] < MOST_ROWS:
                array = values[each.activations].reshape(-1, each.weights.shape[0])
                zero = each.zero_point if isinstance(each.zero_point, int) else int(values[each.zero_point].item())
                seen[each.layer].append({"rows": array[: MOST_ROWS - rows[each.layer]], "zero": np.array(zero)})
                rows[each.layer] += len(array)
    return [_judge(each, seen[each.layer]) for each in products]


def _tapped(product: _Product) -> list[str]:
    zero = [] if isinstance(product.zero_point, int) else [product.zero_point]
    return [product.activations, *zero]


def _products(model: ir.Model) -> Iterable[_Product]:
    for node in model.graph:
        if node.op_type in _INTEGER_INPUTS:
            given, weights, zero = (
                node.inputs[place] if place < len(node.inputs) else None for place in _INTEGER_INPUTS[node.op_type]
            )
            turned = False
        elif node.op_type in ("MatMul", "Gemm"):
            first, second = quantized(node.inputs[0]), quantized(node.inputs[1])
            if first is None or second is None:
                continue
            given, weights, zero = first.integers, second.integers, first.zero_point
            turned = bool(node.attributes.get_int("transB", 0))
        else:
            continue
        array = constant(weights)
        if given is None or array is None or array.dtype != np.int8 or array.ndim != 2:
            continue
        stored = np.array(0) if zero is None else constant(zero)
        if stored is not None and stored.dtype == np.int8:
            continue
        place = int(stored.item()) if stored is not None else str(zero.name)  # type: ignore[union-attr]
        yield _Product(str(node.name), node.op_type, str(given.name), place, array.T if turned else array)


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
