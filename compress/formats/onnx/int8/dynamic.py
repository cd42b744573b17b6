"""Dynamic INT8 of an ONNX graph through ONNX Runtime's quantizer, and 8- or 4-bit embedding tables in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.graph_edits import MICROSOFT, optimize_basic
from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.fuse_integer_ops import unpack_attention
from compress.formats.onnx.int8.select_nodes import WEIGHTED, QuantizableLayer, find_layers, refuse_unfit
from compress.formats.onnx.int8.settings import ReduceRange
from compress.formats.onnx.model import all_graphs
from compress.formats.quiet_output import suppress_output
from compress.numerics.block_quantization import pack_nibbles, quantize_blocks

_LARGEST_BLOCK = {8: 128, 4: 32}
_SMALLEST_BLOCK = 16


def quantize_products(
    graph: onnx.ModelProto, per_channel: bool, reduce_range: bool, float_layers: Collection[str] = ()
) -> onnx.ModelProto:
    """Return ``graph`` with dynamic INT8 for `MatMul`, `Gemm` and `Attention` with constant weights.

    Args:
        graph: The float graph.
        per_channel: Whether each output channel has its own scale.
        reduce_range: Whether weights have 7 bits.
        float_layers: Names of nodes that stay float.
    """
    source = deepcopy(graph)
    # Recorded shapes of a fused graph contradict those that the quantizer infers.
    del source.graph.value_info[:]
    _give_biases_to_products(source.graph)
    # ONNX Runtime makes a product and an addition of each Gemm first.
    excluded = [name for node in float_layers for name in (node, f"{node}_MatMul")]
    return _quantize(source, ["MatMul", "Gemm", "Attention"], per_channel, reduce_range, excluded)


def _quantize(
    graph: onnx.ModelProto, operators: list[str], per_channel: bool, reduce_range: bool, excluded: Sequence[str] = ()
) -> onnx.ModelProto:
    """Return the file that ONNX Runtime's quantizer writes for ``graph``, which it changes.

    Args:
        graph: The float graph.
        operators: Types of the operators to quantize.
        per_channel: Whether each output channel has its own scale.
        reduce_range: Whether weights have 7 bits.
        excluded: Names of nodes that stay float.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    producer = graph.producer_name
    with suppress_output("logs"), tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        quantize_dynamic(
            graph,
            output,
            op_types_to_quantize=operators,
            nodes_to_exclude=list(excluded),
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"EnableSubgraph": True, "DefaultTensorType": TensorProto.FLOAT},
        )
        quantized: onnx.ModelProto = onnx.load(output)
    quantized.producer_name, quantized.producer_version = producer, ""
    return quantized


def _give_biases_to_products(graph: onnx.GraphProto) -> None:
    """Split each `BiasGelu` after a product with stored weights into `Add` and `Gelu`, in place.

    ONNX Runtime fuses the addition into `DynamicQuantizeMatMul`, and `Gelu` alone takes three fifths of the time.
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
        nodes.append(helper.make_node("Gelu", [total], list(node.output), name=node.name, domain=MICROSOFT))
    del graph.node[:]
    graph.node.extend(nodes)


def quantize_embeddings(model: onnx.ModelProto, bits: int, largest_block: int | None = None) -> list[str]:
    """Replace each lookup in a float table by `GatherBlockQuantized`, in place; return the tables' names.

    A block is the largest power of two up to ``largest_block`` that divides a table's width. A table whose width has no
    such divisor from 16 on stays float, and its name is not returned.
    """
    graph = model.graph
    tables = _float_matrices(graph)
    gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    lookups = [node for node in gathers if all(attribute.i == 0 for attribute in node.attribute)]
    done = []
    for name in dict.fromkeys(node.input[0] for node in lookups):
        weight = numpy_helper.to_array(tables[name])
        # The largest power of two that divides the width.
        block = min(largest_block or _LARGEST_BLOCK[bits], weight.shape[1] & -weight.shape[1])
        readers = _readers(graph, name)
        # A table with another reader would have to be stored twice.
        if block < _SMALLEST_BLOCK or any(reader not in lookups for reader in readers):
            continue
        # Store a table's integers, scales and zero points, and return their names.
        quantized = quantize_blocks(weight, bits, block)
        integers, zero_points = quantized.integers, quantized.zero_points
        if bits == 4:
            integers, zero_points = pack_nibbles(integers), pack_nibbles(zero_points)
        parts = (f"{name}_quantized", f"{name}_scales", f"{name}_zero_points")
        for part, array in zip(parts, (integers, quantized.scales, zero_points), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), part))
        data, *others = parts
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
        for node in readers:
            inputs, outputs = [data, node.input[1], *others], list(node.output)
            lookup = helper.make_node(
                "GatherBlockQuantized", inputs, outputs, name=node.name, domain=MICROSOFT, **attributes
            )
            node.CopyFrom(lookup)
        graph.initializer.remove(tables[name])
        done.append(name)
    # The contrib domain must be declared once.
    if done and not any(entry.domain == MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return done


def _float_matrices(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the stored float matrices by name."""
    matrices = (tensor for tensor in graph.initializer if len(tensor.dims) == 2)
    return {tensor.name: tensor for tensor in matrices if tensor.data_type == TensorProto.FLOAT}


def _readers(graph: onnx.GraphProto, name: str) -> list[onnx.NodeProto]:
    """Return the nodes that read a value."""
    return [node for node in graph.node if name in node.input]


@dataclass
class DynamicQuantizer:
    """A graph that can be quantized repeatedly; ``layers`` can be 8-bit, smaller ones stay float."""

    graph: onnx.ModelProto
    per_channel: bool = True
    reduce_range: ReduceRange = False
    narrowed: list[str] = field(init=False, default_factory=list)
    layers: list[QuantizableLayer] = field(init=False)

    def __post_init__(self) -> None:
        """Find the layers. Raises `StageError` for a graph that is quantized already or has nothing to quantize."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        unpack_attention(model)
        self.layers = find_layers(model)
        names = {layer.name for layer in self.layers}
        self._small = [str(node.name) for node in model.graph if node.op_type in WEIGHTED and node.name not in names]

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """Return the 8-bit graph in which ``float_layers`` stay float."""
        graph = quantize_products(
            self.graph, self.per_channel, self.reduce_range is True, [*float_layers, *self._small]
        )
        self.narrowed = keep_from_saturating(graph, self.graph) if self.reduce_range == "saturating" else []
        return graph


_HIGHEST = 127


def quantize_rows_in_order(model: onnx.ModelProto) -> list[str]:
    """Store each float table that is only read from row 0 on as int8 with a scale per column, in place; return names.

    An encoder reads the positions 0, 1, 2 and so on. `GatherBlockQuantized` fetches them one element at a time. A
    `Slice` is a copy, and `DequantizeLinear` is vectorised. The reader of the rows must be an addition, because they
    have no batch axis.
    """
    graph = model.graph
    tables, returned = _float_matrices(graph), {output.name for output in graph.output}
    done = []
    for lookup in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]:
        name, rows = lookup.input[0], lookup.output[0]
        sums = _readers(graph, rows)
        if not sums or rows in returned or any(node.op_type != "Add" for node in sums):
            continue
        if _readers(graph, name) == [lookup] and (cut := _cut_of(graph, lookup)) is not None:
            _replace(graph, lookup, cut, tables[name])
            done.append(name)
    return done


def _cut_of(graph: onnx.GraphProto, lookup: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the `Slice` that gives a lookup the rows 0, 1, 2, ..., if nothing else reads it."""
    constants, rows = {tensor.name: tensor for tensor in graph.initializer}, lookup.input[1]
    cut = next((node for node in graph.node if rows in node.output), None)
    if cut is None or cut.op_type != "Slice" or len(cut.input) < 4 or _readers(graph, rows) != [lookup]:
        return None
    # All inputs but the ends must be stored.
    stored = [name for index, name in enumerate(cut.input) if index != 2]
    if not constants.keys() >= set(stored):
        return None
    counted, start, axis, *steps = (numpy_helper.to_array(constants[name]) for name in stored)
    # The sliced constant must count 0, 1, 2, ... and be sliced from 0 with step 1 along its only long axis.
    every = counted.ndim and counted.size == counted.shape[-1] and (counted.ravel() == np.arange(counted.size)).all()
    one_by_one = not (start != 0).any() and all((step == 1).all() for step in steps)
    along = axis.tolist() in ([counted.ndim - 1], [-1])
    by_rows = all(attribute.i == 0 for attribute in lookup.attribute)
    return cut if every and one_by_one and along and by_rows else None


def _replace(graph: onnx.GraphProto, lookup: onnx.NodeProto, cut: onnx.NodeProto, table: onnx.TensorProto) -> None:
    """Replace a lookup of consecutive rows by `Slice` and `DequantizeLinear`.

    Args:
        graph: The graph.
        lookup: The `Gather`.
        cut: The `Slice` of its indices.
        table: The float table.
    """
    weight, name = numpy_helper.to_array(table), table.name
    # One scale for each column; a column of zeros gets the smallest normal float.
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
    dequantized = helper.make_node(
        "DequantizeLinear", [f"{name}_rows", f"{name}_scales"], list(lookup.output), name=lookup.name, axis=1
    )
    at = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    graph.node.insert(at, dequantized)
    graph.node.insert(at, sliced)
    graph.node.remove(cut)
    # Its recorded shape has an axis for the batch.
    for recorded in [entry for entry in graph.value_info if entry.name in (lookup.output[0], *cut.output)]:
        graph.value_info.remove(recorded)
    read = {name for node in graph.node for name in node.input}
    for unused in [entry for entry in graph.initializer if entry.name in cut.input and entry.name not in read]:
        graph.initializer.remove(unused)


def quantize_recurrent(graph: onnx.ModelProto, per_channel: bool, reduce_range: bool) -> tuple[onnx.ModelProto, int]:
    """Return ``graph`` with each `LSTM` of float weights as `DynamicQuantizeLSTM`, in branches too, and their number.

    The operator finds the ranges of its inputs in each call. Weights that are computed from constants are folded first.
    A graph that would not become smaller is returned unchanged.
    """
    nodes = [(node, subgraph) for subgraph in all_graphs(graph.graph) for node in subgraph.node]
    lstms = [(node, subgraph) for node, subgraph in nodes if node.op_type == "LSTM"]
    if not lstms:
        return graph, 0
    # The quantizer needs the weights of each `LSTM` as initializers of its own graph.
    stored = all({*node.input[1:3]} <= {tensor.name for tensor in subgraph.initializer} for node, subgraph in lstms)
    source = deepcopy(graph) if stored else optimize_basic(graph)
    # ONNX Runtime opens a graph that doesn't say which set its own operators are of; onnx infers no shapes of it.
    domains = {entry.domain for entry in source.opset_import} | {"", "ai.onnx"}
    used = {node.domain for subgraph in all_graphs(source.graph) for node in subgraph.node}
    source.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(used - domains))
    quantized = _quantize(source, ["LSTM"], per_channel, reduce_range)
    kinds = (node.op_type for subgraph in all_graphs(quantized.graph) for node in subgraph.node)
    count = sum(kind == "DynamicQuantizeLSTM" for kind in kinds)
    return (quantized, count) if count and quantized.ByteSize() < graph.ByteSize() else (graph, 0)
