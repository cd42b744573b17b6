"""ONNX graphs in application bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compress.formats.generation.seq2seq import TextWriter
from compress.formats.generation.speech_recognition import Transcriber
from compress.formats.onnx.graph_reader import OnnxGraph, read_graph
from compress.formats.ort.model import read_ort
from compress.formats.runtime import ComponentSession, Session
from compress.plugins.apps.bundled_format import BundledFormat, FormatContents, Interface

_FEW_BITS = "MatMulNBits"
_INTEGER = ("QLinear", "MatMulInteger", "ConvInteger", "QAttention", "QGemm", "DynamicQuantize", "QuantizeLinear")


def _interface(file: Path, session: Session | None) -> Interface:
    """Return the inputs and outputs that ONNX Runtime reports; of several graphs, those of the first."""
    assert session is not None
    first = session.encoder if isinstance(session, Transcriber | TextWriter) else session
    if isinstance(session, ComponentSession):
        first = next(iter(session.parts.values()))
    return Interface(first.input_types, first.output_types)


def _contents(file: Path) -> FormatContents:
    """Read the operators, tensors and operator set versions of a file."""
    import onnx

    graph = read_graph(file)
    model = onnx.load(file, load_external_data=False)
    return contents_of(graph, {entry.domain or "ai.onnx": entry.version for entry in model.opset_import})


def contents_of(graph: OnnxGraph, opsets: Mapping[str, int]) -> FormatContents:
    """Summarize a graph whose operators have the versions ``opsets``."""
    # Integer operators round their inputs. A product with few-bit weights does so at accuracy level 4.
    integers = any(
        node.op_type.startswith(_INTEGER) or (node.op_type == _FEW_BITS and node.integers.get("accuracy_level") == 4)
        for node in graph.nodes
    )
    stored = {tensor.name: (tensor.dtype, tensor.shape, tensor.bytes) for tensor in graph.initializers}
    few_bits = any(node.op_type == _FEW_BITS for node in graph.nodes)
    return FormatContents(dict(sorted(opsets.items())), integers, stored, few_bits)


BUNDLE = BundledFormat(
    target="cpu",
    examples="compress.plugins.apps.formats.onnx",
    interface=_interface,
    contents=_contents,
    unread_reason=lambda: None,
)
"""ONNX Runtime on this machine's CPU, which `compress` requires."""


ORT_BUNDLE = replace(BUNDLE, contents=lambda file: contents_of(read_ort(file.read_bytes(), file).as_onnx(), {}))
"""Graphs in ONNX Runtime's own format, which stores no operator set versions."""
