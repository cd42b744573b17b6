"""Tests of static INT8 graphs: outputs compared with numpy references, integer kernels, and refused input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
from exports import exported, kernels, run
from onnx import helper
from onnx_graphs import onnx_model

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_products
from compress.formats.onnx.int8.layer_matching import UNLIMITED, LayerMatch, grids, match_layers
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import NncfQuantizer, StaticQuantizer, run_nncf
from compress.inspection.integer_kernels import read_kernels
from compress.utils.errors import DataError, StageError

PLAIN = Int8Options(method="static", reduce_range=False, bias_correction=False)


def feeds(count: int = 24) -> list[dict[str, np.ndarray]]:
    examples = exported().examples
    return [examples.batch([index]) for index in range(count)]


def encoder(settings: Int8Options = PLAIN) -> StaticQuantizer:
    return StaticQuantizer(exported().graph(), feeds(), settings)


def error(graph: onnx.ModelProto) -> float:
    """Return the root mean square error of logits on 40 examples, relative to their standard deviation."""
    examples = exported().examples
    batch = examples.batch(list(range(24, 64)))
    expected = run(exported().graph(), **batch)
    return float(np.sqrt(np.square(run(graph, **batch) - expected).mean()) / expected.std())


def product(weight: np.ndarray, *, opset: int = 20, bias: np.ndarray | None = None) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if bias is None else "product"], name="layer")]
    arrays = {"w": weight}
    if bias is not None:
        nodes.append(helper.make_node("Add", ["product", "b"], ["y"], name="add"))
        arrays["b"] = bias
    return onnx_model(nodes, {"x": ["rows", weight.shape[0]]}, {"y": ["rows", weight.shape[1]]}, arrays, opset)


def matrices(seed: int = 0, rows: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs [rows, 64], weights [64, 96] and a bias [96]."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0.5, 1, (rows, 64)).astype(np.float32)
    return x, generator.normal(size=(64, 96)).astype(np.float32), generator.normal(size=96).astype(np.float32)


@pytest.mark.parametrize("layout", ["qoperator", "qdq"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.full_range
def test_quantized_matmul_matches_numpy(layout: str, per_channel: bool):
    x, weight, bias = matrices()
    settings = PLAIN.model_copy(update={"per_channel": per_channel, "format": layout})
    graph = StaticQuantizer(product(weight, bias=bias), [{"x": x}], settings).quantize()
    # By hand, as ONNX defines QuantizeLinear: 255 steps over the range with zero in it.
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255) - zero) * scale
    steps = np.abs(weight).max(axis=0 if per_channel else None, keepdims=True) / 127
    coarse = np.clip(np.rint(weight / steps), -127, 127) * steps
    np.testing.assert_allclose(run(graph, x=x), rounded @ coarse + bias, atol=2e-3)


@pytest.mark.full_range
def test_encoder_uses_integer_kernels_and_stays_close(tmp_path: Path):
    graph = encoder().quantize()
    kernel_names = kernels(graph, tmp_path)
    # Per layer packed attention, its output and the two of the feed-forward; then the pooler. The head is too small.
    assert kernel_names["QAttention"] == tiny.LAYERS
    weights = sum(
        constant(node.inputs[1]) is not None for node in ir.from_proto(graph).graph if "Integer" in node.op_type
    )
    assert kernel_names["MatMulIntegerToFloat"] == weights >= 2
    floats = ("DequantizeLinear", "Attention", "DynamicQuantizeLinear")
    assert not any(kernel_names[name] for name in floats)
    assert 0 < error(graph) < 0.2


def test_logits_do_not_depend_on_other_rows_of_the_batch():
    examples = exported().examples
    batch = examples.batch(list(range(12)))
    alone = np.concatenate(
        [run(encoder().quantize(), **{name: a[i : i + 1] for name, a in batch.items()}) for i in range(12)]
    )
    np.testing.assert_allclose(run(encoder().quantize(), **batch), alone, atol=1e-5)
    # Dynamic quantization computes ranges over the whole batch.
    dynamic = quantize_products(exported().graph(), True, False)
    alone = np.concatenate([run(dynamic, **{name: a[i : i + 1] for name, a in batch.items()}) for i in range(12)])
    assert np.abs(run(dynamic, **batch) - alone).max() > 1e-4


def test_float_layers_are_unchanged():
    quantizer = encoder()
    names = [layer.name for layer in quantizer.layers]
    batch = exported().examples.batch([0, 3, 5])
    whole = quantizer.quantize(float_layers=names)
    np.testing.assert_allclose(run(whole, **batch), run(exported().graph(), **batch), atol=1e-5)
    operators = Counter(node.op_type for node in whole.graph.node)
    assert operators["Attention"] == tiny.LAYERS and not operators["QuantizeLinear"]
    single = quantizer.quantize(float_layers=names[1:])
    assert sum("Integer" in node.op_type or node.op_type == "QAttention" for node in single.graph.node) == 1
    assert error(single) < error(quantizer.quantize())


def test_bias_correction_removes_the_mean_error():
    x, weight, bias = matrices(rows=400)
    x = np.abs(x) ** 3  # skewed, so that rounding errors do not average to zero
    model = product(weight, bias=bias)
    means = {}
    for corrected in (False, True):
        settings = Int8Options(method="static", reduce_range=False, per_channel=False, bias_correction=corrected)
        graph = StaticQuantizer(model, [{"x": part} for part in np.split(x, 4)], settings).quantize()
        means[corrected] = np.abs((run(graph, x=x) - run(model, x=x)).mean(axis=0)).max()
    assert means[True] < 0.02 * means[False]


def test_unsupported_graphs_and_calibration_data_are_refused():
    x, weight, _ = matrices()
    once = StaticQuantizer(product(weight), [{"x": x}], PLAIN).quantize()
    infinite = x.copy()
    infinite[3, 4] = np.inf
    for graph, data, words in (
        (product(weight, opset=12), [{"x": x}], "operator set 12"),
        (once, [{"x": x}], "quantized already"),
        (product(weight[:, :2]), [{"x": x}], "nothing to quantize"),
        (product(weight), [], "no calibration data"),
        (product(weight), [{"z": x}], "lacks the input 'x'"),
        (product(weight), [{"x": infinite}], "'x' holds NaN or infinite"),
    ):
        with pytest.raises((StageError, DataError), match=words):
            StaticQuantizer(graph, data, PLAIN)


@pytest.mark.full_range
def test_constant_activation_is_reported_and_computed():
    _, weight, bias = matrices()
    for value in (0.0, 3.0):
        x = np.full((4, 64), value, np.float32)
        quantizer = StaticQuantizer(product(weight, bias=bias), [{"x": x}], PLAIN)
        assert quantizer.constant == ["x"]
        np.testing.assert_allclose(run(quantizer.quantize(), x=x), x @ weight + bias, atol=0.5)


@pytest.mark.slow
@pytest.mark.full_range
def test_logits_match_nncf_and_every_product_is_integer(tmp_path: Path):
    quantizer = NncfQuantizer(exported().graph(), feeds(12))
    theirs, ours = run_nncf(quantizer.readable, feeds(12), transformer=True), quantizer.quantize()
    batch = exported().examples.batch(list(range(20, 40)))
    exact = run(exported().graph(), **batch)
    # NNCF rounds the tables too; ours are still float here.
    np.testing.assert_allclose(run(ours, **batch), run(theirs, **batch), atol=0.1 * exact.std())
    assert 0 < np.sqrt(np.square(run(ours, **batch) - exact).mean()) < 0.3 * exact.std()
    quantize_embeddings(ours, 8)
    for graph, complete in ((theirs, False), (ours, True)):
        onnx.save(graph, tmp_path / "model.onnx")
        assert all(kernel.integer for kernel in read_kernels(tmp_path / "model.onnx")) is complete
    operators = Counter(node.op_type for node in ours.graph.node)
    assert operators["QAttention"] == tiny.LAYERS and not operators["DequantizeLinear"]

    float_layer = quantizer.layers[0].name
    operators = Counter(node.op_type for node in quantizer.quantize(float_layers=[float_layer]).graph.node)
    assert operators["Attention"] == 1 and operators["QAttention"] == tiny.LAYERS - 1


def test_nncf_without_calibration_data_is_refused():
    with pytest.raises(DataError, match="no calibration data"):
        NncfQuantizer(exported().graph(), [])


GENERATOR = np.random.default_rng(0)
QUERY, KEY, OUT = (GENERATOR.normal(size=(6, 8)).astype(np.float32) for _ in range(3))


def graph(products: list[tuple[str, str, np.ndarray]]) -> ir.Model:
    """Return a graph of `MatMul` nodes, each given by its input name, output name and weights [inputs, outputs]."""
    nodes = [helper.make_node("MatMul", [x, f"w{i}"], [y], y) for i, (x, y, _) in enumerate(products)]
    stored = {f"w{i}": weight for i, (_, _, weight) in enumerate(products)}
    outputs = {gives: None for _, gives, _ in products}
    return ir.from_proto(onnx_model(nodes, {"x": None, "z": None}, outputs, stored, opset=21))


def test_packed_layers_are_matched_in_their_order() -> None:
    model = graph([("x", "packed", np.concatenate([KEY, QUERY]).T), ("x", "other", OUT.T)])
    places = match_layers(model, {"query": QUERY, "key": KEY, "out": OUT})
    assert [(match.node, match.layers, match.reads) for match in places] == [
        ("packed", ("key", "query"), "x"),
        ("other", ("out",), "x"),
    ]
    shared = grids(places).inputs
    assert shared["key"] == shared["query"] == shared["out"], "they read one value"


def test_duplicate_cut_or_scaled_layers_are_not_matched() -> None:
    model = graph([("x", "alike", QUERY.T), ("x", "cut", KEY[:4].T), ("x", "scaled", OUT.T * 2)])
    weights = {"query": QUERY, "twin": QUERY.copy(), "key": KEY, "out": OUT}
    assert match_layers(model, weights) == []


def test_layer_used_twice_has_one_quantization_grid() -> None:
    model = graph([("x", "once", QUERY.T), ("z", "twice", QUERY.T), ("z", "beside", KEY.T)])
    shared = grids(match_layers(model, {"query": QUERY, "key": KEY})).inputs
    assert shared["query"] == shared["key"]
    apart = graph([("x", "once", QUERY.T), ("z", "beside", KEY.T)])
    shared = grids(match_layers(apart, {"query": QUERY, "key": KEY})).inputs
    assert shared["query"] != shared["key"]


def test_layer_after_convolution_at_one_use_only_has_its_own_grid() -> None:
    places = [
        LayerMatch("a", ("a",), True, "x", None, (0.0, np.inf)),
        LayerMatch("b", ("b",), False, "a relu", "a"),
        LayerMatch("b again", ("b",), False, "z"),
        LayerMatch("c", ("c",), False, "a relu", "a"),
    ]
    shared = grids(places)
    assert shared.inputs["c"] == shared.outputs["a"]
    assert shared.inputs["b"] != shared.outputs["a"]
    assert shared.limits == {shared.outputs["a"]: (0.0, np.inf)}


def test_convolution_used_twice_is_limited_only_if_both_uses_are() -> None:
    places = [
        LayerMatch("a", ("a",), True, "x", None, (0.0, np.inf)),
        LayerMatch("b", ("a",), True, "y", None, UNLIMITED),
    ]
    assert set(grids(places).limits.values()) == {UNLIMITED}
