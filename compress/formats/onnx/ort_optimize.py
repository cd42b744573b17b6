"""ONNX Runtime's basic optimizations of a graph, which stay within ONNX's own operators."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

_FATAL_ONLY = 4


def optimize_basic(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what is computed of constants alone is computed, in branches too.

    A constant that several branches read is stored in each. Raises ONNX Runtime's errors.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _FATAL_ONLY
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "basic.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made: onnx.ModelProto = onnx.load(options.optimized_model_filepath)
    made.producer_name, made.producer_version = graph.producer_name, graph.producer_version
    return made
