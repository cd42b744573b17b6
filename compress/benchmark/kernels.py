"""What each kernel of a graph takes alone on this machine, measured once and kept.

A graph is opened as it would be, so that what ONNX Runtime fuses is one node; each node that is left is timed in a
graph of its own, on what it is given in a call: once with its weights in the core's own cache, and once with weights
that have to come from further off. Since the same nodes are found in other graphs, the time of a graph that nobody has
run is a sum of times that are known, more of the second kind the more weights it has.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from filelock import FileLock
from onnx import helper, numpy_helper

from compress.benchmark.machine import second_level_cache_bytes
from compress.benchmark.noise import Noise, Usage, judge_noise
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.runtimes.failures import cannot_open
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, session_options
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.runtimes.runtime import Batch
from compress.utils.environment import cores_quota, features, granted_cores, processor, user_cache
from compress.utils.storage import storage_errors

VERSION = 1
"""Raised when kernels would be timed otherwise."""
_COPIES, _MOST_COPIES = 8, 48
"""Of a kernel in a graph that times it, beside one alone: what a call costs of itself falls out of the difference."""
_CACHE_BYTES = 1 << 20
"""Of a core's own cache, where the kernel doesn't show it."""
_WARM, _COLD = 0.5, 2.5
"""Weights of all copies, as a share of that cache: those of fewer stay in it, those of more push each other out."""
_SECONDS, _FEWEST, _MOST = 0.03, 10, 400
"""For each kernel, and rounds in it."""
_UNDISTURBED = 0.25
"""Of the rounds, in order of their times: what comes and goes beside makes others longer."""
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
    weights: tuple[onnx.TensorProto, ...]
    inputs: Batch
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    ir_version: int

    @property
    def weight_bytes(self) -> int:
        """Of the weights that each call reads whole."""
        return 0 if self.node.op_type.startswith("Gather") else sum(one.ByteSize() for one in self.weights)

    def graph(self, copies: int) -> onnx.ModelProto:
        """The node as often as that, each with weights of its own, on the same inputs; the first gives the output."""
        nodes, stored = [], list[onnx.TensorProto]()
        apart = not any(True for _ in _branches(self.node))
        for copy in range(copies):
            node = onnx.NodeProto()
            node.CopyFrom(self.node)
            node.name = f"{node.name}_{copy}"
            own = {weight.name: f"{weight.name}_{copy}" if apart else weight.name for weight in self.weights}
            node.input[:] = [own.get(name, name) for name in node.input]
            node.output[:] = [f"{name}_{copy}" if name else "" for name in node.output]
            nodes.append(node)
            for weight in self.weights if apart or not copy else ():
                stored.append(onnx.TensorProto())
                stored[-1].CopyFrom(weight)
                stored[-1].name = own[weight.name]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.inputs.items()
        ]
        outputs = [onnx.ValueInfoProto(name=nodes[0].output[0])]
        made = helper.make_graph(nodes, "kernel", inputs, outputs, stored)
        model: onnx.ModelProto = helper.make_model(made, opset_imports=self.opsets, ir_version=self.ir_version)
        return model


def list_kernels(graph: onnx.ModelProto, batch: Batch, threads: int) -> list[Kernel]:
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
    names += [name for branch in _branches(node) for one in branch.node for name in one.input if name]
    return list(dict.fromkeys(names))


def _branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for branch in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from all_graphs(branch)


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


class KernelTimes(NamedTuple):
    """Milliseconds of a kernel whose weights lie in the core's own cache, and of one whose weights lie further off."""

    near: float
    far: float


class KernelTable:
    """Times by kernel, for one number of threads on this machine and version of ONNX Runtime.

    What is known is never measured again, so that the same graphs come to the same sums as long as the file is kept.
    """

    def __init__(self, threads: int, folder: Path | None = None, noisy_too: bool = False) -> None:
        """``folder``: default `kernels` in the user's cache folder. ``noisy_too``: kept whoever else is at work."""
        self.threads, self._noisy_too = threads, noisy_too
        self.path = (folder or user_cache() / "kernels") / f"{machine_key(threads)}.jsonl"
        self.measured = 0
        """Kernels that were timed by this object."""
        self.noise: Noise | None = None
        """The last verdict on the machine."""

    @cached_property
    def _known(self) -> dict[str, KernelTimes]:
        found: dict[str, KernelTimes] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    told = json.loads(line)
                except ValueError:  # a writer was killed in the middle
                    continue
                found.setdefault(told["key"], KernelTimes(told["near"], told["far"]))
        return found

    def milliseconds(self, kernels: Sequence[Kernel], seconds: float) -> float | None:
        """The sum over kernels; those that are missing are measured, for about so many seconds at most.

        Weights lie near as far as all of them fit into the core's cache. A kernel that cannot run alone counts as
        nothing. None where the time was over. What is timed while others are at work (``noise``) counts for this object
        and isn't kept.
        """
        missing = {kernel.key: kernel for kernel in kernels if kernel.key not in self._known}
        until = time.perf_counter() + seconds
        left = list(missing.values())
        while left:
            if time.perf_counter() > until:
                return None
            chunk, left = left[:_AT_ONCE], left[_AT_ONCE:]
            self._measure(chunk)
        times = [self._known[kernel.key] for kernel in kernels]
        far = min(sum(kernel.weight_bytes for kernel in kernels) / _cache_bytes(), 1.0)
        return sum(near + far * max(cold - near, 0.0) for near, cold in times)

    def _measure(self, kernels: Sequence[Kernel]) -> None:
        before = Usage.now(0.0)
        found, steady = dict[str, KernelTimes](), list[float]()
        for kernel in kernels:
            told = kernel_times(kernel, self.threads)
            found[kernel.key] = KernelTimes(0.0, 0.0) if told is None else told[0]
            steady += [] if told is None else [told[1]]
        self.measured += len(found)
        self.noise = judge_noise(Usage.now(0.0) - before, {"the kernels": np.array(steady or [1.0])})
        self._known.update(found)
        if self.noise.verdict != "quiet" and not self._noisy_too:
            return
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": key, **times._asdict()}) + "\n" for key, times in found.items())


def machine_key(threads: int) -> str:
    """What a table is for, as 16 hex digits: processor, cores, threads, version of ONNX Runtime."""
    told = [processor(), features(), len(granted_cores()), cores_quota(), threads, onnxruntime.__version__, VERSION]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def kernel_times(kernel: Kernel, threads: int) -> tuple[KernelTimes, float] | None:
    """A kernel's times, and its first half of rounds over its second; None where it does not run alone."""
    counts = [1, 1 + _copies(kernel, _WARM, 1, _COPIES)]
    if kernel.weight_bytes:
        counts.append(1 + _copies(kernel, _COLD, 1, _MOST_COPIES))
    try:
        sessions = [_session(kernel.graph(copies), threads) for copies in counts]
        for session in sessions:
            session.run(None, kernel.inputs)
    except FAILURES:
        return None
    rounds = list[list[int]]()
    until = time.perf_counter() + _SECONDS
    while len(rounds) < _FEWEST or (time.perf_counter() < until and len(rounds) < _MOST):
        rounds.append([_nanoseconds(session, kernel.inputs) for session in sessions])
    times = np.array(rounds, dtype=np.float64)
    alone, *together = np.quantile(times, _UNDISTURBED, axis=0) / 1e6
    found = [max(float(ms - alone) / (count - 1), 0.0) for ms, count in zip(together, counts[1:], strict=True)]
    halves = [float(np.median(half[:, -1])) for half in np.array_split(times, 2)]
    return KernelTimes(found[0], max(found)), halves[0] / halves[1]


def _copies(kernel: Kernel, share: float, fewest: int, most: int) -> int:
    """As many as have weights of such a share of the core's cache together."""
    return min(max(int(share * _cache_bytes() / max(kernel.weight_bytes, 1)), fewest), most)


@functools.cache
def _cache_bytes() -> int:
    return second_level_cache_bytes() or _CACHE_BYTES


def _nanoseconds(session: onnxruntime.InferenceSession, feed: Batch) -> int:
    # What a process does between two models' turns is not what its cache holds: the first call brings it in.
    session.run(None, feed)
    began = time.perf_counter_ns()
    session.run(None, feed)
    return time.perf_counter_ns() - began
