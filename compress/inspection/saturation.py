"""Saturation of an 8-bit graph on processors that add pairs of products in 16 bits, by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.int8.byte_products import ByteProduct, byte_products
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.numerics.int8_activations import pairs_at_risk, pairwise_saturating

MOST_ROWS = 512
"""Maximum number of activation rows computed per layer; each costs as much as its product."""
_NOTICEABLE = 1e-3


@dataclass(frozen=True)
class Saturation:
    """Saturation of one layer.

    ``risk`` is the share of weight pairs that some input would saturate, ``cut`` the share of sums that real inputs
    saturate, and ``error`` the relative RMS change of the layer's products. Without real inputs ``cut`` and ``error``
    are None.
    """

    layer: str
    operator: str
    risk: float
    cut: float | None = None
    error: float | None = None

    @property
    def matters(self) -> bool:
        """Return True if the saturation should be fixed."""
        return self.risk > 0 if self.error is None else self.error > _NOTICEABLE


def find_saturation(graph: onnx.ModelProto, feeds: Iterable[Feed] | None) -> list[Saturation]:
    """Return the saturation of every unsigned by signed product with stored weights, on ``feeds`` if there are any.

    Products of equal signedness do not use the saturating instruction. A product in a subgraph is judged by its weights
    only if its activations are computed there.
    """
    all_products = list(byte_products(ir.from_proto(graph)))
    products = [product for product in all_products if product.observable and feeds is not None]
    # Without activations only the weights can be judged.
    at_risk = [
        Saturation(product.layer, product.operator, pairs_at_risk(product.weights))
        for product in all_products
        if product not in products
    ]
    if feeds is None:
        return at_risk
    # Observe all activations in one pass.
    names = list(dict.fromkeys(name for product in products for name in _tapped(product)))
    observed: dict[str, list[Mapping[str, np.ndarray]]] = {product.layer: [] for product in products}
    rows = dict.fromkeys(observed, 0)
    for values in stream_activations(graph, names, feeds):
        for product in products:
            if rows[product.layer] < MOST_ROWS:
                zero = (
                    product.zero_point
                    if isinstance(product.zero_point, int)
                    else int(values[product.zero_point].item())
                )
                array = _some(product.unfold(values[product.activations], zero), MOST_ROWS - rows[product.layer])
                observed[product.layer].append({"rows": array, "zero": np.array(zero)})
                rows[product.layer] += len(array)
    return [*(_judge(product, observed[product.layer]) for product in products), *at_risk]


def _tapped(product: ByteProduct) -> list[str]:
    zero = [] if isinstance(product.zero_point, int) else [product.zero_point]
    return [product.activations, *zero]


def _some(rows: np.ndarray, count: int) -> np.ndarray:
    """Return up to ``count`` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    spread: np.ndarray = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return spread


def _judge(product: ByteProduct, observed: list[Mapping[str, np.ndarray]]) -> Saturation:
    saturated, pairs, squared_error, squared_total = 0, 0, 0.0, 0.0
    for values in observed:
        zero = int(values["zero"])
        parts = np.split(values["rows"], product.groups, axis=1)
        # Grouped convolutions are independent products.
        for rows, weights in zip(parts, np.split(product.weights, product.groups, axis=1), strict=True):
            product_saturated, count = pairwise_saturating(rows, weights)
            # Exact in double: sums stay far below 2^53.
            exact = rows.astype(np.float64) @ weights.astype(np.float64)
            saturated += count
            pairs += rows.shape[0] * -(-rows.shape[1] // 2) * weights.shape[1]
            squared_error += float(np.square(product_saturated - exact).sum())
            squared_total += float(np.square(exact - zero * weights.sum(axis=0, dtype=np.float64)).sum())
    error = float(np.sqrt(squared_error / squared_total)) if squared_total else 0.0
    return Saturation(product.layer, product.operator, pairs_at_risk(product.weights), saturated / max(pairs, 1), error)
