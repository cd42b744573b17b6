"""The actual shape of every tensor of a graph, from one run in which all tensors are outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from compress.formats.onnx.costs import Tensor


def shapes_by_running(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return name -> type and shape of the inputs and of all node outputs."""
    model = onnx.load(path)
    known = {value.name for value in model.graph.output}
    outputs = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    input_names = {entry.name for entry in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in input_names}
    values = dict(zip(outputs, session.run(outputs, feed), strict=True)) | feed
    return {name: Tensor(ir.DataType.from_numpy(array.dtype), array.shape) for name, array in values.items()}
