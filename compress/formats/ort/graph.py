"""A file in ONNX Runtime's own format, as `compress.formats.onnx.graph` has an ONNX file."""

from __future__ import annotations

from pathlib import Path

from compress.formats.onnx.graph import DTYPES, Initializer, Node, OnnxGraph
from compress.formats.ort.file import read_ort


def read_ort_graph(path: Path) -> OnnxGraph:
    """Nodes and initializers; ``start`` and ``stop`` bound a tensor's values. Raises `ModelError`."""
    graph = read_ort(path.read_bytes(), path)
    return OnnxGraph(
        [
            Node(node.op_type, node.name, list(node.inputs), list(node.outputs), dict(node.integers))
            for node in graph.nodes
        ],
        [
            Initializer(one.start, one.start + one.bytes, one.name, one.shape, DTYPES[one.data_type], one.bytes)
            for one in graph.tensors
        ],
    )
