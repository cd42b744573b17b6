"""Tables whose rows are read in order become a piece of int8 and a scale a column; others are left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.dynamic import quantize_rows_in_order

ROWS, WIDTH = 12, 5
TABLE = (np.random.default_rng(0).standard_normal((ROWS, WIDTH)) * [1, 10, 100, 0, 0.01]).astype(np.float32)
WORDS = np.random.default_rng(1).standard_normal((2, 7, WIDTH)).astype(np.float32)


def positions(
    counted: np.ndarray | None = None, start: int = 0, step: int = 1, reader: str = "Add", ids_too: bool = False
) -> onnx.ModelProto:
    """``words`` [batch, length, width] and the rows 0, 1, 2, ... of a table, as an encoder is exported."""
    counted = np.arange(ROWS)[None] if counted is None else counted
    nodes = [
        helper.make_node("Shape", ["words"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["counted", "start", "length", "axis", "step"], ["ids"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node(reader, ["words", "rows"], ["sum"]),
    ]
    outputs = [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", "rows", WIDTH])]
    if ids_too:
        outputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "rows"]))
        nodes.append(helper.make_node("Identity", ["ids"], ["kept"]))
    arrays = {"table": TABLE, "counted": counted, "start": [start], "axis": [counted.ndim - 1], "step": [step]}
    words = helper.make_tensor_value_info("words", TensorProto.FLOAT, ["batch", "length", WIDTH])
    graph_inputs = [
        numpy_helper.from_array(np.asarray(array, None if name == "table" else np.int64), name)
        for name, array in arrays.items()
    ]
    recorded = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [*[1] * (counted.ndim - 1), "rows", WIDTH])]
    graph = helper.make_graph(nodes, "positions", [words], outputs, graph_inputs, value_info=recorded)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> Any:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["sum"], {"words": WORDS})[0]


@pytest.mark.parametrize("counted", [np.arange(ROWS)[None], np.arange(ROWS)], ids=["a row", "flat"])
def test_rows_come_back_within_half_a_step_of_their_column(counted: np.ndarray) -> None:
    model = positions(counted)
    expected = run(model)
    assert quantize_rows_in_order(model) == ["table"]
    assert Counter(node.op_type for node in model.graph.node) == dict.fromkeys(
        ("Shape", "Slice", "DequantizeLinear", "Add"), 1
    )
    error = np.abs(run(model) - expected)
    step = np.abs(TABLE).max(axis=0) / 127
    assert (error <= step * 0.501 + 1e-5).all() and (error.max(axis=(0, 1))[:3] > step[:3] / 4).all()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not model.graph.value_info, "a shape that was recorded no longer holds"
    assert stored["table_quantized"].dtype == np.int8 and "counted" not in stored and "table" not in stored


@pytest.mark.parametrize(
    "model",
    [
        positions(start=1),
        positions(step=2),
        positions(np.arange(ROWS)[None, ::-1]),
        positions(reader="Mul"),
        positions(ids_too=True),
    ],
    ids=["not from 0", "every other", "backwards", "not added", "ids are read too"],
)
def test_other_look_ups_are_left_alone(model: onnx.ModelProto) -> None:
    original = model.SerializeToString()
    assert quantize_rows_in_order(model) == [] and model.SerializeToString() == original
