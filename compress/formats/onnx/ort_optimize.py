"""ONNX Runtime's basic optimizations of a graph, which stay within ONNX's own operators."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

_FATAL_ONLY = 4


def optimize_basic(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which ONNX Runtime has folded constant expressions, in branches too.

    A constant that several branches read is stored in each. Raises ONNX Runtime's errors.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _FATAL_ONLY
    # ONNX Runtime only writes an optimized graph to a file, when it opens the session.
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "basic.onnx")
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized: onnx.ModelProto = onnx.load(options.optimized_model_filepath)
    optimized.producer_name, optimized.producer_version = graph.producer_name, graph.producer_version
    return optimized
