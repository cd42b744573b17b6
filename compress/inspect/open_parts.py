"""Whatever format an artifact is in, its file taken apart as the target's runtime runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

from compress.formats.model_file import format_of, model_file
from compress.formats.onnx.parts import OnnxParts
from compress.formats.onnx.runtimes.failures import cannot_open
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.formats.onnx.runtimes.profile import CPU, write_optimized
from compress.formats.ort.read import read_ort
from compress.formats.parts import Parts, Run
from compress.formats.runtimes import get_runtime
from compress.targets import Target

_TAKEN_APART = {
    "onnxruntime": CPU,
    "openvino": "CPU",
    "litert": "CPU",
    "executorch": "XnnpackBackend",
    "onnxruntime-web": "wasm",
    "onnxruntime-web-node": "wasm",
}
"""Runtimes that give the values within a file, and where."""


def gives_values(target: Target) -> bool:
    """Whether `open_parts` takes files apart there."""
    return _TAKEN_APART.get(target.runtime) == target.provider


def open_parts(artifact: Path, target: Target, length: int | None = None) -> Parts:
    """The one file of ``artifact``, whose parts run on ``target``. Raises `ModelError` for one that can't be opened.

    ``length`` tokens are the most that it will be given, which some formats have to know.
    """
    form, file = format_of(artifact), model_file(artifact)
    if form == "litert":
        from compress.formats.litert.parts import LiteRtParts

        return LiteRtParts(file, length)
    if form == "executorch":
        from compress.formats.executorch.parts import ExecuTorchParts

        return ExecuTorchParts(file)
    if form == "openvino":
        from compress.formats.openvino.parts import OpenVinoParts

        return OpenVinoParts(file)
    graph = _as_onnx(file) if form == "ort" else _as_it_runs(file)
    return OnnxParts(graph) if target.provider == CPU else OnnxParts(graph, lambda changed: _run_on(target, changed))


def _run_on(target: Target, graph: onnx.ModelProto) -> Run:
    """Through the target's own runtime."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(graph, file)
        return get_runtime(target.runtime).open(file, target, threads=1).predict


def _as_it_runs(graph: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of an ONNX file, on any processor."""
    with tempfile.TemporaryDirectory() as folder:
        return onnx.load(write_optimized(graph, Path(folder), 1, portable=True))


def _as_onnx(file: Path) -> onnx.ModelProto:
    """The nodes and weights of a `.ort` file as they lie there; ONNX Runtime itself writes them down."""
    read_ort(file.read_bytes(), file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.add_session_config_entry("session.save_model_format", "ONNX")
        try:
            onnxruntime.InferenceSession(file, options, providers=[CPU])
        except FAILURES as error:
            raise cannot_open(file, error) from error
        return onnx.load(options.optimized_model_filepath)
