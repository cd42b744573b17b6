"""What real inputs make of a graph's activations, layer by layer and row by row, and what of it 8 bits cut off."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.inspection.node_layers import node_modules

_RELU6 = 6.0
_WEIGHT = re.compile(r"\.(weight|bias)(_\w*)?$")
_PRODUCTS = {"MatMul", "Gemm", "Conv", "DynamicQuantizeLinear", "MatMulNBits", "Attention"}
"""Operators whose first input is the activation that a range is asked of, where none is stored."""


@dataclass(frozen=True)
class ActivationRange:
    """An activation that ``layer`` reads: what its integers stand for, ``low`` to ``high``, None where none is stored.

    ``step`` is the distance of two integers' values.
    """

    tensor: str
    layer: str
    low: float | None = None
    high: float | None = None
    step: float = 0.0

    @property
    def stored(self) -> bool:
        """Whether a calibration decided on the range."""
        return self.low is not None


@dataclass(frozen=True)
class Activations:
    """Of rows [n] and ``ranges`` [k]: the share of a row's values that is ``cut``, and the row's least and greatest."""

    ranges: tuple[ActivationRange, ...]
    cut: np.ndarray
    least: np.ndarray
    greatest: np.ndarray

    @property
    def peaks(self) -> np.ndarray:
        """The greatest magnitude of each row."""
        found: np.ndarray = np.maximum(-self.least, self.greatest)
        return found

    def take(self, places: np.ndarray) -> Activations:
        """Those of the rows at ``places``."""
        return Activations(self.ranges, self.cut[places], self.least[places], self.greatest[places])


def activation_ranges(file: Path) -> list[ActivationRange]:
    """Those that static INT8 has stored, or else the float activations that products read. Nothing is run."""
    modules, found = node_modules(file), list[ActivationRange]()
    for node in ir.load(file).graph:
        given = node.inputs[0] if node.inputs else None
        if node.op_type != "QuantizeLinear" or given is None or constant(given) is not None:
            continue
        scale, zero = (constant(node.inputs[place]) if place < len(node.inputs) else None for place in (1, 2))
        if scale is None or scale.size != 1 or (zero is not None and zero.dtype not in (np.int8, np.uint8)):
            continue
        step, origin = float(scale.item()), 0 if zero is None else int(zero.item())
        limits = np.iinfo(np.uint8 if zero is None else zero.dtype)
        low, high = ((int(limit) - origin) * step for limit in (limits.min, limits.max))
        readers = [str(use.node.name) for use in node.outputs[0].uses()]
        layer = next(filter(None, map(modules.get, [*readers, str(node.name)])), str(given.name))
        found.append(ActivationRange(str(given.name), _module(layer), low, high, step))
    return _distinct(found) or _distinct(_products(file, modules))


def _products(file: Path, modules: dict[str, str]) -> list[ActivationRange]:
    found = []
    for node in ir.load(file).graph:
        given = node.inputs[0] if node.inputs else None
        if node.op_type in _PRODUCTS and given is not None and constant(given) is None and given.name:
            readers = [str(use.node.name) for value in node.outputs for use in value.uses()]
            layer = next(filter(None, map(modules.get, [str(node.name), *readers])), str(given.name))
            found.append(ActivationRange(str(given.name), _module(layer)))
    return found


def _module(weight: str) -> str:
    """What a weight belongs to, whatever was made of it."""
    return _WEIGHT.sub("", weight)


def _distinct(ranges: Iterable[ActivationRange]) -> list[ActivationRange]:
    """One of each tensor; where several are of one layer, their names say which."""
    single = {each.tensor: each for each in ranges}.values()
    counts = Counter(each.layer for each in single)
    return [replace(each, layer=f"{each.layer} ({each.tensor})") if counts[each.layer] > 1 else each for each in single]


def see_activations(graph: onnx.ModelProto, ranges: list[ActivationRange], rows: Iterable[Feed]) -> Activations:
    """Run each of ``rows``, a batch of one example, and look at the activations. Raises what `tap` raises.

    A value is cut where it lies more than half a step outside of what the integers stand for, unless the layer's own
    rectifier has it so.
    """
    cut, least, greatest = list[list[float]](), list[list[float]](), list[list[float]]()
    for values in stream_activations(graph, [each.tensor for each in ranges], rows):
        arrays = [values[each.tensor].astype(np.float32, copy=False) for each in ranges]
        least.append([float(array.min()) for array in arrays])
        greatest.append([float(array.max()) for array in arrays])
        cut.append([_cut(each, array) for each, array in zip(ranges, arrays, strict=True)])
    return Activations(tuple(ranges), np.array(cut), np.array(least), np.array(greatest))


def _cut(place: ActivationRange, array: np.ndarray) -> float:
    if place.low is None or place.high is None:
        return 0.0
    half = place.step / 2
    below, above = array < place.low - half, array > place.high + half
    # Quantizers let integers from 0 on stand for a ReLU, and those from 0 to 6 for a ReLU6: that is no cut.
    rectified = place.low == 0
    if rectified and abs(place.high - _RELU6) < half:
        return 0.0
    return float((above if rectified else below | above).mean())
