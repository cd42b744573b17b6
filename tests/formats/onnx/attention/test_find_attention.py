"""Attention found in graphs of other people's forms: what is left computes the same, and nothing else is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exports import run
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.attention.find import count_unfused, find_attention
from compress.formats.onnx.attention.lower import lower_attention

HEADS, SIZE, LENGTH, BATCH = 3, 8, 5, 2
WIDTH = HEADS * SIZE
LOWEST = float(np.finfo(np.float32).min)
Step = tuple[str, list[str], list[str], dict[str, Any]]

FOUR = [
    *(("Reshape", [name, "split"], [f"{name}_split"], {}) for name in "qkv"),
    ("Transpose", ["q_split"], ["q_heads"], {"perm": [0, 2, 1, 3]}),
    ("Transpose", ["k_split"], ["k_heads"], {"perm": [0, 2, 3, 1]}),
    ("Transpose", ["v_split"], ["v_heads"], {"perm": [0, 2, 1, 3]}),
    ("MatMul", ["q_heads", "k_heads"], ["scores"], {}),
]
AFTER = [
    ("Transpose", ["context"], ["back"], {"perm": [0, 2, 1, 3]}),
    ("Reshape", ["back", "merge"], ["y"], {}),
]
END = [("Softmax", ["total"], ["weights"], {"axis": -1}), ("MatMul", ["weights", "v_heads"], ["context"], {}), *AFTER]
PADDING = [
    ("Unsqueeze", ["attention_mask", "axes_1_2"], ["row"], {}),
    ("Cast", ["row"], ["float_row"], {"to": TensorProto.FLOAT}),
    ("Sub", ["one", "float_row"], ["hidden"], {}),
    ("Mul", ["hidden", "lowest"], ["mask"], {}),
]
FORMS: dict[str, list[Step]] = {
    # BERT: scores / sqrt(size) + mask
    "padding": [
        *PADDING,
        *FOUR,
        ("Div", ["scores", "root"], ["scaled"], {}),
        ("Add", ["scaled", "mask"], ["total"], {}),
    ],
    # MPNet: a bias that all rows of the batch share, and the mask
    "relative": [
        *PADDING,
        *FOUR,
        ("Div", ["scores", "root"], ["scaled"], {}),
        ("Add", ["bias", "scaled"], ["biased"], {}),
        ("Add", ["biased", "mask"], ["total"], {}),
    ],
    # XLNet: all is scaled together, and what is hidden subtracted
    "scaled together": [
        *PADDING,
        *FOUR,
        ("Add", ["scores", "bias"], ["biased"], {}),
        ("Mul", ["biased", "half"], ["scaled"], {}),
        ("Neg", ["mask"], ["negative"], {}),
        ("Sub", ["scaled", "negative"], ["total"], {}),
    ],
    # DeBERTa: queries are scaled, scores filled where a square mask says so
    "filled": [
        *FOUR[:-1],
        ("Mul", ["q_heads", "half"], ["q_scaled"], {}),
        ("MatMul", ["q_scaled", "k_heads"], ["scores"], {}),
        ("Cast", ["attention_mask"], ["mask_bool"], {"to": TensorProto.BOOL}),
        ("Unsqueeze", ["mask_bool", "axes_1_2"], ["keys"], {}),
        ("Unsqueeze", ["mask_bool", "axes_1_3"], ["queries"], {}),
        ("And", ["keys", "queries"], ["seen"], {}),
        ("Not", ["seen"], ["unseen"], {}),
        ("Where", ["unseen", "lowest", "scores"], ["total"], {}),
    ],
    # Swin v2: a scale for each head, a bias, and a mask for each window, of which every picture has as many
    "windows": [
        *FOUR,
        ("Mul", ["scores", "by"], ["scaled"], {}),
        ("Add", ["scaled", "bias"], ["biased"], {}),
        ("Reshape", ["biased", "five"], ["windows"], {}),
        ("Add", ["windows", "window_mask"], ["masked"], {}),
        ("Add", ["masked", "window_mask"], ["masked_again"], {}),
        ("Reshape", ["masked_again", "four"], ["total"], {}),
    ],
    # DeBERTa v2: batch and heads are one axis
    "three axes": [
        *PADDING,
        *FOUR[:-1],
        ("Reshape", ["q_heads", "three"], ["q_three"], {}),
        ("Transpose", ["k_heads"], ["k_plain"], {"perm": [0, 1, 3, 2]}),
        ("Reshape", ["k_plain", "three"], ["k_three"], {}),
        ("Transpose", ["k_three"], ["k_turned"], {"perm": [0, 2, 1]}),
        ("Div", ["k_turned", "root"], ["k_scaled"], {}),
        ("MatMul", ["q_three", "k_scaled"], ["scores"], {}),
        ("Reshape", ["scores", "four"], ["scores_four"], {}),
        ("Add", ["scores_four", "bias"], ["biased"], {}),
        ("Add", ["biased", "mask"], ["total"], {}),
    ],
}
THREE_END = [
    ("Softmax", ["total"], ["weights"], {"axis": -1}),
    ("Reshape", ["weights", "scores_three"], ["weights_three"], {}),
    ("Reshape", ["v_heads", "three"], ["v_three"], {}),
    ("MatMul", ["weights_three", "v_three"], ["context_three"], {}),
    ("Reshape", ["context_three", "values_four"], ["context"], {}),
    *AFTER,
]


def model_of(steps: list[Step], outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    generator = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "split": np.array([0, 0, HEADS, SIZE]),
        "merge": np.array([0, 0, WIDTH]),
        "three": np.array([BATCH * HEADS, LENGTH, SIZE]),
        "four": np.array([BATCH, HEADS, LENGTH, LENGTH]),
        "scores_three": np.array([BATCH * HEADS, LENGTH, LENGTH]),
        "values_four": np.array([BATCH, HEADS, LENGTH, SIZE]),
        "axes_1_2": np.array([1, 2]),
        "axes_1_3": np.array([1, 3]),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "root": np.float32(SIZE**0.5),
        "lowest": np.float32(LOWEST),
        "bias": generator.normal(size=(1, HEADS, LENGTH, LENGTH)).astype(np.float32),
        "by": np.linspace(0.2, 0.9, HEADS, dtype=np.float32).reshape(HEADS, 1, 1),
        "five": np.array([1, BATCH, HEADS, LENGTH, LENGTH]),
        "window_mask": generator.normal(size=(1, BATCH, 1, LENGTH, LENGTH)).astype(np.float32),
    }
    used = {name for _, inputs, _, _ in steps for name in inputs}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, LENGTH, WIDTH]) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [BATCH, LENGTH]))
    graph = helper.make_graph(
        [helper.make_node(kind, sources, model, **attributes) for kind, sources, model, attributes in steps],
        "attention",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def whole(form: str) -> list[Step]:
    return [*FORMS[form], *(THREE_END if form == "three axes" else END)]


def feed() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 3:] = 0
    arrays = {name: generator.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32) for name in "qkv"}
    return {**arrays, "attention_mask": mask}


def fused(model: ir.Model) -> tuple[int, Counter[str]]:
    count = find_attention(model)
    assert lower_attention(model) == count
    return count, Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_one_operator_that_computes_the_same(form: str):
    model = model_of(whole(form))
    expected = run(model_of(whole(form)), **feed())
    assert count_unfused(model) == 1
    count, operators = fused(model)
    assert count == operators["MultiHeadAttention"] == 1 and operators["Softmax"] == 0 and count_unfused(model) == 0
    # Everything that turned heads to and fro is gone.
    assert operators["Transpose"] == 0
    actual = run(model, **feed())
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(actual - run(model, **feed() | {"q": -feed()["q"]})).max() > 0.1


@pytest.mark.parametrize("form", ["padding", "relative", "three axes"])
def test_padding_stays_one_row_for_all_queries(form: str):
    model = model_of(whole(form))
    fused(model)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert node.inputs[4] is not None and node.inputs[4].name == "attention_mask_int32"
    assert (len(node.inputs) > 5) == (form != "padding")


def _read_elsewhere() -> ir.Model:
    return model_of(whole("padding"), ("y", "weights"))


def _along_queries() -> ir.Model:
    return model_of([*FORMS["padding"], ("Softmax", ["total"], ["weights"], {"axis": 2}), *END[1:]])


@pytest.mark.parametrize("made", [_read_elsewhere, _along_queries])
def test_other_softmaxes_are_left_alone(made: Callable[[], ir.Model]):
    model = made()
    original = ir.to_proto(model).SerializeToString()
    assert find_attention(model) == 0
    assert ir.to_proto(model).SerializeToString() == original


def test_values_that_are_scaled_stay_scaled():
    steps = [*FORMS["padding"], ("Mul", ["v_heads", "half"], ["v_scaled"], {}), END[0]]
    steps += [("MatMul", ["weights", "v_scaled"], ["context"], {}), *AFTER]
    model, expected = model_of(steps), run(model_of(steps), **feed())
    fused(model)
    np.testing.assert_allclose(run(model, **feed()), expected, atol=1e-5)


def test_a_row_that_is_no_mask_is_left_alone():
    # One row for all queries, made of the scores of other ones.
    steps = [
        *FOUR,
        ("MatMul", ["v_heads", "k_heads"], ["others"], {}),
        ("ReduceMean", ["others", "axes_1_2"], ["row"], {"keepdims": 1}),
        ("Add", ["scores", "row"], ["total"], {}),
        *END,
    ]
    model = model_of(steps)
    assert find_attention(model) == 0 and count_unfused(model) == 1
