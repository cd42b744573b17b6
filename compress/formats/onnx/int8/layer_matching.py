"""Matching of a torch model's layers with nodes of its exported graph, and of layers that share activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant

UNLIMITED = (-np.inf, np.inf)
_PASSING = ("Relu", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")
"""Operators whose outputs are values of their inputs, or 0, so that values stay on a grid."""


@dataclass(frozen=True)
class LayerMatch:
    """A node whose stored weights are those of ``layers``, joined along the outputs.

    It reads the value ``reads``, which is the 8-bit output of the convolution ``follows`` unless that is None. The
    outputs of a convolution lie within ``limits`` because only a `Relu` or `Clip` reads them.
    """

    node: str
    layers: tuple[str, ...]
    convolution: bool
    reads: str
    follows: str | None = None
    limits: tuple[float, float] = UNLIMITED


@dataclass(frozen=True)
class Grids:
    """Names of the grids that layers share: ``inputs`` by layer, and ``outputs`` by convolution.

    ``limits`` are those of the output grids.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    limits: Mapping[str, tuple[float, float]]


def match_layers(model: ir.Model, weights: Mapping[str, np.ndarray]) -> list[LayerMatch]:
    """Return the nodes of layers whose ``weights`` [outputs, inputs, ...] are given by name, in the graph's order.

    Layers are identified by the values of their weights. A layer that is missing or equal to another has no match.
    """
    by_first_row: dict[bytes, list[tuple[str, np.ndarray]]] = {}
    for name, weight in weights.items():
        by_first_row.setdefault(weight[0].tobytes(), []).append((name, weight))
    matches: dict[ir.Node, tuple[str, ...]] = {}
    for node in model.graph:
        stored = stored_weights(node)
        if stored is not None and (names := _joined_layers(stored, by_first_row)):
            matches[node] = names
    # Ends of convolutions, to find layers that read their 8-bit outputs.
    ends = {id(end_of(node)): names[0] for node, names in matches.items() if node.op_type == "Conv"}
    places = []
    for node, names in matches.items():
        source, convolution = node.inputs[0], node.op_type == "Conv"
        limits = limits_of(node) if convolution else UNLIMITED
        places.append(LayerMatch(str(node.name), names, convolution, str(source.name), _followed(source, ends), limits))
    return places


def grids(places: Sequence[LayerMatch]) -> Grids:
    """Return the grids that layers share: those that read one value, and those that read a convolution's output.

    A layer that several nodes use has one grid for all of them.
    """
    keys: dict[str, set[str]] = {}
    for match in places:
        for layer in match.layers:
            keys.setdefault(layer, set()).add(_input_grid(match))
    # A layer with several input grids cannot follow the output grid of one convolution.
    several_grids = {layer for layer, layer_keys in keys.items() if len(layer_keys) > 1}
    alike = _EquivalentNames()
    input_grids: dict[str, str] = {}
    for match in places:
        key = match.reads if several_grids & set(match.layers) else _input_grid(match)
        for layer in match.layers:
            alike.join(key, input_grids.setdefault(layer, key))
    output_grids = {match.layers[0]: _output_grid(match.layers[0]) for match in places if match.convolution}
    limits: dict[str, tuple[float, float]] = {}
    for match in places:
        if match.convolution:
            recorded = limits.setdefault(output_grids[match.layers[0]], match.limits)
            limits[output_grids[match.layers[0]]] = match.limits if recorded == match.limits else UNLIMITED
    return Grids({layer: alike.first(key) for layer, key in input_grids.items()}, output_grids, limits)


def stored_weights(node: ir.Node) -> np.ndarray | None:
    """Return the float weights of a product or convolution as [outputs, inputs, ...], or None for another node."""
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
    """Return the 8-bit output of a convolution, which is after a `Relu` or `Clip` at 0 that is its only reader."""
    value = node.outputs[0]
    readers = [use.node for use in value.uses()]
    # Another reader would need the values before the activation.
    if len(readers) == 1 and not value.is_graph_output() and _limits(readers[0]) is not None:
        return readers[0].outputs[0]
    return value


def limits_of(node: ir.Node) -> tuple[float, float]:
    """Return the bounds of a convolution's output at its end."""
    end = end_of(node).producer()
    return UNLIMITED if end is None else _limits(end) or UNLIMITED


def _limits(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a `Relu` or `Clip` at 0, or None for another node."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    low, high = [constant(value) for value in (*node.inputs[1:], None, None)][:2]
    if low is None or float(low) != 0:
        return None
    return 0.0, np.inf if high is None else float(high)


def _followed(value: ir.Value | None, ends: Mapping[int, str]) -> str | None:
    """Return the convolution whose output ``value`` is, directly or through operators that keep its grid."""
    while value is not None:
        if id(value) in ends:
            return ends[id(value)]
        node = value.producer()
        if node is None or node.op_type not in _PASSING:
            return None
        value = node.inputs[0]
    return None


def _input_grid(match: LayerMatch) -> str:
    """Return the name of the grid of a node's input."""
    return match.reads if match.follows is None else _output_grid(match.follows)


def _output_grid(layer: str) -> str:
    """Return the name of the grid of a layer's output."""
    return f"{layer}, outputs"


def _joined_layers(
    stored: np.ndarray, by_first_row: Mapping[bytes, Sequence[tuple[str, np.ndarray]]]
) -> tuple[str, ...]:
    """Return the layers joined in a stored matrix.

    Returns none if it is not made of whole layers, or if two layers are equal.
    """
    names, start = [], 0
    while start < len(stored):
        rows = stored[start:]
        # The first row narrows the candidates; all rows are compared.
        candidates = by_first_row.get(rows[0].tobytes(), ())
        fitting = [(name, len(weight)) for name, weight in candidates if np.array_equal(rows[: len(weight)], weight)]
        if len(fitting) != 1:
            return ()
        names.append(fitting[0][0])
        start += fitting[0][1]
    return tuple(names)


class _EquivalentNames:
    """Sets of equivalent names, each represented by its first name (union-find)."""

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def first(self, name: str) -> str:
        """Return the representative of a name."""
        while name in self._before:
            name = self._before[name]
        return name

    def join(self, name: str, other: str) -> None:
        """Join the sets of two names; ``other`` becomes the representative."""
        name, other = self.first(name), self.first(other)
        if name != other:
            self._before[name] = other
