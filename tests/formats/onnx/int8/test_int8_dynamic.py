"""Tests of dynamic INT8 graphs: embedding lookups equal their integers' values, and logits stay close to float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from exports import batch, exported, run
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model
from recurrent_graph import WIDTH, recurrent

from compress.formats.onnx.int8 import dynamic as subject
from compress.formats.onnx.int8.dynamic import (
    quantize_embeddings,
    quantize_products,
    quantize_recurrent,
    quantize_rows_in_order,
)
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.numerics.block_quantization import quantize_blocks

ROWS = 11


def table(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(4, (ROWS, width)).astype(np.float32)


def lookup(width: int, axis: int = 0, tied: bool = False, twice: bool = False) -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], axis=axis, name="look_up")]
    outputs, arrays = {"y": None}, {"table": table(width)}
    if tied:
        nodes += [
            helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["y", "turned"], ["z"]),
        ]
        outputs["z"] = None
    if twice:
        nodes.append(helper.make_node("Gather", ["table", "zero"], ["first"]))
        outputs["first"], arrays["zero"] = None, np.array([0])
    return onnx_model(nodes, {"ids": (TensorProto.INT64, ["batch", "length"])}, outputs, arrays)


IDS = np.array([[0, 3, ROWS - 1], [7, 7, 1]])


@pytest.mark.parametrize(
    ("bits", "width", "largest", "block"),
    [
        *((bits, *case) for bits in (8, 4) for case in ((16, None, 16), (96, None, 32), (48, None, 16))),
        *((8, 256, None, 128), (4, 256, None, 32)),
        *((8, 64, largest, largest) for largest in (16, 32, 64)),
    ],
)
def test_quantized_lookup_returns_dequantized_rows(bits: int, width: int, largest: int | None, block: int):
    model = lookup(width)
    assert quantize_embeddings(model, bits, largest) == ["table"]
    expected = quantize_blocks(table(width), bits, block).dequantize()[IDS]
    assert (run(model, ids=IDS) == expected).all()
    assert "table" not in {tensor.name for tensor in model.graph.initializer}
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert stored < table(width).nbytes * (0.6 if bits == 8 else 0.5)


def test_two_lookups_share_one_quantized_table():
    model = lookup(32, twice=True)
    assert quantize_embeddings(model, 8) == ["table"]
    assert Counter(node.op_type for node in model.graph.node) == {"GatherBlockQuantized": 2}
    assert len(model.graph.initializer) == 4


@pytest.mark.parametrize(
    "model",
    [lookup(20), lookup(8), lookup(24), lookup(32, axis=1), lookup(32, tied=True)],
    ids=["width 20", "width 8", "width 24", "along columns", "also a product"],
)
def test_tables_that_cannot_be_quantized_are_left_alone(model: onnx.ModelProto):
    original = model.SerializeToString()
    assert quantize_embeddings(model, 8) == [] and model.SerializeToString() == original


def rows_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_linear_layers_have_int8_weights(per_channel: bool, reduce_range: bool):
    encoder = exported()
    quantized = quantize_products(encoder.graph(), per_channel, reduce_range)
    operators = Counter(node.op_type for node in quantized.graph.node)
    # Four matrices a layer: packed attention, its output, two of the feed-forward; then the pooler and the head.
    assert operators["QAttention"] == tiny.LAYERS and operators["MatMulInteger"] == 3 * tiny.LAYERS + 2
    assert not operators["MatMul"] and not operators["Gemm"] and not operators["Attention"]
    arrays = rows_of(quantized)
    weights = {name: array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim == 2}
    assert len(weights) == 4 * tiny.LAYERS + 2
    largest = max(abs(array.astype(int)).max() for array in weights.values())
    assert largest in ((63, 64) if reduce_range else (127, 128))
    for name, array in weights.items():
        scale = arrays[name.replace("_quantized", "_scale")]
        assert scale.shape == ((array.shape[1],) if per_channel else ())
    floats = [array.size for array in arrays.values() if array.dtype == np.float32 and array.ndim == 2]
    assert sorted(floats) == sorted([tiny.POSITIONS * tiny.WIDTH, encoder.model.module.config.vocab_size * tiny.WIDTH])


def test_dequantized_weights_are_within_half_a_step():
    encoder = exported()
    original, after = rows_of(encoder.graph()), rows_of(quantize_products(encoder.graph(), True, False))
    names = [name for name in original if f"{name}_quantized" in after and original[name].ndim == 2]
    assert len(names) >= 4 * tiny.LAYERS
    for name in names:
        scales = after[f"{name}_scale"]
        error = np.abs(after[f"{name}_quantized"] * scales - original[name])
        assert (error <= scales / 2 * 1.001).all() and error.max() > 0


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.full_range
def test_logits_stay_close_to_float(bits: int):
    encoder = exported()
    graph = encoder.graph()
    quantized = quantize_products(graph, True, False)
    if bits < 32:
        assert len(quantize_embeddings(quantized, bits)) == 2
    inputs = batch(8, 17, encoder.model.module.config.vocab_size, encoder.model.processor.pad_token_id)
    difference = np.abs(run(quantized, **inputs) - run(graph, **inputs))
    spread = run(graph, **inputs).std(axis=0).min()
    assert 0 < difference.max() < {32: 0.3, 8: 0.3, 4: 1.5}[bits] * spread
    assert quantized.ByteSize() < graph.ByteSize() * {32: 0.65, 8: 0.45, 4: 0.4}[bits]


def test_bias_before_gelu_is_fused_into_the_integer_product(tmp_path: Path):
    """ONNX Runtime's quantizer leaves a BiasGelu; moving the bias into the product must not change any output bit."""
    encoder = exported()
    graph = encoder.graph()
    assert sum(node.op_type == "BiasGelu" for node in graph.graph.node) == 2
    quantized = quantize_products(graph, True, False)
    optimized = tmp_path / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(optimized).graph.node
    producers = {output: node for node in nodes for output in node.output}
    products = [producers[node.input[0]] for node in nodes if node.op_type == "Gelu"]
    assert [node.op_type for node in products] == ["DynamicQuantizeMatMul"] * 2
    assert ["dense.bias" in node.input[4] for node in products] == [True] * 2
    inputs = batch(8, 17, encoder.model.module.config.vocab_size, encoder.model.processor.pad_token_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_give_biases_to_products", lambda graph: None)
        left = quantize_products(graph, True, False)
    assert left.SerializeToString() != quantized.SerializeToString()
    assert (run(left, **inputs) == run(quantized, **inputs)).all()


def test_quantization_is_reproducible_and_keeps_its_input():
    graph = exported().graph()
    original, quantized = graph.SerializeToString(), [quantize_products(graph, True, False) for _ in range(2)]
    for copy in quantized:
        quantize_embeddings(copy, 4)
    assert quantized[0].SerializeToString() == quantized[1].SerializeToString()
    assert graph.SerializeToString() == original


WORD_ROWS, WORD_WIDTH = 12, 5
TABLE = (np.random.default_rng(0).standard_normal((WORD_ROWS, WORD_WIDTH)) * [1, 10, 100, 0, 0.01]).astype(np.float32)
WORDS = np.random.default_rng(1).standard_normal((2, 7, WORD_WIDTH)).astype(np.float32)


def positions(
    counted: np.ndarray | None = None, start: int = 0, step: int = 1, reader: str = "Add", ids_too: bool = False
) -> onnx.ModelProto:
    """Return a graph that adds rows 0, 1, 2, ... of a table to ``words`` [batch, length, width], like an encoder."""
    counted = np.arange(WORD_ROWS)[None] if counted is None else counted
    nodes = [
        helper.make_node("Shape", ["words"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["counted", "start", "length", "axis", "step"], ["ids"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node(reader, ["words", "rows"], ["sum"]),
    ]
    outputs: dict[str, Any] = {"sum": ["batch", "rows", WORD_WIDTH]}
    if ids_too:
        outputs["ids"] = (TensorProto.INT64, [1, "rows"])
        nodes.append(helper.make_node("Identity", ["ids"], ["kept"]))
    arrays = {"table": TABLE, "counted": counted, "start": [start], "axis": [counted.ndim - 1], "step": [step]}
    model = onnx_model(nodes, {"words": ["batch", "length", WORD_WIDTH]}, outputs, arrays)
    axes = [*[1] * (counted.ndim - 1), "rows", WORD_WIDTH]
    model.graph.value_info.append(helper.make_tensor_value_info("rows", TensorProto.FLOAT, axes))
    return model


def run_words(model: onnx.ModelProto) -> Any:
    onnx.checker.check_model(model, full_check=True)
    return run(model, words=WORDS)


@pytest.mark.parametrize("counted", [np.arange(WORD_ROWS)[None], np.arange(WORD_ROWS)], ids=["a row", "flat"])
def test_position_rows_are_within_half_a_step_per_column(counted: np.ndarray) -> None:
    model = positions(counted)
    expected = run_words(model)
    assert quantize_rows_in_order(model) == ["table"]
    assert Counter(node.op_type for node in model.graph.node) == dict.fromkeys(
        ("Shape", "Slice", "DequantizeLinear", "Add"), 1
    )
    error = np.abs(run_words(model) - expected)
    step = np.abs(TABLE).max(axis=0) / 127
    assert (error <= step * 0.501 + 1e-5).all() and (error.max(axis=(0, 1))[:3] > step[:3] / 4).all()
    stored = rows_of(model)
    assert not model.graph.value_info, "a shape that was recorded no longer holds"
    assert stored["table_quantized"].dtype == np.int8 and "counted" not in stored and "table" not in stored


@pytest.mark.parametrize(
    "model",
    [
        positions(start=1),
        positions(step=2),
        positions(np.arange(WORD_ROWS)[None, ::-1]),
        positions(reader="Mul"),
        positions(ids_too=True),
    ],
    ids=["not from 0", "every other", "backwards", "not added", "ids are read too"],
)
def test_other_lookups_are_unchanged(model: onnx.ModelProto) -> None:
    original = model.SerializeToString()
    assert quantize_rows_in_order(model) == [] and model.SerializeToString() == original


@pytest.mark.parametrize("in_pieces", [True, False])
@pytest.mark.full_range
def test_int8_lstm_matches_torch_and_is_smaller(in_pieces: bool) -> None:
    graph, module = recurrent(in_pieces)
    quantized, count = quantize_recurrent(graph, per_channel=True, reduce_range=False)
    assert count == 1 and quantized.ByteSize() < 0.45 * graph.ByteSize()
    sound = np.random.default_rng(0).normal(size=(12, 1, WIDTH)).astype(np.float32)
    (actual,) = open_session(quantized).run(None, {"x": sound})
    expected = np.asarray(module(torch.from_numpy(sound))[0].detach())[:, None]
    error = np.sqrt(np.square(actual - expected).mean()) / expected.std()
    assert 0 < error < 0.02


def test_graph_without_lstm_is_unchanged() -> None:
    graph = foreign_graphs.embedding()
    assert quantize_recurrent(graph, per_channel=True, reduce_range=False) == (graph, 0)


@pytest.mark.full_range
def test_operators_of_an_undeclared_operator_set_are_supported() -> None:
    graph, _ = recurrent(in_pieces=False)
    graph.graph.node.append(helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft"))
    graph.graph.output[0].name = "z"
    assert all(entry.domain != "com.microsoft" for entry in graph.opset_import)
    quantized, count = quantize_recurrent(graph, per_channel=True, reduce_range=False)
    sound = np.random.default_rng(0).normal(size=(12, 1, WIDTH)).astype(np.float32)
    (expected,), (actual,) = (open_session(opened).run(None, {"x": sound}) for opened in (graph, quantized))
    assert count == 1 and np.sqrt(np.square(actual - expected).mean()) < 0.02 * expected.std()


def network() -> onnx.ModelProto:
    """Return a 3x3, a depthwise and a pointwise convolution; the first has filters that sum to zero."""
    generator = np.random.default_rng(0)
    edges = generator.normal(size=(8, 3, 3, 3))
    edges -= edges.mean(axis=(1, 2, 3), keepdims=True)
    weights = {
        "a": (8 * edges).astype(np.float32),
        "b": generator.normal(size=(8, 1, 3, 3)).astype(np.float32),
        "c": generator.normal(size=(16, 8, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], "first", strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("Conv", ["p", "b"], ["q"], "each", group=8, pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Conv", ["q", "c"], ["y"], "points", kernel_shape=[1, 1]),
    ]
    return onnx_model(nodes, {"x": ["batch", 3, 16, 16]}, {"y": ["batch", 16, 7, 7]}, weights, opset=17)


def smooth_images(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Return images whose neighbouring pixels are similar."""
    generator = np.random.default_rng(seed)
    coarse = np.ones((1, 1, 3, 16, 16)) * generator.uniform(-1, 1, (count, 1, 1, 1, 1))
    return [{"x": (image + generator.normal(0, 0.02, image.shape)).astype(np.float32)} for image in coarse]


def run_layer(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([run(model, **feed) for feed in feeds])


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.full_range
def test_feedback_rounding_reduces_error_and_changes_only_weights(reduce_range: bool) -> None:
    graph, feeds = network(), smooth_images(32, 1)
    settings = Int8Options(method="static", reduce_range=reduce_range, bias_correction=False)
    graphs = {}
    for rounding in ("nearest", "feedback"):
        options = settings.model_copy(update={"weight_rounding": rounding})
        graphs[rounding] = StaticQuantizer(graph, feeds, options).quantize()
    others = smooth_images(16, 2)
    exact = run_layer(graph, others)
    error = {name: float(np.square(run_layer(model, others) - exact).mean()) for name, model in graphs.items()}
    assert error["feedback"] < 0.7 * error["nearest"]
    parts = {name: rows_of(model) for name, model in graphs.items()}
    changed = [name for name, array in parts["nearest"].items() if not np.array_equal(array, parts["feedback"][name])]
    assert changed and all(name.endswith("_quantized") for name in changed)
    for name in changed:
        assert np.abs(parts["feedback"][name].astype(int)).max() <= (64 if reduce_range else 127)
