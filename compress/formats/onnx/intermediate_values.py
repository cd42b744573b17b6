"""Intermediate values of an ONNX graph, which may be cut at them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from compress.formats.onnx.int8.observers import add_outputs
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.onnxruntime import OnnxSession
from compress.formats.onnx.runtimes.profile import CPU, original_name, write_optimized
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target

Values = Mapping[str, np.ndarray]
"""Arrays by the names of their values."""
Run = Callable[[Values], Values]
"""Function that computes values, by name, from the inputs (and given values) of one batch."""
MASK_MAGNITUDE = 1e8
"""Magnitude from which a value counts as an attention mask instead of a number."""
MIN_WEIGHT_ELEMENTS = 16
"""Number of elements below which a stored tensor counts as scales or indices instead of weights."""
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


@dataclass(frozen=True)
class GraphStep:
    """Operator that computes a value.

    Attributes:
        value: Name of the computed value.
        operator: Type of the operator, by ONNX's name.
        name: Name of the operator.
        reads: Names of the values that it reads.
        bits: Smallest bit width that it stores or computes with; 32 for floats.
        computes: Whether the value may be floats and is more than a copy or reshape of others.
    """

    value: str
    operator: str
    name: str
    reads: Sequence[str]
    bits: int
    computes: bool = True


def open_value_graph(file: Path, target: Target) -> OnnxParts:
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


class OnnxParts:
    """Parts of an optimized ``graph`` (from `write_optimized`); ``start`` opens a graph on the target.

    A segment lies between two values at which the graph is cut.
    """

    def __init__(self, graph: onnx.ModelProto, start: Callable[[onnx.ModelProto], Run] = run_here) -> None:
        self.graph = graph
        self.steps = {step.value: step for step in _steps(graph)}
        self.outputs = [value.name for value in graph.graph.output]
        self._start = start

    def whole(self, values: Sequence[str]) -> Run:
        """Return a function that computes ``values`` of the unchanged graph."""
        return self._start(add_outputs(self.graph, values))

    @cached_property
    def reads(self) -> Mapping[str, Sequence[str]]:
        """Names of the values that each value is computed from."""
        return {name: step.reads for name, step in self.steps.items()}

    @property
    def computed(self) -> list[str]:
        """Names of the values that may be floats and are more than a copy or a reshape of other values."""
        return [name for name, step in self.steps.items() if step.computes]

    def segment(self, value: str, cuts: Collection[str]) -> list[str]:
        """Return the values between the preceding ``cuts`` and ``value``, the last one first."""
        values, seen = [value], {value}
        # The list grows while it is iterated, which makes this a breadth-first search from the end.
        for name in values:
            for read in self.reads[name]:
                if read in self.reads and read not in cuts and read not in seen:
                    seen.add(read)
                    values.append(read)
        return values

    def bits(self, cuts: Collection[str]) -> dict[str, int]:
        """Return, for each cut, the smallest bit width that the part before it stores or computes with."""
        ends = frozenset(cuts)
        return {name: min(self.steps[step_value].bits for step_value in self.segment(name, ends)) for name in cuts}

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
