"""Intermediate values of an ONNX graph, which may be cut at them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from compress.formats.intermediate_values import MIN_WEIGHT_ELEMENTS, GraphStep, Run, ValueGraph
from compress.formats.onnx.int8.observers import add_outputs
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession
from compress.formats.onnx.runtimes.profile import CPU, original_name, write_optimized
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target

_GIVEN = "{}::given"
_STORED_BITS = {
    **dict.fromkeys((onnx.TensorProto.INT8, onnx.TensorProto.UINT8), 8),
    **dict.fromkeys((onnx.TensorProto.INT4, onnx.TensorProto.UINT4), 4),
    onnx.TensorProto.FLOAT16: 16,
}
_MOVED = (
    *("Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
"""Operators that compute nothing; their errors show where the value is read."""
_INTEGER_OPERATORS = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def open_value_graph(file: Path, target: Target, length: int | None) -> OnnxParts:
    """Open the graph as ONNX Runtime optimizes it for any processor; parts of it run on ``target``.

    Raises `ModelError` if it cannot be opened.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = onnx.load(write_optimized(file, Path(folder), 1, portable=True))

    def run_on_target(changed: onnx.ModelProto) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(changed, Path(folder) / "model.onnx")
            return get_runtime(target.runtime).open(Path(folder) / "model.onnx", target, threads=1).predict

    return OnnxParts(graph, run_here if target.provider == CPU else run_on_target)


def run_here(graph: onnx.ModelProto) -> Run:
    """Run a graph on this machine without optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The graph is optimized already; further fusions would remove values.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[CPU])
    return OnnxSession(session, Path("a part of the graph"), CPU, 0).predict


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
        changed = deepcopy(self.graph)
        graph, new_names = changed.graph, {name: _GIVEN.format(name) for name in given}
        # Every reader of a given value reads a new input instead, in branches and loops too.
        for node in (node for inner in all_graphs(graph) for node in inner.node):
            node.input[:] = [new_names.get(name, name) for name in node.input]
        del graph.output[:], graph.value_info[:]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(new_name, onnx.TensorProto.FLOAT, None)
            for new_name in new_names.values()
        )
        run = self._start(changed)
        return lambda batch: run({**batch, **{new: batch[old].astype(np.float32) for old, new in new_names.items()}})

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
