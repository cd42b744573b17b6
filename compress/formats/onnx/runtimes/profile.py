"""The graph that ONNX Runtime runs after its optimizations, and the time of each of its nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from compress.formats.onnx.costs import Tensor
from compress.formats.onnx.runtimes.onnxruntime import FAILURES, OnnxSession, cannot_open, session_options

CPU = "CPUExecutionProvider"
_OPTIMIZED = "optimized.onnx"
_EXTERNAL = "optimized.data"
_EXTERNAL_FROM_BYTES = 1024
_NODE_EVENT = "_kernel_time"
_NUMBERED = "#"
_TYPES = {"float": "FLOAT", "double": "DOUBLE"}


def original_name(name: str) -> str:
    """Return the node's name without the number that `write_optimized` appended."""
    return name.rpartition(_NUMBERED)[0]


@dataclass(frozen=True)
class NodeRun:
    """One node in one call: the time of its kernel and its outputs, without absent ones."""

    microseconds: int
    outputs: tuple[Tensor, ...]


CallRun = dict[str, NodeRun]
"""Run of each node of one call, by node name."""


def write_optimized(graph: Path, folder: Path, threads: int, portable: bool = False) -> Path:
    """Write the graph that ONNX Runtime runs for ``graph``, with unique node names.

    Weights go into a file beside it.

    Args:
        graph: The file of the graph.
        folder: Folder for the optimized graph.
        threads: Threads within an operator.
        portable: Whether to skip layouts that are specific to this kind of processor.

    Raises:
        ModelError: The graph cannot be opened.
    """
    options = session_options(threads)
    if portable:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    path = folder / _OPTIMIZED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _EXTERNAL)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_FROM_BYTES)
    )
    try:
        onnxruntime.InferenceSession(graph, options, providers=[CPU])
    except FAILURES as error:
        raise cannot_open(graph, error) from error
    model = ir.load(path)
    # Profiles identify nodes by name, and ONNX Runtime does not keep names unique.
    for index, node in enumerate(model.graph):
        node.name = f"{node.name or node.op_type}{_NUMBERED}{index}"
    ir.save(model, path)
    return path


class ProfiledSession:
    """An optimized graph that records the time of every node. For one thread of one process."""

    def __init__(self, optimized: Path, threads: int) -> None:
        """Open a graph that `write_optimized` wrote."""
        options = session_options(threads)
        # The graph is optimized already; another pass would rename nodes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = str(optimized.with_name("profile"))
        self._session = onnxruntime.InferenceSession(optimized, options, providers=[CPU])
        self.session = OnnxSession(self._session, optimized, CPU, threads)

    def end(self) -> Path:
        """Stop recording and return the file of the profile."""
        return Path(self._session.end_profiling())


def read_profile(path: Path) -> list[CallRun]:
    """Return every call since the session was opened, in order. Nodes in subgraphs count for the node around them."""
    calls: list[CallRun] = []
    current: CallRun = {}
    for event in json.loads(path.read_text()):
        name = event["name"].removesuffix(_NODE_EVENT)
        # Events of nodes have a suffix for the kernel's time.
        if event["cat"] == "Node" and name != event["name"] and _NUMBERED in name:
            entries = [entry for pair in event["args"].get("output_type_shape", []) for entry in pair.items()]
            types = [ir.DataType.__members__.get(_TYPES.get(kind, kind.upper())) for kind, _ in entries]
            outputs = [
                Tensor(dtype, tuple(shape))
                for dtype, (_, shape) in zip(types, entries, strict=True)
                if dtype is not None
            ]
            # A node counts as unknown if one of its outputs has an unknown type.
            current[name] = NodeRun(int(event["dur"]), tuple(outputs) if len(outputs) == len(entries) else ())
        elif name == "model_run":
            calls.append(current)
            current = {}
    return calls


def shapes_of(graph: ir.Graph, call: CallRun, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of one call by name: the model's ``inputs`` and the outputs of its nodes.

    A node is skipped if it did not run or if some of its outputs are no tensors of known types.
    """
    shapes = dict(inputs)
    for node in graph:
        output_names = [str(value.name) for value in node.outputs if value.name]
        run = call.get(str(node.name))
        if run is not None and len(run.outputs) == len(output_names):
            shapes.update(zip(output_names, run.outputs, strict=True))
    return shapes
