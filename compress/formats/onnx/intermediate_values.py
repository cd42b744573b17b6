"""Intermediate values of an ONNX graph, which may be cut at them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from compress.formats.intermediate_values import MIN_WEIGHT_ELEMENTS, GraphStep, Run, ValueGraph, Values
from compress.formats.onnx.int8.observers import add_outputs
from compress.formats.onnx.runtimes.profile import CPU, original_name, write_optimized
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target

_GIVEN = "{}::given"
_STORED_BITS = {
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT16: 16,
}
_MOVED = frozenset(
    {
        *("Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    }
)
"""Operators that compute nothing; their errors show where the value is read."""
_INTEGER_OPERATORS = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def open_value_graph(file: Path, target: Target, length: int | None) -> OnnxParts:
    """Open the graph as ONNX Runtime optimizes it for any processor; parts of it run on ``target``.

    Raises `ModelError` if it cannot be opened.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.load(write_optimized(file, Path(folder), 1, portable=True))
    return OnnxParts(graph) if target.provider == CPU else OnnxParts(graph, lambda changed: _run_on(target, changed))


def _run_on(target: Target, graph: onnx.ModelProto) -> Run:
    """Run a graph through the target's own runtime."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(graph, file)
        return get_runtime(target.runtime).open(file, target, threads=1).predict


def run_here(graph: onnx.ModelProto) -> Run:
    """Run a graph on this machine without optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The graph is optimized already; further fusions would remove values.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[CPU])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(batch: Values) -> Values:
        values = session.run(outputs, {name: batch[name] for name in inputs})
        return dict(zip(outputs, values, strict=True))

    return run


class OnnxParts(ValueGraph):
    """Parts of an optimized ``graph`` (from `write_optimized`); ``start`` opens a graph on the target."""

    def __init__(self, graph: onnx.ModelProto, start: Callable[[onnx.ModelProto], Run] = run_here) -> None:
        outputs = [value.name for value in graph.graph.output]
        super().__init__(_steps(graph), outputs, lambda values: start(add_outputs(graph, values)))
        self.graph = graph
        self._start = start

    def apart(self, values: Sequence[str], given: Sequence[str]) -> Run:
        """Return a function that computes ``values`` of the graph from the inputs and the floats ``given``.

        A batch holds the inputs and the given values. Nodes read the given values instead of the computed ones.
        """
        changed = onnx.ModelProto()
        changed.CopyFrom(self.graph)
        graph = changed.graph
        # Every reader of a given value reads a new input instead.
        _redirect_inputs(graph, {name: _GIVEN.format(name) for name in given})
        del graph.output[:], graph.value_info[:]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(_GIVEN.format(name), onnx.TensorProto.FLOAT, None) for name in given
        )
        run = self._start(changed)
        return lambda batch: run({**batch, **{_GIVEN.format(name): batch[name].astype(np.float32) for name in given}})

    def nodes(self, cuts: Collection[str]) -> dict[str, list[onnx.NodeProto]]:
        """Return for each cut the nodes from the previous cuts up to it, the node that computes it first."""
        makers = {out: node for node in self.graph.graph.node for out in node.output if out}
        ends = frozenset(cuts)
        return {name: [makers[value] for value in self.segment(name, ends)] for name in cuts}


def _steps(graph: onnx.ModelProto) -> Iterator[GraphStep]:
    """Yield a step for each output; values within branches and loops are part of the node around them."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        name, bits = original_name(node.name) or node.name, _bits(node, stored)
        for out in filter(None, node.output):
            yield GraphStep(out, node.op_type, name, list(node.input), bits, node.op_type not in _MOVED)


def _redirect_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename the inputs of every node, in place, those of branches and loops too."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _redirect_inputs(attribute.g, names)


def _bits(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> int:
    """Return the lowest number of bits that a node computes or stores weights with."""
    attribute_bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 32)
    weights = [
        stored[name] for name in node.input if name in stored and np.prod(stored[name].dims) >= MIN_WEIGHT_ELEMENTS
    ]
    widths = [_STORED_BITS.get(weight.data_type, 32) for weight in weights]
    # These operators round activations to 8 bits, whatever their weights are.
    if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
        widths.append(8)
    return min([attribute_bits, *widths])
