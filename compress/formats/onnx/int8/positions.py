"""Tables whose rows are looked up in order: a piece is cut out, and made float by one scale a column.

An encoder asks for the positions 0, 1, 2 and so on. ONNX Runtime's `GatherBlockQuantized` fetches them one number at a
time; a `Slice` is a copy, and `DequantizeLinear` is vector code.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

_HIGHEST = 127


def quantize_rows_in_order(model: onnx.ModelProto) -> list[str]:
    """Store each float table that is only read from row 0 on in int8, a scale a column, in place; returns their names.

    What reads the rows must be an addition: they come without an axis for the batch.
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
