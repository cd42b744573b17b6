"""Tests of graph rewrites: they match only their patterns, and rewritten graphs compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from exports import batch, exported, run
from onnx import TensorProto, helper
from onnx_graphs import onnx_model

from compress.formats.onnx.embedding_graphs import add_sentence_embedding
from compress.formats.onnx.fusions import (
    REWRITES,
    fold_constant_embeddings,
    optimize_graph,
    pool_globally,
    select_first_token_early,
    split_skip_normalization,
    unfold_batch_transposes,
)
from compress.formats.onnx.int8.observers import open_session
from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.utils.errors import StageError

ENCODER_REWRITES = [name for name in REWRITES if name != "average_pool"]
ARCHITECTURES = ["bert", "distilbert", "roberta", pytest.param("electra", marks=pytest.mark.slow)]


def operators(model: ir.Model | onnx.ModelProto) -> Counter[str]:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return Counter(node.op_type for node in proto.graph.node)


def inputs_for(architecture: str, size: int = 4, length: int = 13) -> dict[str, np.ndarray]:
    encoder = exported(architecture)
    return batch(size, length, encoder.model.module.config.vocab_size, encoder.model.processor.pad_token_id)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_encoder_is_fully_rewritten(architecture: str):
    encoder = exported(architecture)
    after = operators(encoder.graph())
    assert encoder.rewrites["attention"] == after["Attention"] == tiny.LAYERS
    assert after["Softmax"] == after["SkipLayerNormalization"] == 0
    # One normalisation of the embeddings and two a layer.
    assert after["LayerNormalization"] == 1 + 2 * tiny.LAYERS
    assert encoder.rewrites["first_token"] >= 6
    # BERT and ELECTRA look up token type 0 for every token; DistilBERT has no types, RoBERTa's exporter no pattern.
    assert encoder.rewrites["constant_embeddings"] == (1 if architecture in ("bert", "electra") else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ENCODER_REWRITES)
def test_each_rewrite_alone_is_exact(architecture: str, name: str):
    encoder, inputs = exported(architecture), inputs_for(architecture)
    model = encoder.unfused()
    expected = run(encoder.unfused(), **inputs)
    count = REWRITES[name](model)
    assert count > 0 or (name == "constant_embeddings" and architecture in ("distilbert", "roberta"))
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_allclose(run(model, **inputs), expected, atol=5e-6)
    assert REWRITES[name](model) == 0


@pytest.mark.parametrize("left_out", ENCODER_REWRITES)
def test_rewrites_work_without_each_other(left_out: str):
    model, inputs = exported().unfused(), inputs_for("bert")
    expected = run(exported().unfused(), **inputs)
    counts = optimize_graph(model, {left_out})
    # Encoders have no images to pool.
    assert counts.pop("average_pool") == 0
    assert set(counts) == set(ENCODER_REWRITES) - {left_out} and all(counts.values())
    np.testing.assert_allclose(run(model, **inputs), expected, atol=5e-6)


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def graph_of(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], weights: dict[str, Any]) -> ir.Model:
    return ir.from_proto(onnx_model(nodes, inputs, outputs, weights, domains=["com.microsoft"]))


HIDDEN = {"x": (TensorProto.FLOAT, ["batch", "length", 4])}
CHOSEN = {"y": (TensorProto.FLOAT, None)}


def chooser(weights: dict[str, Any] | None = None, axis: int = 1, outputs: dict[str, Any] | None = None) -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["biased"]),
        helper.make_node("Relu", ["biased"], ["active"]),
        helper.make_node("Sum", ["active", "x"], ["both"]),
        helper.make_node("Gather", ["both", "index"], ["chosen"], axis=axis),
        helper.make_node("MatMul", ["chosen", "head"], ["y"]),
    ]
    arrays = {"w": whole(4, 4), "b": whole(4, seed=1), "head": whole(4, 2, seed=2), "index": np.array(0, np.int64)}
    return graph_of(nodes, HIDDEN, outputs or CHOSEN, arrays | (weights or {}))


@pytest.mark.parametrize("index", [0, 2, -1])
def test_early_token_selection_is_exact(index: int):
    model = chooser({"index": np.array(index, np.int64)})
    x = whole(3, 5, 4, seed=5)
    expected = run(model, x=x)
    weights = [whole(4, 4), whole(4, seed=1), whole(4, 2, seed=2)]
    by_hand = (np.maximum(x[:, index] @ weights[0] + weights[1], 0) + x[:, index]) @ weights[2]
    assert (expected == by_hand).all()
    assert select_first_token_early(model) == 4
    assert (run(model, x=x) == by_hand).all()
    # One Gather serves both the product and the residual.
    order = [node.op_type for node in model.graph]
    assert order[0] == "Gather" and order.count("Gather") == 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: chooser(axis=0),
        lambda: chooser({"index": np.array([0], np.int64)}),
        lambda: chooser(outputs=CHOSEN | {"both": (TensorProto.FLOAT, None)}),
        lambda: chooser(outputs={"chosen": (TensorProto.FLOAT, None)}),
    ],
    ids=["another axis", "several tokens", "hidden states wanted too", "the choice wanted itself"],
)
def test_token_selection_stays_where_moving_would_change_output(model: Callable[[], ir.Model]):
    original, x = model(), whole(3, 5, 4, seed=5)
    after = model()
    assert select_first_token_early(after) == 0
    assert ir.to_proto(after).SerializeToString() == ir.to_proto(original).SerializeToString()
    assert (run(after, x=x) == run(original, x=x)).all()


def test_constant_with_length_axis_stops_early_selection():
    # The bias differs from token to token, so it must be added before the selection.
    model, x = chooser({"b": whole(5, 4, seed=3)}), whole(3, 5, 4, seed=5)
    expected = run(model, x=x)
    select_first_token_early(model)
    assert (run(model, x=x) == expected).all()


def embeddings(types: np.ndarray, **changes: Any) -> ir.Model:
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["word"]),
        helper.make_node("Gather", ["types", "type_ids"], ["type"]),
        helper.make_node("Gather", ["places", "positions"], ["place"]),
        helper.make_node("Add", ["word", "type"], ["inner"]),
        helper.make_node("Add", ["inner", "place"], ["y"]),
    ]
    arrays = {"words": whole(9, 4), "types": types, "places": whole(6, 4, seed=1)}
    arrays |= {"type_ids": np.zeros((1, 6), np.int64), "positions": np.arange(6)[None]} | changes
    return graph_of(nodes, {"ids": (TensorProto.INT64, ["batch", 6])}, CHOSEN, arrays)


@pytest.mark.parametrize("type_ids", [[0] * 6, [0, 0, 0, 1, 1, 1]])
def test_only_token_type_zero_is_folded_into_the_positions(type_ids: list[int]):
    ids, types, folded = np.random.default_rng(0).integers(0, 9, (2, 6)), whole(2, 4, seed=2), not any(type_ids)
    model = embeddings(types, type_ids=np.array([type_ids]))
    assert fold_constant_embeddings(model) == folded
    assert (operators(model)["Gather"], operators(model)["Add"]) == ((2, 1) if folded else (3, 2))
    expected = whole(9, 4)[ids] + types[type_ids] + whole(6, 4, seed=1)[None]
    assert (run(model, ids=ids) == expected).all()


def skip(bias: bool, outputs: list[str]) -> ir.Model:
    inputs = ["x", "residual", "gamma", "beta", *(["bias"] if bias else [])]
    node = helper.make_node("SkipLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=1e-3)
    nodes = [node, helper.make_node("Identity", [outputs[0]], ["y"])]
    if len(outputs) > 1:
        nodes.append(helper.make_node("Identity", [outputs[-1]], ["z"]))
    weights = {"gamma": whole(4), "beta": whole(4, seed=1), "bias": whole(4, seed=2)}
    used = {name: array for name, array in weights.items() if bias or name != "bias"}
    feed = HIDDEN | {"residual": HIDDEN["x"]}
    return graph_of(nodes, feed, CHOSEN | ({"z": (TensorProto.FLOAT, None)} if len(outputs) > 1 else {}), used)


@pytest.mark.parametrize("bias", [True, False])
def test_skip_layer_normalization_is_split(bias: bool):
    model, x, residual = skip(bias, ["out"]), whole(2, 3, 4, seed=5), whole(2, 3, 4, seed=6)
    assert split_skip_normalization(skip(bias, ["out", "", "", "sum"])) == 0, "its sum is read"
    assert split_skip_normalization(model) == 1
    assert operators(model)["SkipLayerNormalization"] == 0 and operators(model)["LayerNormalization"] == 1
    added = x + residual + (whole(4, seed=2) if bias else 0)
    scaled = (added - added.mean(-1, keepdims=True)) / np.sqrt(added.var(-1, keepdims=True) + 1e-3)
    expected = scaled * whole(4) + whole(4, seed=1)
    np.testing.assert_allclose(run(model, x=x, residual=residual), expected, rtol=1e-5, atol=1e-5)


def pooling(axes: list[int], shape: tuple[int, ...] = (2, 3, 4, 5), keepdims: int = 1, opset: int = 20) -> ir.Model:
    older = opset < 18
    node = helper.make_node(
        "ReduceMean", ["x"] if older else ["x", "axes"], ["y"], keepdims=keepdims, **({"axes": axes} if older else {})
    )
    weights = {} if older else {"axes": np.array(axes)}
    model = graph_of([node], {"x": (TensorProto.FLOAT, shape)}, CHOSEN, weights)
    model.opset_imports[""] = opset
    return model


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_mean_over_image_becomes_global_average_pool(axes: list[int], opset: int):
    model, x = pooling(axes, opset=opset), whole(2, 3, 4, 5)
    assert pool_globally(model) == 1 and operators(model) == {"GlobalAveragePool": 1}
    np.testing.assert_allclose(run(model, x=x), x.mean((2, 3), keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    "model",
    [pooling([1, 2]), pooling([3]), pooling([2, 3], keepdims=0), pooling([1, 2], shape=(3, 4, 5))],
    ids=["other axes", "one axis", "axes dropped", "no image"],
)
def test_other_means_are_unchanged(model: ir.Model):
    assert pool_globally(model) == 0 and operators(model) == {"ReduceMean": 1}


VALUES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def product(weight: np.ndarray, **attributes: object) -> onnx.ModelProto:
    """Return a FusedMatMul of x [3, 4, 5] with transposed batch axis and ``weight``."""
    node = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transBatchA=1, **attributes)
    return onnx_model([node], {"x": list(VALUES.shape)}, {"y": None}, {"w": weight}, 18, ["com.microsoft"])


def run_both(model: onnx.ModelProto) -> np.ndarray:
    return open_session(model).run(None, {"x": VALUES})[0]


@pytest.mark.parametrize(("attributes", "operator"), [({}, "MatMul"), ({"alpha": 2.0}, "FusedMatMul")])
def test_fused_matmul_with_2d_weights_is_unfolded(attributes: dict[str, float], operator: str) -> None:
    weight = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    model = product(weight, **attributes)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="same rank"):
        run_both(model)
    program = ir.from_proto(model)
    assert unfold_batch_transposes(program) == 1
    assert [node.op_type for node in program.graph] == ["Transpose", operator]
    expected = attributes.get("alpha", 1.0) * VALUES.transpose(1, 0, 2) @ weight
    np.testing.assert_allclose(run_both(ir.to_proto(program)), expected, rtol=1e-5)


def test_fused_matmul_supported_by_the_runtime_is_unchanged() -> None:
    weight = np.random.default_rng(1).normal(size=(4, 5, 2)).astype(np.float32)
    program = ir.from_proto(product(weight))
    assert unfold_batch_transposes(program) == 0
    np.testing.assert_allclose(run_both(ir.to_proto(program)), VALUES.transpose(1, 0, 2) @ weight, rtol=1e-5)


WIDTH = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.int64)
WEIGHT = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)


def identity() -> onnx.ModelProto:
    """Return a graph whose output is its input, the hidden states."""
    axes = ["batch_size", "sequence_length"]
    inputs = {"hidden": [*axes, 4], "attention_mask": (TensorProto.INT64, axes)}
    nodes = [helper.make_node("Identity", ["hidden"], ["last_hidden_state"])]
    return onnx_model(nodes, inputs, {"last_hidden_state": [*axes, 4]}, opset=17)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize(
    "steps",
    [(), (Normalize(),), (Dense(WEIGHT), Normalize()), (Dense(WEIGHT, np.array([0.5, -3], np.float32), "tanh"),)],
)
def test_sentence_embedding_matches_torch_modules(mode: str, steps: tuple) -> None:
    modules = SentenceModules(4, (mode,), steps)
    graph = identity()
    add_sentence_embedding(graph, modules)
    onnx.checker.check_model(graph)
    session = open_session(graph)
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert session.get_outputs()[1].shape == ["batch_size", modules.dimensions]
    hidden, embedding = session.run(None, {"hidden": WIDTH, "attention_mask": MASK})
    assert np.array_equal(hidden, WIDTH)
    expected = modules.embed(torch.from_numpy(WIDTH), torch.from_numpy(MASK)).numpy()
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modes", [("lasttoken",), ("cls", "mean")])
def test_unsupported_pooling_is_refused(modes: tuple[str, ...]) -> None:
    with pytest.raises(StageError, match=", ".join(modes)) as caught:
        add_sentence_embedding(identity(), SentenceModules(4, modes))
    assert "sentence_embedding: false" in str(caught.value)
