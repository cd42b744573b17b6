"""Dynamic INT8 of an ONNX graph through ONNX Runtime's quantizer, and 8- or 4-bit embedding tables in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.fuse_integer_ops import unpack_attention
from compress.formats.onnx.int8.select_nodes import WEIGHTED, QuantizableLayer, find_layers, refuse_unfit
from compress.formats.onnx.int8.settings import ReduceRange
from compress.formats.onnx.model import all_graphs
from compress.formats.onnx.ort_optimize import optimize_basic
from compress.formats.silence import silence
from compress.numerics.block_quantization import pack_nibbles, quantize_blocks

_OPERATORS = ["MatMul", "Gemm", "Attention"]
_LARGEST_BLOCK = {8: 128, 4: 32}
_SMALLEST_BLOCK = 16
_CONTRIB = "com.microsoft"


def quantize_products(
    graph: onnx.ModelProto, per_channel: bool, reduce_range: bool, float_layers: Collection[str] = ()
) -> onnx.ModelProto:
    """Dynamic INT8 for `MatMul`, `Gemm` and `Attention` with constant weights, but for the nodes named in ``float_layers``.

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
            nodes_to_exclude=[name for node in float_layers for name in (node, f"{node}_MatMul")],
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

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """The 8-bit graph, the layers named in ``float_layers`` left in float."""
        graph = quantize_products(
            self.graph, self.per_channel, self.reduce_range is True, [*float_layers, *self._small]
        )
        self.narrowed = keep_from_saturating(graph, self.graph) if self.reduce_range == "saturating" else []
        return graph


_HIGHEST = 127


def quantize_rows_in_order(model: onnx.ModelProto) -> list[str]:
    """Store each float table that is only read from row 0 on in int8, a scale a column, in place; returns their names.

    An encoder asks for the positions 0, 1, 2 and so on. `GatherBlockQuantized` fetches them one number at a time; a
    `Slice` is a copy, and `DequantizeLinear` is vector code. What reads the rows must be an addition: they come without
    an axis for the batch.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    done = []
    for lookup in [node for node in graph.node if node.op_type == "Gather"]:
        table, cut = constants.get(lookup.input[0]), _cut_of(graph, constants, lookup)
        if table is None or cut is None or len(table.dims) != 2 or table.data_type != onnx.TensorProto.FLOAT:
            continue
        if not _added(graph, lookup.output[0]) or _readers(graph, table.name) != [lookup]:
            continue
        _replace(graph, lookup, cut, table)
        done.append(table.name)
    return done


def _cut_of(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], lookup: onnx.NodeProto
) -> onnx.NodeProto | None:
    """The `Slice` that gives a look-up the rows 0, 1, 2, ..., where nothing else reads it."""
    rows = lookup.input[1]
    cut = next((node for node in graph.node if rows in node.output), None)
    if cut is None or cut.op_type != "Slice" or len(cut.input) < 4 or _readers(graph, rows) != [lookup]:
        return None
    counted, start, axis = (
        numpy_helper.to_array(constants[name]) if name in constants else None
        for name in (cut.input[0], cut.input[1], cut.input[3])
    )
    if counted is None or start is None or axis is None or (start != 0).any():
        return None
    every = counted.ndim and counted.size == counted.shape[-1] and (counted.ravel() == np.arange(counted.size)).all()
    steps = constants.get(cut.input[4]) if len(cut.input) > 4 else None
    one_by_one = len(cut.input) < 5 or (steps is not None and (numpy_helper.to_array(steps) == 1).all())
    along = axis.tolist() in ([counted.ndim - 1], [-1])
    by_rows = all(attribute.i == 0 for attribute in lookup.attribute)
    return cut if every and one_by_one and along and by_rows else None


def _readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if name in node.input]


def _added(graph: onnx.GraphProto, name: str) -> bool:
    readers = _readers(graph, name)
    returned = any(output.name == name for output in graph.output)
    return bool(readers) and not returned and all(node.op_type == "Add" for node in readers)


def _replace(graph: onnx.GraphProto, lookup: onnx.NodeProto, cut: onnx.NodeProto, table: onnx.TensorProto) -> None:
    weight, name = numpy_helper.to_array(table), table.name
    scales = np.maximum(np.abs(weight).max(axis=0) / _HIGHEST, np.finfo(np.float32).tiny).astype(np.float32)
    integers = np.clip(np.round(weight / scales), -_HIGHEST, _HIGHEST).astype(np.int8)
    graph.initializer.remove(table)
    for part, array in (
        (f"{name}_quantized", integers),
        (f"{name}_scales", scales),
        (f"{name}_axis", np.array([0], np.int64)),
    ):
        graph.initializer.append(numpy_helper.from_array(array, part))
    inputs = [f"{name}_quantized", cut.input[1], cut.input[2], f"{name}_axis"]
    sliced = helper.make_node("Slice", inputs, [f"{name}_rows"], name=cut.name)
    made = helper.make_node(
        "DequantizeLinear", [f"{name}_rows", f"{name}_scales"], list(lookup.output), name=lookup.name, axis=1
    )
    at = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    graph.node.insert(at, made)
    graph.node.insert(at, sliced)
    graph.node.remove(cut)
    # Its recorded shape has an axis for the batch.
    for known in [one for one in graph.value_info if one.name in (lookup.output[0], *cut.output)]:
        graph.value_info.remove(known)
    read = {name for node in graph.node for name in node.input}
    for unused in [one for one in graph.initializer if one.name in cut.input and one.name not in read]:
        graph.initializer.remove(unused)


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
