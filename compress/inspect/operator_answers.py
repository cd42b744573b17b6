"""Each operator of a graph on its own inputs, taken apart, so that two machines can be compared one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from compress.formats.onnx.int8.observe import Feed, tap
from compress.formats.onnx.runtimes.profile import CPU

_NOISE = 1e-4
"""Relative error of a float operator up to which only the order of its sums differs."""


@dataclass(frozen=True)
class Apart:
    """Every node of a graph with inputs of its own, in one graph without an edge; ``nodes`` in their order."""

    graph: onnx.ModelProto
    feed: Feed
    nodes: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True)
class Departure:
    """One operator that answers otherwise, on the same inputs.

    ``error`` is the root mean square of the differences over that of the answers, ``share`` the part of the answers
    that differ, ``steps`` the largest difference of integers.
    """

    operator: str
    name: str
    error: float
    share: float
    steps: int | None = None

    @property
    def matters(self) -> bool:
        """Whether it is more than another order of summing floats."""
        return self.steps is not None or self.error > _NOISE


def take_apart(graph: onnx.ModelProto, feed: Feed) -> Apart:
    """``graph`` must be one whose nodes run as they are, such as `write_optimized` writes; ``feed`` is one batch.

    Nodes with graphs inside, and those whose inputs are not all tensors that can be had as outputs, are left out.
    """
    stored = {tensor.name for tensor in graph.graph.initializer}
    nodes = [node for node in graph.graph.node if not any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)]
    wanted = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in stored))
    (values,) = tap(graph, wanted, [feed])
    apart = onnx.ModelProto()
    apart.CopyFrom(graph)
    del apart.graph.node[:], apart.graph.input[:], apart.graph.output[:], apart.graph.value_info[:]
    given: dict[str, np.ndarray] = {}
    for place, node in enumerate(nodes):
        own = onnx.NodeProto()
        own.CopyFrom(node)
        given |= {name: values[name] for name in node.input if name in values}
        own.output[:] = [f"answer_{place}_{at}" if name else "" for at, name in enumerate(node.output)]
        apart.graph.node.append(own)
        apart.graph.output.extend(onnx.ValueInfoProto(name=name) for name in own.output if name)
    for name, array in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        apart.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    return Apart(apart, given, tuple(nodes))


def answers_here(apart: Apart) -> dict[str, np.ndarray]:
    """All answers on this machine, nothing optimized."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(apart.graph.SerializeToString(), options, providers=[CPU])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(apart.feed)), strict=True))


def departures(apart: Apart, here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> list[Departure]:
    """The operators whose answers are not the same bits, in the graph's order; both are answers to ``apart``."""
    found = []
    for place, node in enumerate(apart.nodes):
        names = [f"answer_{place}_{at}" for at, name in enumerate(node.output) if name]
        pairs = [(here[name], there[name]) for name in names]
        if not all(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f") for ours, theirs in pairs):
            found.append(_departure(node, pairs))
    return found


def spread(answers: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> tuple[float, int]:
    """The largest difference over the root mean square of an answer; how many keep the place of their largest value."""
    pairs = list(zip(answers, others, strict=True))
    largest = max(float(np.abs(a - b).max() / np.sqrt(np.square(a, dtype=np.float64).mean())) for a, b in pairs)
    return largest, sum(bool((a.argmax(-1) == b.argmax(-1)).all()) for a, b in pairs)


def _departure(node: onnx.NodeProto, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Departure:
    ours = np.concatenate([a.astype(np.float64).ravel() for a, _ in pairs])
    theirs = np.concatenate([b.astype(np.float64).ravel() for _, b in pairs])
    whole = float(np.square(ours).sum())
    error = float(np.sqrt(np.square(ours - theirs).sum() / whole)) if whole else float("inf")
    integers = all(a.dtype.kind in "iub" for a, _ in pairs)
    steps = int(np.abs(ours - theirs).max()) if integers else None
    return Departure(node.op_type, node.name, error, float((ours != theirs).mean()), steps)
