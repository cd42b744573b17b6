"""LSTMs at 8 bits: ONNX Runtime's `DynamicQuantizeLSTM`, which finds the ranges of what it reads in each call."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.ort_optimize import optimize_basic
from compress.formats.silence import silence


def quantize_recurrent(graph: onnx.ModelProto, per_channel: bool, reduce_range: bool) -> tuple[onnx.ModelProto, int]:
    """``graph`` with each `LSTM` of float weights in integers, in branches too, and how many there are.

    Weights that are put together of constants are put together first. What came out no smaller is left as it was.
    """
    if not _count(graph, "LSTM"):
        return graph, 0
    source = onnx.ModelProto()
    source.CopyFrom(graph if _all_stored(graph) else optimize_basic(graph))
    # ONNX Runtime opens a graph that doesn't say which set its own operators are of; onnx infers no shapes of it.
    known = {entry.domain for entry in source.opset_import} | {"", "ai.onnx"}
    used = {node.domain for one in all_graphs(source.graph) for node in one.node}
    source.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(used - known))
    made = _quantized(source, per_channel, reduce_range)
    count = _count(made, "DynamicQuantizeLSTM")
    return (made, count) if count and made.ByteSize() < graph.ByteSize() else (graph, 0)


def _quantized(graph: onnx.ModelProto, per_channel: bool, reduce_range: bool) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    producer = graph.producer_name
    with silence("logs"), tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        quantize_dynamic(
            graph,
            output,
            op_types_to_quantize=["LSTM"],
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"EnableSubgraph": True, "DefaultTensorType": TensorProto.FLOAT},
        )
        made: onnx.ModelProto = onnx.load(output)
    made.producer_name, made.producer_version = producer, ""
    return made


def _count(graph: onnx.ModelProto, operator: str) -> int:
    return sum(node.op_type == operator for one in all_graphs(graph.graph) for node in one.node)


def _all_stored(graph: onnx.ModelProto) -> bool:
    """Whether the weights of each `LSTM` are initializers of its own graph."""
    return all(
        set(node.input[1:3]) <= {tensor.name for tensor in one.initializer}
        for one in all_graphs(graph.graph)
        for node in one.node
        if node.op_type == "LSTM"
    )
