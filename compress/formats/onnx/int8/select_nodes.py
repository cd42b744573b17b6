"""Which nodes of a graph become 8-bit: products with stored weights, and what lies between convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.graph_reader import INTEGER_OPERATORS
from compress.utils.errors import StageError

SMALLEST_WEIGHT = 1024
"""Elements. Below, a product is as fast in float, and a classifier's last product is better so."""
OLDEST_OPSET = 13
"""QuantizeLinear with a scale for each channel."""
WEIGHTED = {"MatMul": 1, "Gemm": 1, "Conv": 1}
"""Operator -> the input with the weights."""
WITHOUT_KERNEL = {"ConvTranspose": 1, "GRU": 1, "RNN": 1}
"""Those that the processor computes in float alone: integer weights of theirs would be dequantized in each call."""
BRIDGES = frozenset(
    (
        *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"),
        *("Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Resize", "Pad"),
    )
)
"""Operators that ONNX Runtime's processor runs on 8-bit integers, worth it where both neighbours are integers too."""


@dataclass(frozen=True)
class QuantizableLayer:
    """A node with weights that can be 8-bit. ``channel_axis`` is that of its input's channels."""

    name: str
    operator: str
    weight: str
    elements: int
    channel_axis: int


def refuse_unfit(model: ir.Model) -> None:
    """Raises `StageError` for a graph that is quantized already, or of an operator set too old."""
    done = next((node for node in model.graph if node.op_type in INTEGER_OPERATORS), None)
    if done is not None:
        raise StageError(
            f"The graph is quantized already: it has the operator {done.op_type}.",
            where=f"node {done.name!r}",
            expected="a float graph, as `export` writes it",
            hint="start from the float model; quantizing twice loses accuracy for nothing",
        )
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise StageError(
            f"The graph has ONNX operator set {opset}, which has no scales for channels.",
            expected=f"operator set {OLDEST_OPSET} or newer",
            hint="export the model again, or convert it with onnx.version_converter",
        )


def has_layers(model: ir.Model) -> bool:
    """Whether any node has enough stored float weights; LSTMs, whose weights have other rules, don't count."""
    return any(_layer(node) is not None for node in model.graph)


def find_layers(model: ir.Model) -> list[QuantizableLayer]:
    """Every node with enough stored float weights, in the graph's order. Raises `StageError` where there is none."""
    found = [layer for node in model.graph if (layer := _layer(node)) is not None]
    if not found:
        raise StageError(
            "The graph holds nothing to quantize.",
            expected=f"{', '.join(WEIGHTED)} or Attention with {SMALLEST_WEIGHT} stored fp32 weights or more",
        )
    return found


def count_without_kernel(model: ir.Model) -> dict[str, int]:
    """How many operators of each type have stored weights and no integer kernel."""
    return Counter(
        node.op_type
        for node in model.graph
        if node.op_type in WITHOUT_KERNEL and constant(node.inputs[WITHOUT_KERNEL[node.op_type]]) is not None
    )


def _layer(node: ir.Node) -> QuantizableLayer | None:
    place = WEIGHTED.get(node.op_type)
    if place is None or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[place]
    array = constant(weight)
    if weight is None or array is None or array.dtype.name != "float32" or array.ndim < 2:
        return None
    convolution = node.op_type.startswith("Conv")
    if (array.size < SMALLEST_WEIGHT and not convolution) or (array.ndim > 2 and not convolution):
        return None
    return QuantizableLayer(str(node.name), node.op_type, str(weight.name), int(array.size), 1 if convolution else -1)


def select_bridges(model: ir.Model, layers: Iterable[str]) -> list[str]:
    """Names of the nodes that pass 8-bit values from one convolution of ``layers`` to another.

    All that such a node computes with comes from convolutions or other such nodes, and some of it goes to ``layers``
    or other such nodes. An activation function that alone reads a convolution is one too, whatever follows: it costs
    nothing within the integer kernel, and what is rounded after it needs a narrower range.
    """
    nodes = list(model.graph)
    chosen = set(layers)
    sources = {node for node in nodes if str(node.name) in chosen and node.op_type.startswith("Conv")}
    passing: set[ir.Node] = set()
    for node in nodes:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        makers = [value.producer() for value in computed]
        if node.op_type in BRIDGES and makers and all(maker in sources or maker in passing for maker in makers):
            passing.add(node)
    taking = {node for node in nodes if str(node.name) in chosen}
    useful: set[ir.Node] = set()
    for node in reversed(nodes):
        readers = {use.node for output in node.outputs for use in output.uses()}
        if node in passing and (readers & (taking | useful) or _ends(node)):
            useful.add(node)
    return [str(node.name) for node in nodes if node in useful]


def _ends(node: ir.Node) -> bool:
    """Whether ONNX Runtime takes a node up into the integer convolution before it."""
    before = node.inputs[0]
    return node.op_type in ("Relu", "Clip") and before is not None and len(list(before.uses())) == 1


def name_nodes(model: ir.Model) -> None:
    """Give each node a name of its own, in place."""
    seen: set[str] = set()
    for place, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}_{place}"
        node.name = name if name not in seen else f"{name}_{place}"
        seen.add(node.name)
