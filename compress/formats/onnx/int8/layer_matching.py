"""Where a torch model's layers stand in its exported graph, and which of them compute with the same activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant

UNLIMITED = (-np.inf, np.inf)
_PASSING = ("Relu", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
"""Operators whose outputs are inputs of theirs, or 0: values on a grid stay on it."""


@dataclass(frozen=True)
class LayerMatch:
    """A node whose stored weights are those of ``layers``, side by side along the outputs.

    It reads the value ``reads``, which are the 8-bit outputs of the convolution ``follows``, if that isn't None. What a
    convolution gives lies within ``limits``, because a `Relu` or `Clip` is all that reads it.
    """

    node: str
    layers: tuple[str, ...]
    convolution: bool
    reads: str
    follows: str | None = None
    limits: tuple[float, float] = UNLIMITED


@dataclass(frozen=True)
class Grids:
    """Names of the grids that layers share: ``given`` of their inputs, ``made`` of convolutions' outputs.

    ``limits`` are those of the made ones.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    limits: Mapping[str, tuple[float, float]]


def match_layers(model: ir.Model, weights: Mapping[str, np.ndarray]) -> list[LayerMatch]:
    """The places of layers whose ``weights`` [outputs, inputs, ...] are given by name, in the graph's order.

    A layer is known by its weights' values. One that is not found, or is like another, has no place.
    """
    known = _Known(weights)
    found: dict[ir.Node, tuple[str, ...]] = {}
    for node in model.graph:
        stored = stored_weights(node)
        if stored is not None and (names := known.names(stored)):
            found[node] = names
    ends = {id(end_of(node)): names[0] for node, names in found.items() if node.op_type == "Conv"}
    return [
        LayerMatch(
            str(node.name),
            names,
            node.op_type == "Conv",
            str(node.inputs[0].name),
            _followed(node.inputs[0], ends),
            limits_of(node) if node.op_type == "Conv" else UNLIMITED,
        )
        for node, names in found.items()
    ]


def grids(places: Sequence[LayerMatch]) -> Grids:
    """Which layers have a grid in common: those that read one value, and those that read what a convolution gives.

    A layer that stands in several places has one grid for all of them.
    """
    keys: dict[str, set[str]] = {}
    for place in places:
        for layer in place.layers:
            keys.setdefault(layer, set()).add(_given(place))
    many = {layer for layer, found in keys.items() if len(found) > 1}
    alike = _Alike()
    given: dict[str, str] = {}
    for place in places:
        key = place.reads if many & set(place.layers) else _given(place)
        for layer in place.layers:
            alike.join(key, given.setdefault(layer, key))
    made = {place.layers[0]: _made(place.layers[0]) for place in places if place.convolution}
    limits: dict[str, tuple[float, float]] = {}
    for place in places:
        if place.convolution:
            before = limits.setdefault(made[place.layers[0]], place.limits)
            limits[made[place.layers[0]]] = place.limits if before == place.limits else UNLIMITED
    return Grids({layer: alike.first(key) for layer, key in given.items()}, made, limits)


def stored_weights(node: ir.Node) -> np.ndarray | None:
    """The float weights of a product or convolution as [outputs, inputs, ...], or None for another node."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain not in ("", "ai.onnx"):
        return None
    array = constant(node.inputs[1])
    if array is None or array.dtype != np.float32 or array.ndim < 2:
        return None
    if node.op_type == "Conv":
        return array
    if array.ndim != 2 or node.attributes.get_int("transA", 0):
        return None
    return array if node.attributes.get_int("transB", 0) else array.T


def end_of(node: ir.Node) -> ir.Value:
    """Where a convolution's output is 8-bit: after the one `Relu` or `Clip` at 0 that reads it, if that is all."""
    value = node.outputs[0]
    readers = [use.node for use in value.uses()]
    if len(readers) == 1 and not value.is_graph_output() and _limits(readers[0]) is not None:
        return readers[0].outputs[0]
    return value


def limits_of(node: ir.Node) -> tuple[float, float]:
    """Between what a convolution's output lies at its end."""
    end = end_of(node).producer()
    return UNLIMITED if end is None else _limits(end) or UNLIMITED


def _limits(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    low, high = [constant(value) for value in (*node.inputs[1:], None, None)][:2]
    if low is None or float(low) != 0:
        return None
    return 0.0, np.inf if high is None else float(high)


def _followed(value: ir.Value | None, ends: Mapping[int, str]) -> str | None:
    """The convolution whose end ``value`` is, or comes from without leaving its grid."""
    while value is not None:
        if id(value) in ends:
            return ends[id(value)]
        node = value.producer()
        if node is None or node.op_type not in _PASSING:
            return None
        value = node.inputs[0]
    return None


def _given(place: LayerMatch) -> str:
    return place.reads if place.follows is None else _made(place.follows)


def _made(layer: str) -> str:
    return f"{layer}, outputs"


class _Known:
    """Layers by their weights; ``names`` are those that stand side by side in a stored matrix."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._by_row: dict[bytes, list[tuple[str, np.ndarray]]] = {}
        for name, weight in weights.items():
            self._by_row.setdefault(_row(weight, 0), []).append((name, weight))

    def names(self, stored: np.ndarray) -> tuple[str, ...]:
        """None of them for a matrix that is not made of whole layers, or where two layers are alike."""
        found, start = [], 0
        while start < len(stored):
            fitting = list(self._fitting(stored, start))
            if len(fitting) != 1:
                return ()
            name, count = fitting[0]
            found.append(name)
            start += count
        return tuple(found)

    def _fitting(self, stored: np.ndarray, start: int) -> Iterator[tuple[str, int]]:
        for name, weight in self._by_row.get(_row(stored, start), ()):
            if np.array_equal(stored[start : start + len(weight)], weight):
                yield name, len(weight)


def _row(weight: np.ndarray, place: int) -> bytes:
    return np.ascontiguousarray(weight[place]).tobytes()


class _Alike:
    """Names that mean the same, each known by the first of them."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def first(self, name: str) -> str:
        while name in self._before:
            name = self._before[name]
        return name

    def join(self, name: str, other: str) -> None:
        """The older one of both, ``other``, stands for them."""
        name, other = self.first(name), self.first(other)
        if name != other:
            self._before[name] = other
