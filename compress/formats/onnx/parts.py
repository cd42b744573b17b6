"""An ONNX graph taken apart at its values."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from compress.formats.onnx.int8.observe import with_outputs
from compress.formats.onnx.runtimes.profile import CPU, own_name, write_optimized
from compress.formats.parts import Maker, Run, Values, part_of
from compress.formats.runtimes import get_runtime
from compress.targets import Target

_GIVEN = "{}::given"
_FEW = 16
"""Elements below which a tensor holds scales or indices, and no weights."""
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
"""Operators that compute nothing; a fault of theirs shows where the value is read."""
_INTEGER_OPERATORS = ("QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul")


def open_parts(file: Path, target: Target, length: int | None) -> OnnxParts:
    """What ONNX Runtime makes of a file on any processor. Raises `ModelError` for one that can't be opened."""
    with tempfile.TemporaryDirectory() as folder:
        return parts_on(target, onnx.load(write_optimized(file, Path(folder), 1, portable=True)))


def parts_on(target: Target, graph: onnx.ModelProto) -> OnnxParts:
    """A graph whose parts run on a target."""
    return OnnxParts(graph) if target.provider == CPU else OnnxParts(graph, lambda changed: _run_on(target, changed))


def _run_on(target: Target, graph: onnx.ModelProto) -> Run:
    """Through the target's own runtime."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(graph, file)
        return get_runtime(target.runtime).open(file, target, threads=1).predict


def run_here(graph: onnx.ModelProto) -> Run:
    """On this machine, every node as it stands."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=[CPU])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(batch: Values) -> Values:
        found = session.run(outputs, {name: batch[name] for name in inputs})
        return dict(zip(outputs, found, strict=True))

    return run


@dataclass(frozen=True)
class OnnxParts:
    """``graph`` as it runs (`write_optimized` gives such a one); ``start`` opens a graph where it is to run."""

    graph: onnx.ModelProto
    start: Callable[[onnx.ModelProto], Run] = run_here

    @cached_property
    def makers(self) -> Mapping[str, Maker]:
        """See `Parts`; values within branches and loops are part of the node around them."""
        nodes = self.graph.graph.node
        return {
            out: Maker(node.op_type, own_name(node.name) or node.name) for node in nodes for out in node.output if out
        }

    @cached_property
    def reads(self) -> Mapping[str, Sequence[str]]:
        """Value -> what its node reads."""
        return {out: list(node.input) for node in self.graph.graph.node for out in node.output if out}

    @property
    def computed(self) -> Sequence[str]:
        """Values that are more than others in another place or shape."""
        return [name for name, one in self.makers.items() if one.operator not in _MOVED]

    @property
    def outputs(self) -> Sequence[str]:
        """See `Parts`."""
        return [value.name for value in self.graph.graph.output]

    def whole(self, values: Sequence[str]) -> Run:
        """See `Parts`."""
        return self.start(with_outputs(self.graph, values))

    def apart(self, values: Sequence[str], given: Sequence[str]) -> Run:
        """The graph giving ``values`` of it, where a batch holds, beside the inputs, floats that are ``given``.

        Nodes read these in place of what was made.
        """
        changed = onnx.ModelProto()
        changed.CopyFrom(self.graph)
        graph = changed.graph
        _lead(graph, {name: _GIVEN.format(name) for name in given})
        del graph.output[:], graph.value_info[:]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(_GIVEN.format(name), onnx.TensorProto.FLOAT, None) for name in given
        )
        run = self.start(changed)
        return lambda batch: run({**batch, **{_GIVEN.format(name): batch[name].astype(np.float32) for name in given}})

    def bits(self, cuts: Sequence[str]) -> Mapping[str, int]:
        """See `Parts`."""
        stored = {one.name: one for one in self.graph.graph.initializer}
        return {
            name: min((_bits(node, stored) for node in nodes), default=32)
            for name, nodes in part_nodes(self.graph, cuts).items()
        }


def part_nodes(graph: onnx.ModelProto, cuts: Collection[str]) -> dict[str, list[onnx.NodeProto]]:
    """Cut -> the nodes from the cuts before it up to it, the one that makes it first."""
    makers = {out: node for node in graph.graph.node for out in node.output if out}
    reads, ends = {out: list(node.input) for out, node in makers.items()}, frozenset(cuts)
    return {name: [makers[value] for value in part_of(name, reads, ends)] for name in cuts}


def _lead(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Have every node read other values, in place, those of branches and loops too."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _lead(attribute.g, names)


def _bits(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> int:
    own = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 32)
    weights = [stored[name] for name in node.input if name in stored and np.prod(stored[name].dims) >= _FEW]
    found = [_STORED_BITS.get(weight.data_type, 32) for weight in weights]
    if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
        found.append(8)
    return min([own, *found])
