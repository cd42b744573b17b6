"""Tests of weight-only quantization: graphs compute with the dequantized weights, also in branches and tied tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model
from tiny_whisper import FRAMES, write_tiny_whisper

from compress.formats.onnx.decoder import export_encoder_decoder, teacher_forced_logits
from compress.formats.onnx.model import quantized_name, weight_only_name
from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
from compress.models.checkpoint import Checkpoint

ROWS, WIDTH = 80, 64


def weight(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tied_graph() -> onnx.ModelProto:
    """Return a graph with a lookup, a MatMul with one of two matrices (If) and a MatMul with the tied table."""
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = helper.make_node("MatMul", ["x", name[:4]], [f"{name}_out"])
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([node], name, [], [output])
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], axis=0),
        helper.make_node("If", ["which"], ["y"], **branches),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "turned"], ["logits"]),
    ]
    arrays = {"table": weight(0, ROWS, WIDTH), "then": weight(1, WIDTH, WIDTH), "else": weight(2, WIDTH, WIDTH)}
    inputs = {"ids": (TensorProto.INT64, ["batch", "length"]), "which": (TensorProto.BOOL, [1])}
    return onnx_model(nodes, inputs, {"logits": ["batch", "length", ROWS]}, arrays, opset=21)


def run(model: onnx.ModelProto, which: bool) -> np.ndarray:
    return exports.run(model, ids=np.array([[0, 7, ROWS - 1]]), which=np.array([which]))


def restored(matrix: np.ndarray, how: WeightOnlySettings) -> np.ndarray:
    """Return ``matrix`` [rows, columns] quantized and dequantized with numpy."""
    stored = how.of(matrix, "matrix")
    zeros = stored.zero_points if stored.zero_points is not None else np.full(stored.scales.shape, 1 << (how.bits - 1))
    blocks = stored.values.reshape(len(matrix), -1, stored.block_size).astype(np.float32)
    values = (blocks - zeros[..., None].astype(np.float32)) * stored.scales[..., None].astype(np.float32)
    return values.reshape(len(matrix), -1)[:, : matrix.shape[1]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("which", [True, False])
@pytest.mark.parametrize("expand_on_load", [True, False])
def test_graph_computes_with_dequantized_weights(bits: int, symmetric: bool, which: bool, expand_on_load: bool):
    how = WeightOnlySettings(bits, 32, symmetric, accuracy_level=1, expand_on_load=expand_on_load)
    model, names = quantize_matrices(tied_graph(), how)
    assert sorted(names) == ["else", "table", "then"]
    table = restored(weight(0, ROWS, WIDTH), how)
    chosen = restored(weight(1 if which else 2, WIDTH, WIDTH).T, how).T
    expected = table[[0, 7, ROWS - 1]] @ chosen @ table.T
    assert np.abs(run(model, which)[0] - expected).max() < 1e-3 * np.abs(expected).max()


def test_tied_table_is_stored_once_and_all_is_quantized():
    model, _ = quantize_matrices(tied_graph(), WeightOnlySettings(4, 32))
    large = [tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) >= 1024]
    assert sorted(large) == ["else_Q4", "table_Q4", "then_Q4"]
    assert {node.op_type for node in model.graph.node} >= {"GatherBlockQuantized", "MatMulNBits"}
    assert "Transpose" not in {node.op_type for node in model.graph.node}


def attention_graph(packed: np.ndarray) -> onnx.ModelProto:
    """Return a fused attention of four heads with packed projections [WIDTH, 3 * WIDTH], a mask and a residual."""
    input_names = ["x", "packed", "bias", "mask"]
    nodes = [
        helper.make_node("Attention", input_names, ["attended"], "attention", domain="com.microsoft", num_heads=4),
        helper.make_node("Add", ["attended", "x"], ["y"]),
    ]
    hidden = ["batch", "length", WIDTH]
    inputs = {"x": hidden, "mask": (TensorProto.INT32, hidden[:2])}
    stored = {"packed": packed, "bias": weight(6, 3 * WIDTH)}
    return onnx_model(nodes, inputs, {"y": hidden}, stored, domains=["com.microsoft"])


@pytest.mark.parametrize(("expand_on_load", "kinds"), [(False, {"MatMulNBits"}), (True, {"Attention"})])
def test_fused_attention_computes_with_dequantized_weights(expand_on_load: bool, kinds: set[str]):
    how = WeightOnlySettings(4, 32, accuracy_level=1, expand_on_load=expand_on_load)
    packed = weight(5, WIDTH, 3 * WIDTH) / 8
    model, names = quantize_matrices(attention_graph(packed), how)
    assert len(names) == 1 and kinds == {node.op_type for node in model.graph.node} & {"Attention", "MatMulNBits"}
    assert not [item for item in model.graph.initializer if item.data_type == TensorProto.FLOAT and item.dims[1:]]
    feed = {"x": weight(7, 2, 5, WIDTH), "mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)}
    actual = exports.run(model, **feed)
    expected = exports.run(attention_graph(restored(packed.T, how).T), **feed)
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected).max()


def test_expanded_weights_are_4_bit_on_disk_and_float_in_memory(tmp_path: Path):
    model, _ = quantize_matrices(tied_graph(), WeightOnlySettings(4, 32, expand_on_load=True))
    large = {tensor.name: tensor for tensor in model.graph.initializer if np.prod(tensor.dims) >= 1024}
    assert sorted(large) == ["else_Q4", "table_Q4", "then_Q4"]
    assert {len(tensor.raw_data) for tensor in large.values()} == {WIDTH * WIDTH // 2, ROWS * WIDTH // 2}
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx").graph
    (branch,) = (node for node in opened.node if node.op_type == "If")
    everywhere = [node for inner in branch.attribute for node in inner.g.node] + list(opened.node)
    assert "Cast" not in {node.op_type for node in everywhere}
    assert TensorProto.INT4 not in {tensor.data_type for tensor in opened.initializer}


def test_only_tied_quantizes_only_the_tied_table():
    model, names = quantize_matrices(tied_graph(), WeightOnlySettings(8, 32), only_tied=True)
    assert names == ["table"]
    assert {"then", "else"} <= {tensor.name for tensor in model.graph.initializer}


def test_only_floats_exact_in_float16_are_stored_as_float16():
    exact = weight(3, 40, 32).astype(np.float16).astype(np.float32)
    graph = tied_graph()
    for name, array in (("exact", exact), ("inexact", exact + np.float32(1e-5))):
        graph.graph.initializer.append(numpy_helper.from_array(array, name))
        graph.graph.node.append(helper.make_node("ReduceMean", [name], [f"{name}_mean"], keepdims=0))
        graph.graph.output.append(helper.make_tensor_value_info(f"{name}_mean", TensorProto.FLOAT, []))
    model, _ = quantize_matrices(graph, WeightOnlySettings(4, 32))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["exact_float16"] == TensorProto.FLOAT16
    assert "exact" not in types
    assert types["inexact"] == TensorProto.FLOAT
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = session.run(["exact_mean"], {"ids": np.array([[0]]), "which": np.array([True])})[0]
    assert actual == pytest.approx(exact.mean(), abs=1e-6)


def test_quantized_speech_model_stays_close_to_float(tmp_path: Path):
    model = export_encoder_decoder(Checkpoint(write_tiny_whisper(tmp_path)))
    features = np.random.default_rng(0).normal(size=(8, FRAMES)).astype(np.float32)
    tokens = np.array([256, 5, 99, 17])
    expected = teacher_forced_logits(model, {"input_features": features}, tokens)
    for bits, bound in ((8, 0.05), (4, 0.5)):
        how = WeightOnlySettings(bits, 32)
        graphs = {name: quantize_matrices(graph, how)[0] for name, graph in model.graphs.items()}
        actual = teacher_forced_logits(model.with_graphs(graphs), {"input_features": features}, tokens)
        error = np.abs(actual - expected).std() / expected.std()
        assert error < bound, (bits, error)
        same = []
        for settings in (replace(how, accuracy_level=1), replace(how, accuracy_level=1, expand_on_load=True)):
            graphs = {name: quantize_matrices(graph, settings)[0] for name, graph in model.graphs.items()}
            same.append(teacher_forced_logits(model.with_graphs(graphs), {"input_features": features}, tokens))
        np.testing.assert_allclose(same[1], same[0], atol=1e-4 * np.abs(same[0]).max())


def test_file_names_follow_transformers_js():
    assert quantized_name("encoder_model.onnx") == "encoder_model_quantized.onnx"
    assert quantized_name("encoder_model_q4.onnx") == "encoder_model_quantized.onnx"
    assert weight_only_name("decoder_model_merged.onnx", 4) == "decoder_model_merged_q4.onnx"
    assert weight_only_name("decoder_model_merged_quantized.onnx", 8) == "decoder_model_merged_quantized.onnx"
