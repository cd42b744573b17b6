"""What each kernel of a graph takes alone on this machine, measured once and kept.

A graph is opened as it would be, so that what ONNX Runtime fuses is one node; each node that is left is timed in a
graph of its own, on what it is given in a call. Since other nodes are found in other graphs, the time of a graph that
nobody has run is a sum of times that are known.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from filelock import FileLock
from onnx import helper, numpy_helper

from compress.bench.noise import Noise, Usage, judge
from compress.cache import storage_errors
from compress.environment import cores_quota, features, granted_cores, processor, user_cache
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.failures import cannot_open
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, session_options
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.runtimes.runtime import Batch

VERSION = 1
"""Raised when kernels would be timed otherwise."""
_COPIES = 8
"""Of a kernel in the graph that times it, beside one alone: what a call costs of itself falls out of the difference."""
_SECONDS, _FEWEST, _MOST = 0.03, 10, 400
"""For each kernel, and rounds in it."""
_AT_ONCE = 24
"""Kernels that are timed between two looks at who else was at work."""
_FEW = 64
"""Whole numbers that are stored and say what a node does, such as where a slice begins."""
_CPU = ["CPUExecutionProvider"]


@dataclass(frozen=True)
class Kernel:
    """One node of an optimized graph with its weights, and what it is given. Nodes of one key take the same time."""

    key: str
    node: onnx.NodeProto
    stored: tuple[onnx.TensorProto, ...]
    given: Batch
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    ir_version: int

    def graph(self, copies: int) -> onnx.ModelProto:
        """The node as often as that, on the same inputs; what the first gives is the output."""
        nodes = []
        for copy in range(copies):
            node = onnx.NodeProto()
            node.CopyFrom(self.node)
            node.name = f"{node.name}_{copy}"
            for place, name in enumerate(self.node.output):
                node.output[place] = f"{name}_{copy}" if name else ""
            nodes.append(node)
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=nodes[0].output[0])]
        made = helper.make_graph(nodes, "kernel", inputs, outputs, list(self.stored))
        model: onnx.ModelProto = helper.make_model(made, opset_imports=self.opsets, ir_version=self.ir_version)
        return model


def kernels_of(graph: onnx.ModelProto, batch: Batch, threads: int) -> list[Kernel]:
    """The nodes that ONNX Runtime runs for a batch, in order. Raises `ModelError` for a graph that it can't open."""
    with tempfile.TemporaryDirectory(prefix="compress-kernels-") as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save_model(graph, path)
        made = onnx.load(write_optimized(path, Path(scratch), threads))
        values = _values(made, batch, path, threads)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    opsets = tuple(made.opset_import)
    found = []
    for node in made.graph.node:
        read = _read(node)
        weights = tuple(stored[name] for name in read if name in stored)
        given = {name: values[name] for name in read if name in values and name not in stored}
        key = _key(node, weights, given)
        found.append(Kernel(key, node, weights, given, opsets, made.ir_version))
    return found


def _read(node: onnx.NodeProto) -> list[str]:
    """What a node reads, its branches and loops too, each once."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for branch in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            names += [name for inner in all_graphs(branch) for one in inner.node for name in one.input if name]
    return list(dict.fromkeys(names))


def _values(model: onnx.ModelProto, batch: Batch, path: Path, threads: int) -> dict[str, np.ndarray]:
    """Every tensor of one call, by name."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {output.name for output in whole.graph.output}
    made = [name for node in whole.graph.node for name in node.output if name]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    try:
        session = _session(whole, threads)
        feed = {entry.name: batch[entry.name] for entry in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, feed), strict=True))
    except FAILURES as error:
        raise cannot_open(path, error) from error
    return {name: value for name, value in {**feed, **found}.items() if isinstance(value, np.ndarray)}


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """A graph that is opened as it is."""
    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=_CPU)


def _key(node: onnx.NodeProto, stored: Sequence[onnx.TensorProto], given: Batch) -> str:
    """Operator, attributes, and for each input its type and shape, and the values of few stored whole numbers."""
    weights = {tensor.name: _told(tensor) for tensor in stored}
    inputs = [
        weights.get(name) or ([str(given[name].dtype), given[name].shape] if name in given else name)
        for name in node.input
    ]
    attributes = sorted(
        (one.name, hashlib.sha256(one.SerializeToString(deterministic=True)).hexdigest()) for one in node.attribute
    )
    outputs = [bool(name) for name in node.output]
    told = json.dumps([VERSION, node.domain, node.op_type, attributes, inputs, outputs])
    return f"{node.op_type} {hashlib.sha256(told.encode()).hexdigest()[:24]}"


def _told(tensor: onnx.TensorProto) -> list[object]:
    whole = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    values = numpy_helper.to_array(tensor).tolist() if whole and np.prod(tensor.dims) <= _FEW else None
    return ["stored", tensor.data_type, list(tensor.dims), values]


class KernelTable:
    """Milliseconds by kernel, for one number of threads on this machine and version of ONNX Runtime.

    What is known is never measured again, so that the same graphs come to the same sums as long as the file is kept.
    """

    def __init__(self, threads: int, folder: Path | None = None, noisy_too: bool = False) -> None:
        """``folder``: default `kernels` in the user's cache folder. ``noisy_too``: whoever else is at work."""
        self.threads, self._noisy_too = threads, noisy_too
        self.path = (folder or user_cache() / "kernels") / f"{machine_key(threads)}.jsonl"
        self.measured = 0
        """Kernels that were timed by this object."""
        self.noise: Noise | None = None
        """The last verdict on the machine."""

    @cached_property
    def _known(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    told = json.loads(line)
                except ValueError:  # a writer was killed in the middle
                    continue
                found.setdefault(told["key"], told["ms"])
        return found

    def milliseconds(self, kernels: Sequence[Kernel], seconds: float) -> float | None:
        """The sum over kernels; those that are missing are measured, for about so many seconds at most.

        A kernel that cannot run alone counts as nothing. None where the time was over, or others were at work.
        """
        missing = {kernel.key: kernel for kernel in kernels if kernel.key not in self._known}
        until = time.perf_counter() + seconds
        left = list(missing.values())
        while left:
            if time.perf_counter() > until:
                return None
            chunk, left = left[:_AT_ONCE], left[_AT_ONCE:]
            if not self._measure(chunk):
                return None
        return sum(self._known[kernel.key] or 0.0 for kernel in kernels)

    def _measure(self, kernels: Sequence[Kernel]) -> bool:
        before = Usage.now(0.0)
        found, steady = dict[str, float | None](), list[float]()
        for kernel in kernels:
            told = kernel_times(kernel, self.threads)
            found[kernel.key] = None if told is None else told[0]
            steady += [] if told is None else [told[1]]
        self.measured += len(found)
        self.noise = judge(Usage.now(0.0) - before, {"the kernels": np.array(steady or [1.0])})
        if self.noise.verdict != "quiet" and not self._noisy_too:
            return False
        self._known.update(found)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": key, "ms": ms}) + "\n" for key, ms in found.items())
        return True


def machine_key(threads: int) -> str:
    """What a table is for, as 16 hex digits: processor, cores, threads, version of ONNX Runtime."""
    told = [processor(), features(), len(granted_cores()), cores_quota(), threads, onnxruntime.__version__, VERSION]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def kernel_times(kernel: Kernel, threads: int) -> tuple[float, float] | None:
    """Milliseconds of a kernel, and its first half of rounds over its second; None where it does not run alone."""
    try:
        sessions = [_session(kernel.graph(copies), threads) for copies in (1, 1 + _COPIES)]
        for session in sessions:
            session.run(None, kernel.given)
    except FAILURES:
        return None
    rounds = list[list[int]]()
    until = time.perf_counter() + _SECONDS
    while len(rounds) < _FEWEST or (time.perf_counter() < until and len(rounds) < _MOST):
        rounds.append([_nanoseconds(session, kernel.given) for session in sessions])
    times = np.array(rounds, dtype=np.float64)
    alone, together = np.median(times, axis=0)
    halves = [float(np.median(half[:, 1])) for half in np.array_split(times, 2)]
    return max(float(together - alone) / _COPIES / 1e6, 0.0), halves[0] / halves[1]


def _nanoseconds(session: onnxruntime.InferenceSession, feed: Batch) -> int:
    began = time.perf_counter_ns()
    session.run(None, feed)
    return time.perf_counter_ns() - began
