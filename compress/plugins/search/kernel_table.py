"""Time of each kernel of a graph alone on this machine, measured once and stored.

The graph is optimized as ONNX Runtime would, so that fused operators are one node. Each remaining node is timed in a
graph of its own, on its inputs in a call: once with its weights in the core's own cache, and once with weights that
come from slower memory. Other graphs contain the same nodes, so the time of a graph that never ran is a sum of known
times. The more weights the graph has, the more the second kind counts.
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
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, cannot_open, session_options
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.formats.runtime import Batch
from compress.utils.environment import cores_quota, features, granted_cores, processor, user_cache
from compress.utils.storage import storage_errors

VERSION = 1
"""Version of the measurement. A new one makes stored times invalid."""
_COPIES, _MOST_COPIES = 8, 48
"""Number of copies of a kernel in the graph that times it. The difference to one copy cancels the cost of a call."""
_CACHE_BYTES = 1 << 20
"""Size of a core's own cache if the kernel doesn't show it."""
_WARM, _COLD = 0.5, 2.5
"""Weights of all copies as a share of that cache: small ones stay in it, large ones evict each other."""
_SECONDS, _FEWEST, _MOST = 0.03, 10, 400
"""Seconds for each kernel, and bounds of the number of rounds."""
_UNDISTURBED = 0.25
"""Quantile of the rounds' times that counts, since other work on the machine makes some of them longer."""
_AT_ONCE = 24
"""Number of kernels that are timed between two checks of the machine's noise."""
_FEW = 64
"""Largest number of integer constants that are part of a kernel's key, such as where a slice begins."""
_CPU = ["CPUExecutionProvider"]


@dataclass(frozen=True)
class Kernel:
    """Node of an optimized graph with its weights and inputs. Nodes with the same key take the same time."""

    key: str
    node: onnx.NodeProto
    weights: tuple[onnx.TensorProto, ...]
    inputs: Batch
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    ir_version: int

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights that each call reads whole."""
        return 0 if self.node.op_type.startswith("Gather") else sum(weight.ByteSize() for weight in self.weights)

    def graph(self, copies: int) -> onnx.ModelProto:
        """Return a graph with ``copies`` of the node, each with its own weights, on the same inputs.

        The first copy gives the output.
        """
        # Copies are independent of each other, so that no copy waits for the output of another.
        nodes, weights = [], list[onnx.TensorProto]()
        # Branches refer to weights by name, so the copies of a node with branches share their weights.
        has_no_branches = not any(True for _ in _branches(self.node))
        for copy in range(copies):
            node = onnx.NodeProto()
            node.CopyFrom(self.node)
            node.name = f"{node.name}_{copy}"
            suffix = f"_{copy}" if has_no_branches else ""
            renamed = {weight.name: f"{weight.name}{suffix}" for weight in self.weights}
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [f"{name}_{copy}" if name else "" for name in node.output]
            nodes.append(node)
            for weight in self.weights if has_no_branches or not copy else ():
                weights.append(onnx.TensorProto())
                weights[-1].CopyFrom(weight)
                weights[-1].name = renamed[weight.name]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in self.inputs.items()
        ]
        outputs = [onnx.ValueInfoProto(name=nodes[0].output[0])]
        graph = helper.make_graph(nodes, "kernel", inputs, outputs, weights)
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)
        return model


def list_kernels(graph: onnx.ModelProto, batch: Batch, threads: int) -> list[Kernel]:
    """Return the nodes that ONNX Runtime runs for a batch, in order.

    Raises:
        ModelError: ONNX Runtime cannot open the graph.
    """
    with tempfile.TemporaryDirectory(prefix="compress-kernels-") as scratch:
        path = Path(scratch) / "model.onnx"
        onnx.save_model(graph, path)
        optimized = onnx.load(write_optimized(path, Path(scratch), threads))
        # Run the graph once to get the actual input of every node.
        values = _values(optimized, batch, path, threads)
    stored = {tensor.name: tensor for tensor in optimized.graph.initializer}
    opsets = tuple(optimized.opset_import)
    kernels = []
    for node in optimized.graph.node:
        # A node with branches also reads the values that these read.
        inner_nodes = (inner for branch in _branches(node) for inner in branch.node)
        names = list(dict.fromkeys(name for reader in (node, *inner_nodes) for name in reader.input if name))
        weights = tuple(stored[name] for name in names if name in stored)
        inputs = {name: values[name] for name in names if name in values and name not in stored}
        # A key of operator, attributes, and each input's type and shape, with the values of few stored integers.
        keys = {tensor.name: _weight_key(tensor) for tensor in weights}
        keys |= {name: [str(array.dtype), array.shape] for name, array in inputs.items()}
        input_keys = [keys.get(name, name) for name in node.input]
        # Serialize deterministically: the order of map fields differs between processes otherwise.
        attributes = sorted(
            (attribute.name, hashlib.sha256(attribute.SerializeToString(deterministic=True)).hexdigest())
            for attribute in node.attribute
        )
        outputs = [bool(name) for name in node.output]
        content = json.dumps([VERSION, node.domain, node.op_type, attributes, input_keys, outputs])
        key = f"{node.op_type} {hashlib.sha256(content.encode()).hexdigest()[:24]}"
        kernels.append(Kernel(key, node, weights, inputs, opsets, optimized.ir_version))
    return kernels


def _branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for branch in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from all_graphs(branch)


def _values(model: onnx.ModelProto, batch: Batch, path: Path, threads: int) -> dict[str, np.ndarray]:
    """Return every tensor of one call, by name."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    output_names = {output.name for output in exposed.graph.output}
    outputs = [name for node in exposed.graph.node for name in node.output if name]
    # Mark every intermediate value as an output.
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in output_names)
    try:
        session = _session(exposed, threads)
        values = {entry.name: batch[entry.name] for entry in session.get_inputs()}
        results = zip(session.get_outputs(), session.run(None, values), strict=True)
    except FAILURES as error:
        raise cannot_open(path, error) from error
    values |= {output.name: value for output, value in results if isinstance(value, np.ndarray)}
    return values


def _session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Return a session of a graph without further optimization."""
    options = session_options(threads)
    # The graph is optimized already. Another pass could merge the copies of a kernel.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=_CPU)


def _weight_key(tensor: onnx.TensorProto) -> list[object]:
    is_integer = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    values = numpy_helper.to_array(tensor).tolist() if is_integer and np.prod(tensor.dims) <= _FEW else None
    return ["stored", tensor.data_type, list(tensor.dims), values]


class KernelTimes(NamedTuple):
    """Times of a kernel in ms, with weights in the core's own cache (near) and in slower memory (far)."""

    near: float
    far: float


class KernelTable:
    """Times by kernel, for one number of threads on this machine and one version of ONNX Runtime.

    A stored time is never measured again, so that the same graphs have the same sums as long as the file exists.
    """

    def __init__(self, threads: int, folder: Path | None = None, noisy_too: bool = False) -> None:
        """Open the table.

        Args:
            threads: Number of threads.
            folder: Folder of the file. Default: `kernels` in the user's cache folder.
            noisy_too: Whether times are stored even if other work disturbed them.
        """
        self.threads, self._noisy_too = threads, noisy_too
        self.path = (folder or user_cache() / "kernels") / f"{machine_key(threads)}.jsonl"
        self.measured = 0
        """Kernels that were timed by this object."""
        self.noise: Noise | None = None
        """The last verdict on the machine."""

    @cached_property
    def _known(self) -> dict[str, KernelTimes]:
        times: dict[str, KernelTimes] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # A killed writer left a truncated line.
                times.setdefault(entry["key"], KernelTimes(entry["near"], entry["far"]))
        return times

    def milliseconds(self, kernels: Sequence[Kernel], seconds: float) -> float | None:
        """Return the sum of the times of kernels, or None if measuring missing ones takes longer than ``seconds``.

        Times with slow memory count for the share of all weights that exceeds the core's cache. A kernel that cannot
        run alone counts as 0. Times measured while other work disturbed the machine (``noise``) count for this object
        only.
        """
        pending = list({kernel.key: kernel for kernel in kernels if kernel.key not in self._known}.values())
        deadline = time.perf_counter() + seconds
        # Measure in chunks, between which the noise of the machine is checked.
        for start in range(0, len(pending), _AT_ONCE):
            if time.perf_counter() > deadline:
                return None
            self._measure(pending[start : start + _AT_ONCE])
        times = [self._known[kernel.key] for kernel in kernels]
        # Weights beyond the cache come from slower memory at each call.
        far = min(sum(kernel.weight_bytes for kernel in kernels) / _cache_bytes(), 1.0)
        return sum(near + far * max(cold - near, 0.0) for near, cold in times)

    def _measure(self, kernels: Sequence[Kernel]) -> None:
        usage_before = Usage.now(0.0)
        measured, halves = dict[str, KernelTimes](), list[float]()
        for kernel in kernels:
            measured[kernel.key], *half = kernel_times(kernel, self.threads) or (KernelTimes(0.0, 0.0),)
            halves += half
        self.measured += len(measured)
        self.noise = judge_noise(Usage.now(0.0) - usage_before, {"the kernels": np.array(halves or [1.0])})
        # Use the times in this process in any case, so that its decisions stay consistent.
        self._known.update(measured)
        if self.noise.verdict != "quiet" and not self._noisy_too:
            return
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Several searches may append to the file at the same time.
            with FileLock(f"{self.path}.lock"), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": key, **times._asdict()}) + "\n" for key, times in measured.items())


def machine_key(threads: int) -> str:
    """Return the key of a table as 16 hex digits: processor, cores, threads, version of ONNX Runtime."""
    content = [processor(), features(), len(granted_cores()), cores_quota(), threads, onnxruntime.__version__, VERSION]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def kernel_times(kernel: Kernel, threads: int) -> tuple[KernelTimes, float] | None:
    """Return a kernel's times, and the ratio of the first half of its rounds to the second.

    Returns None if the kernel cannot run alone.
    """
    counts = [1, 1 + _copies(kernel, _WARM, _COPIES)]
    if kernel.weight_bytes:
        counts.append(1 + _copies(kernel, _COLD, _MOST_COPIES))
    try:
        sessions = [_session(kernel.graph(copies), threads) for copies in counts]
        for session in sessions:
            session.run(None, kernel.inputs)
    except FAILURES:
        return None
    rounds = list[list[int]]()
    deadline = time.perf_counter() + _SECONDS
    while len(rounds) < _FEWEST or (time.perf_counter() < deadline and len(rounds) < _MOST):
        # Alternate between the graphs, so that a disturbance affects all of them.
        rounds.append([_nanoseconds(session, kernel.inputs) for session in sessions])
    times = np.array(rounds, dtype=np.float64)
    alone, *together = np.quantile(times, _UNDISTURBED, axis=0) / 1e6
    # The time of a copy is the difference to the graph with one copy, which cancels the cost of a call.
    copy_ms = [max(float(ms - alone) / (count - 1), 0.0) for ms, count in zip(together, counts[1:], strict=True)]
    # The two halves of the measurement agree on a quiet machine.
    halves = [float(np.median(half[:, -1])) for half in np.array_split(times, 2)]
    return KernelTimes(copy_ms[0], max(copy_ms)), halves[0] / halves[1]


def _copies(kernel: Kernel, share: float, most: int) -> int:
    """Return the number of copies, up to ``most``, whose weights together have ``share`` of the core's cache."""
    return min(max(int(share * _cache_bytes() / max(kernel.weight_bytes, 1)), 1), most)


@functools.cache
def _cache_bytes() -> int:
    return second_level_cache_bytes() or _CACHE_BYTES


def _nanoseconds(session: onnxruntime.InferenceSession, feed: Batch) -> int:
    # Other models have used the cache since the last call, so the first call only loads it again.
    session.run(None, feed)
    began = time.perf_counter_ns()
    session.run(None, feed)
    return time.perf_counter_ns() - began
