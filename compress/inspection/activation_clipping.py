"""Activations of a graph on real inputs by layer and row, and the share of values that 8-bit ranges clip."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.generation.image_text import open_together
from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.byte_products import ByteProduct, byte_products
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.formats.onnx.model import find_graphs
from compress.formats.runtime import Batch, Session, get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.layers import node_modules
from compress.numerics.int8_activations import pairs_at_risk, pairwise_saturating

_WEIGHT = re.compile(r"\.(weight|bias)(_\w*)?$")
_PRODUCTS = {"MatMul", "Gemm", "Conv", "DynamicQuantizeLinear", "MatMulNBits", "Attention"}
"""Operators whose first input is observed if no activation range is stored."""


@dataclass(frozen=True)
class ActivationRange:
    """Activation that ``layer`` reads, with the range ``low`` to ``high`` of its integers; None if none is stored.

    ``step`` is the distance of two levels.
    """

    tensor: str
    layer: str
    low: float | None = None
    high: float | None = None
    step: float = 0.0

    @property
    def stored(self) -> bool:
        """Return True if calibration stored a range."""
        return self.low is not None

    def clipped_share(self, array: np.ndarray) -> float:
        """Return the share of values that lie more than half a step outside the range of the integers."""
        if self.low is None or self.high is None:
            return 0.0
        half = self.step / 2
        below, above = array < self.low - half, array > self.high + half
        # Quantizers let integers from 0 on stand for a ReLU, and those from 0 to 6 for a ReLU6: that is no cut.
        rectified = self.low == 0
        if rectified and abs(self.high - 6.0) < half:
            return 0.0
        return float((above if rectified else below | above).mean())


@dataclass(frozen=True)
class RowActivations:
    """Activations of rows [n] for ``ranges`` [k]: share of clipped values ``cut``, smallest and largest value."""

    ranges: tuple[ActivationRange, ...]
    cut: np.ndarray
    least: np.ndarray
    greatest: np.ndarray

    @property
    def peaks(self) -> np.ndarray:
        """Return the largest magnitude of each row."""
        magnitudes: np.ndarray = np.maximum(-self.least, self.greatest)
        return magnitudes

    def take(self, rows: np.ndarray) -> RowActivations:
        """Return the activations of some rows."""
        return RowActivations(self.ranges, self.cut[rows], self.least[rows], self.greatest[rows])


def activation_ranges(file: Path) -> list[ActivationRange]:
    """Return the ranges stored by static INT8, or else the float activations that products read. Runs nothing."""
    modules = node_modules(file)
    stored, products = dict[str, ActivationRange](), dict[str, ActivationRange]()
    for node in ir.load(file).graph:
        source = node.inputs[0] if node.inputs else None
        # A constant first input is a weight. Only activations are of interest.
        if node.op_type not in ("QuantizeLinear", *_PRODUCTS) or source is None or constant(source) is not None:
            continue
        tensor, own = str(source.name), str(node.name)
        readers = [str(use.node.name) for value in node.outputs for use in value.uses()]
        # Name the activation after the layer that reads it.
        names = [*readers, own] if node.op_type == "QuantizeLinear" else [own, *readers]
        layer = _WEIGHT.sub("", next(filter(None, map(modules.get, names)), tensor))
        if node.op_type != "QuantizeLinear":
            products[tensor] = ActivationRange(tensor, layer)
            continue
        # Static quantization has one scalar scale per activation.
        scale, zero = (constant(node.inputs[index]) if index < len(node.inputs) else None for index in (1, 2))
        if scale is not None and scale.size == 1 and (zero is None or zero.dtype in (np.int8, np.uint8)):
            step, origin = float(scale.item()), 0 if zero is None else int(zero.item())
            limits = np.iinfo(np.uint8 if zero is None else zero.dtype)
            low, high = ((int(limit) - origin) * step for limit in (limits.min, limits.max))
            stored[tensor] = ActivationRange(tensor, layer, low, high, step)
    # Several ranges of one layer get the tensor's name appended.
    ranges = (stored or products).values()
    counts = Counter(item.layer for item in ranges)
    return [replace(item, layer=f"{item.layer} ({item.tensor})") if counts[item.layer] > 1 else item for item in ranges]


def record_activations(graph: onnx.ModelProto, ranges: list[ActivationRange], rows: Iterable[Feed]) -> RowActivations:
    """Run each of ``rows``, a batch of one example, and record its activations. Raises as `stream_activations`.

    A value counts as clipped if it lies more than half a step outside the integers' range, unless the layer's own
    rectifier clips it anyway.
    """
    cut, least, greatest = list[list[float]](), list[list[float]](), list[list[float]]()
    for values in stream_activations(graph, [item.tensor for item in ranges], rows):
        arrays = [values[item.tensor].astype(np.float32, copy=False) for item in ranges]
        least.append([float(array.min()) for array in arrays])
        greatest.append([float(array.max()) for array in arrays])
        cut.append([item.clipped_share(array) for item, array in zip(ranges, arrays, strict=True)])
    return RowActivations(tuple(ranges), np.array(cut), np.array(least), np.array(greatest))


class RecordingSession:
    """Session wrapper that records the inputs of its calls."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.calls: list[Feed] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`."""
        self.calls.append(dict(batch))
        return self._session.predict(batch)


def transcription_calls(folder: Path, examples: Iterable[Batch], most: int) -> list[list[Feed]]:
    """Return the inputs of each graph of the model in ``folder`` in its first ``most`` calls per example.

    An example is a batch of one. An encoder runs once per window, text or image; the decoder reads the prompt first,
    and then one token per call. Raises the errors of opening and running the model.
    """
    runtime, cpu = get_runtime("onnxruntime"), TARGETS["cpu"]
    # Wrap every graph's session, then run the model through the wrappers.
    recorders: list[Any] = [RecordingSession(runtime.open(path, cpu, 1)) for path in find_graphs(folder)]
    model = open_together(recorders, folder)
    recorded: list[list[Feed]] = [[] for _ in recorders]
    for example in examples:
        model.predict(example)
        for recorder, calls in zip(recorders, recorded, strict=True):
            calls += recorder.calls[:most]
            recorder.calls.clear()
    return recorded


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
    tapped = (name for product in products for name in (product.activations, product.zero_point))
    names = list(dict.fromkeys(name for name in tapped if isinstance(name, str)))
    observed: dict[str, list[tuple[np.ndarray, int]]] = {product.layer: [] for product in products}
    for values in stream_activations(graph, names, feeds):
        for product in products:
            missing = MOST_ROWS - sum(len(rows) for rows, _ in observed[product.layer])
            if missing:
                zero = product.zero_point
                zero = zero if isinstance(zero, int) else int(values[zero].item())
                array = product.unfold(values[product.activations], zero)
                spread = np.linspace(0, len(array) - 1, min(len(array), missing)).astype(int)
                observed[product.layer].append((array[spread], zero))
    return [*(_judge(product, observed[product.layer]) for product in products), *at_risk]


def _judge(product: ByteProduct, observed: Iterable[tuple[np.ndarray, int]]) -> Saturation:
    saturated, pairs, squared_error, squared_total = 0, 0, 0.0, 0.0
    for activations, zero in observed:
        parts = np.split(activations, product.groups, axis=1)
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
