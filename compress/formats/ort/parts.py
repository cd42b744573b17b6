"""A graph in ONNX Runtime's own format taken apart at its values."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

from compress.formats.onnx.parts import OnnxParts, parts_on
from compress.formats.onnx.runtimes.failures import cannot_open
from compress.formats.onnx.runtimes.onnxruntime import FAILURES
from compress.formats.onnx.runtimes.profile import CPU
from compress.formats.ort.read import read_ort
from compress.targets import Target


def open_parts(file: Path, target: Target, length: int | None) -> OnnxParts:
    """The nodes and weights of a file as they lie there. Raises `ModelError` for one that can't be opened."""
    return parts_on(target, _as_onnx(file))


def _as_onnx(file: Path) -> onnx.ModelProto:
    """The file's graph as ONNX, which ONNX Runtime itself writes down."""
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
