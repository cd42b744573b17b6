"""`QuantizeLinear` and `DequantizeLinear` around chosen nodes, by ONNX Runtime's own quantizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from compress.formats.onnx.int8.settings import StaticSettings, Types
from compress.formats.silence import silence

_FLOAT_OUTPUT = ("MatMul", "Gemm")
"""Products give float: what follows them (bias, GELU, normalisation, softmax) is computed in it."""
_KNOWN = ("onnx.infer", "onnxruntime.quant")
"""Keeps the quantizer from inferring shapes, which those of fused operators contradict."""

Range = tuple[float, float]


def insert_qdq(
    graph: onnx.ModelProto, nodes: Collection[str], ranges: Mapping[str, Range], settings: StaticSettings
) -> onnx.ModelProto:
    """A copy of ``graph`` in which the nodes named are computed from 8-bit values.

    ``ranges`` has lowest and highest value of each float tensor that they read, and of those that convolutions and
    nodes between them write.
    """
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    source = onnx.ModelProto()
    source.CopyFrom(graph)
    del source.graph.value_info[:]
    source.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ranges)
    source.metadata_props.add(key=_KNOWN[0], value=_KNOWN[1])
    activations, weights = quant_types(settings.types)
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    wanted = set(nodes)
    with silence("logs"):
        quantizer = QDQQuantizer(
            source,
            settings.per_channel,
            settings.reduce_range is True,
            weights,
            activations,
            data,
            sorted(wanted),
            [],
            sorted({node.op_type for node in source.graph.node if node.name in wanted}),
            {
                "WeightSymmetric": settings.types != "u8u8",
                "OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT),
            },
        )
        quantized: onnx.ModelProto = quantizer.quantize_model()
    quantized.producer_name, quantized.producer_version = graph.producer_name, ""
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(graph.metadata_props)
    del quantized.graph.value_info[:]
    return quantized


def quant_types(types: Types) -> tuple[object, object]:
    """ONNX Runtime's types of activations and weights."""
    from onnxruntime.quantization import QuantType

    known = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
    return known[types[:2]], known[types[2:]]
