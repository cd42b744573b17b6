"""INT8 weights in an ONNX graph: matrix products through ONNX Runtime's quantizer, embedding tables in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.choose import WEIGHTED, QuantizableLayer, find_layers, refuse_unfit
from compress.formats.onnx.int8.kernels import unpack_attention
from compress.formats.onnx.int8.settings import ReduceRange
from compress.formats.silence import silence
from compress.numerics.block_quantization import pack_nibbles, quantize_blocks

_OPERATORS = ["MatMul", "Gemm", "Attention"]
_LARGEST_BLOCK = {8: 128, 4: 32}
_SMALLEST_BLOCK = 16
_CONTRIB = "com.microsoft"


def quantize_products(
    graph: onnx.ModelProto, per_channel: bool, reduce_range: bool, kept: Collection[str] = ()
) -> onnx.ModelProto:
    """Dynamic INT8 for `MatMul`, `Gemm` and `Attention` with constant weights, but for the nodes named in ``kept``.

    Recorded shapes are dropped first: those of a fused graph contradict what the quantizer infers.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = onnx.ModelProto()
    source.CopyFrom(graph)
    del source.graph.value_info[:]
    _give_biases_to_products(source.graph)
    with silence("logs"), tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        quantize_dynamic(
            source,
            output,
            op_types_to_quantize=_OPERATORS,
            # ONNX Runtime makes a product and an addition of each Gemm first.
            nodes_to_exclude=[name for node in kept for name in (node, f"{node}_MatMul")],
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={
                "MatMulConstBOnly": True,
                "EnableSubgraph": True,
                "DefaultTensorType": onnx.TensorProto.FLOAT,
            },
        )
        quantized = onnx.load(output)
    quantized.producer_name, quantized.producer_version = graph.producer_name, ""
    return quantized


def _give_biases_to_products(graph: onnx.GraphProto) -> None:
    """Each `BiasGelu` of a product with stored weights as `Add` and `Gelu`, in place.

    ONNX Runtime takes an addition into `DynamicQuantizeMatMul`, and computes `Gelu` alone in three fifths of the time.
    """
    stored = {tensor.name for tensor in graph.initializer}
    products = {node.output[0] for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored}
    nodes = []
    for node in graph.node:
        if node.op_type != "BiasGelu" or node.input[0] not in products:
            nodes.append(node)
            continue
        total = f"{node.output[0]}_biased"
        nodes.append(helper.make_node("Add", list(node.input), [total], name=f"{node.name}_bias"))
        nodes.append(helper.make_node("Gelu", [total], list(node.output), name=node.name, domain=_CONTRIB))
    del graph.node[:]
    graph.node.extend(nodes)


def quantize_embeddings(model: onnx.ModelProto, bits: int, largest_block: int | None = None) -> list[str]:
    """Turn each look-up in a float table into `GatherBlockQuantized`, in place; returns the tables' names.

    A block is the largest power of two up to ``largest_block`` that divides a table's width. A table without one
    (from 16 on) is left alone, and so not among the names.
    """
    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer}
    lookups = [
        node
        for node in graph.node
        if node.op_type == "Gather" and _axis(node) == 0 and _is_table(tables.get(node.input[0]))
    ]
    done = []
    for name in dict.fromkeys(node.input[0] for node in lookups):
        weight = numpy_helper.to_array(tables[name])
        block = _block_size(weight.shape[1], largest_block or _LARGEST_BLOCK[bits])
        readers = [node for node in graph.node if name in node.input]
        if block is None or any(reader not in lookups for reader in readers):
            continue
        parts = _add_quantized(graph, name, weight, bits, block)
        for node in readers:
            _replace_lookup(node, parts, bits, block)
        graph.initializer.remove(tables[name])
        done.append(name)
    if done and not any(entry.domain == _CONTRIB for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    return done


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _is_table(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2


def _block_size(width: int, size: int) -> int | None:
    while size >= _SMALLEST_BLOCK:
        if width % size == 0:
            return size
        size //= 2
    return None


def _add_quantized(
    graph: onnx.GraphProto, name: str, weight: np.ndarray, bits: int, block: int
) -> tuple[str, str, str]:
    quantized = quantize_blocks(weight, bits, block)
    integers, zero_points = quantized.integers, quantized.zero_points
    if bits == 4:
        integers, zero_points = pack_nibbles(integers), pack_nibbles(zero_points)
    names = (f"{name}_quantized", f"{name}_scales", f"{name}_zero_points")
    for part, array in zip(names, (integers, quantized.scales, zero_points), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), part))
    return names


def _replace_lookup(node: onnx.NodeProto, parts: tuple[str, str, str], bits: int, block: int) -> None:
    data, scales, zero_points = parts
    replacement = helper.make_node(
        "GatherBlockQuantized",
        [data, node.input[1], scales, zero_points],
        list(node.output),
        name=node.name,
        domain=_CONTRIB,
        gather_axis=0,
        quantize_axis=1,
        block_size=block,
        bits=bits,
    )
    node.CopyFrom(replacement)


@dataclass
class DynamicQuantizer:
    """A graph, ready to be quantized again and again; ``layers`` are what can be 8-bit, and smaller ones stay float."""

    graph: onnx.ModelProto
    per_channel: bool = True
    reduce_range: ReduceRange = False
    narrowed: list[str] = field(init=False, default_factory=list)
    layers: list[QuantizableLayer] = field(init=False)

    def __post_init__(self) -> None:
        """Raises `StageError` for a graph that is quantized already or holds nothing to quantize."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        unpack_attention(model)
        self.layers = find_layers(model)
        names = {layer.name for layer in self.layers}
        self._small = [str(node.name) for node in model.graph if node.op_type in WEIGHTED and node.name not in names]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """The 8-bit graph, the layers named in ``kept`` left in float."""
        graph = quantize_products(self.graph, self.per_channel, self.reduce_range is True, [*kept, *self._small])
        self.narrowed = keep_from_saturating(graph, self.graph) if self.reduce_range == "saturating" else []
        return graph
