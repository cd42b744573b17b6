"""What an 8-bit graph suffers where pairs of products are added in 16 bits, layer by layer, on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.int8.byte_products import ByteProduct, byte_products
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.numerics.saturation import pairs_at_risk, pairwise_saturating

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


def find_saturation(graph: onnx.ModelProto, feeds: Iterable[Feed] | None) -> list[Saturation]:
    """Every unsigned by signed product with stored weights, from ``feeds`` where there are any.

    Products of unsigned by unsigned bytes don't use that instruction, and those of signed by signed neither. One in a
    branch is judged by its weights alone if its activations are made there.
    """
    every = list(byte_products(ir.from_proto(graph)))
    products = [each for each in every if each.observable and feeds is not None]
    at_risk = [
        Saturation(each.layer, each.operator, pairs_at_risk(each.weights)) for each in every if each not in products
    ]
    if feeds is None:
        return at_risk
    names = list(dict.fromkeys(name for each in products for name in _tapped(each)))
    seen: dict[str, list[Mapping[str, np.ndarray]]] = {each.layer: [] for each in products}
    rows = dict.fromkeys(seen, 0)
    for values in stream_activations(graph, names, feeds):
        for each in products:
            if rows[each.layer] < MOST_ROWS:
                zero = each.zero_point if isinstance(each.zero_point, int) else int(values[each.zero_point].item())
                array = _some(each.unfold(values[each.activations], zero), MOST_ROWS - rows[each.layer])
                seen[each.layer].append({"rows": array, "zero": np.array(zero)})
                rows[each.layer] += len(array)
    return [*(_judge(each, seen[each.layer]) for each in products), *at_risk]


def _tapped(product: ByteProduct) -> list[str]:
    zero = [] if isinstance(product.zero_point, int) else [product.zero_point]
    return [product.activations, *zero]


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of the rows, evenly spread."""
    if len(rows) <= count:
        return rows
    spread: np.ndarray = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return spread


def _judge(product: ByteProduct, seen: list[Mapping[str, np.ndarray]]) -> Saturation:
    cut, pairs, wrong, whole = 0, 0, 0.0, 0.0
    for values in seen:
        zero = int(values["zero"])
        parts = np.split(values["rows"], product.groups, axis=1)
        for rows, weights in zip(parts, np.split(product.weights, product.groups, axis=1), strict=True):
            found, count = pairwise_saturating(rows, weights)
            # Exact in double: sums stay far below 2^53.
            exact = rows.astype(np.float64) @ weights.astype(np.float64)
            cut += count
            pairs += rows.shape[0] * -(-rows.shape[1] // 2) * weights.shape[1]
            wrong += float(np.square(found - exact).sum())
            whole += float(np.square(exact - zero * weights.sum(axis=0, dtype=np.float64)).sum())
    error = float(np.sqrt(wrong / whole)) if whole else 0.0
    return Saturation(product.layer, product.operator, pairs_at_risk(product.weights), cut / max(pairs, 1), error)
