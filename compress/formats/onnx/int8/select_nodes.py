"""Selection of nodes that become 8-bit: products with stored weights, and operators between convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.graph_reader import INTEGER_OPERATORS
from compress.utils.errors import StageError

SMALLEST_WEIGHT = 1024
"""Smallest number of elements. Smaller products are as fast in float, and a small output layer is more accurate so."""
OLDEST_OPSET = 13
"""First ONNX operator set in which QuantizeLinear has a scale for each channel."""
WEIGHTED = {"MatMul": 1, "Gemm": 1, "Conv": 1}
"""Operator -> index of the input with the weights."""
BRIDGES = (
    *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Resize", "Pad"),
)
"""Operators that ONNX Runtime's processor runs on 8-bit integers, which pays off if both neighbours are integers."""


@dataclass(frozen=True)
class QuantizableLayer:
    """A node with weights that can be 8-bit. ``channel_axis`` is the axis of its input's channels."""

    name: str
    operator: str
    weight: str
    elements: int
    channel_axis: int


def refuse_unfit(model: ir.Model) -> None:
    """Raise `StageError` for a graph that is quantized already or has too old an operator set."""
    done = next((node for node in model.graph if node.op_type in INTEGER_OPERATORS), None)
    if done is not None:
        raise StageError(
            f"The graph is quantized already: it has the operator {done.op_type}.",
            where=f"node {done.name!r}",
            expected="a float graph, as `onnx` writes it",
            hint="start from the float model; quantizing twice only loses accuracy",
        )
    # Per-channel scales need a recent operator set.
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise StageError(
            f"The graph has ONNX operator set {opset}, which has no per-channel scales.",
            expected=f"operator set {OLDEST_OPSET} or newer",
            hint="export the model again, or convert it with onnx.version_converter",
        )


def has_layers(model: ir.Model) -> bool:
    """Return whether any node has enough stored float weights; LSTMs, which are quantized separately, do not count."""
    return any(_layer(node) is not None for node in model.graph)


def find_layers(model: ir.Model) -> list[QuantizableLayer]:
    """Return every node with enough stored float weights, in order. Raises `StageError` if there is none."""
    layers = [layer for node in model.graph if (layer := _layer(node)) is not None]
    if not layers:
        raise StageError(
            "The graph has nothing to quantize.",
            expected=f"{', '.join(WEIGHTED)} or Attention with {SMALLEST_WEIGHT} stored fp32 weights or more",
        )
    return layers


def _layer(node: ir.Node) -> QuantizableLayer | None:
    """Return a node's layer, or None if it cannot be 8-bit."""
    index = WEIGHTED.get(node.op_type)
    if index is None or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[index]
    array = constant(weight)
    if weight is None or array is None or array.dtype.name != "float32" or array.ndim < 2:
        return None
    convolution = node.op_type.startswith("Conv")
    # Small convolutions are quantized too, because they connect other integer kernels.
    if (array.size < SMALLEST_WEIGHT and not convolution) or (array.ndim > 2 and not convolution):
        return None
    return QuantizableLayer(str(node.name), node.op_type, str(weight.name), int(array.size), 1 if convolution else -1)


def select_bridges(model: ir.Model, layers: Iterable[str]) -> list[str]:
    """Return the nodes that pass 8-bit values from one convolution of ``layers`` to another.

    All computed inputs of such a node come from convolutions or other such nodes, and some of its outputs go to
    ``layers`` or other such nodes. An activation function that is the only reader of a convolution is included in any
    case: it costs nothing within the integer kernel, and its output needs a narrower range.
    """
    nodes = list(model.graph)
    chosen = set(layers)
    sources = {node for node in nodes if str(node.name) in chosen and node.op_type.startswith("Conv")}
    passing: set[ir.Node] = set()
    # Nodes come in topological order, so producers are classified first.
    for node in nodes:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        makers = [value.producer() for value in computed]
        if node.op_type in BRIDGES and makers and all(maker in sources or maker in passing for maker in makers):
            passing.add(node)
    taking = {node for node in nodes if str(node.name) in chosen}
    useful: set[ir.Node] = set()
    # Backwards, so that a node counts as useful if a later useful node reads it.
    for node in reversed(nodes):
        if node not in passing:
            continue
        readers, source = {use.node for output in node.outputs for use in output.uses()}, node.inputs[0]
        # ONNX Runtime fuses an activation function into the preceding integer convolution.
        fused = node.op_type in ("Relu", "Clip") and source is not None and len(source.uses()) == 1
        if fused or readers & (taking | useful):
            useful.add(node)
    return [str(node.name) for node in nodes if node in useful]


def name_nodes(model: ir.Model) -> None:
    """Give each node a unique name, in place."""
    used: set[str] = set()
    for index, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in used else f"{name}_{index}"
        used.add(node.name)
