"""Tests of static INT8 quantization of convolutional networks: kernels, and outputs compared with references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exports import kernels
from onnx import helper
from onnx_graphs import onnx_model

from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.qdq_cleanup import split_concatenations
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.utils.errors import DataError

PLAIN = Int8Options(method="static", reduce_range=False, bias_correction=False)
CHANNELS, SIZE, CLASSES = 16, 12, 40


def weight(seed: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def network(activation: str = "Relu") -> onnx.ModelProto:
    """Return a MobileNet-like graph: convolution, depthwise convolution with residual, pooling and a linear layer."""
    arrays = {
        **{"w0": weight(0, CHANNELS, 3, 3, 3), "b0": weight(1, CHANNELS, 1)[:, 0]},
        **{"w1": weight(2, CHANNELS, 1, 3, 3), "b1": weight(3, CHANNELS, 1)[:, 0]},
        **{"w2": weight(4, CHANNELS, CHANNELS, 1, 1), "b2": weight(5, CHANNELS, 1)[:, 0]},
        **{"w3": weight(6, CLASSES, CHANNELS * 2), "b3": weight(7, CLASSES, 1)[:, 0]},
        **{"low": np.float32(0), "high": np.float32(6)},
    }
    limits = ["low", "high"] if activation == "Clip" else []
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node(activation, ["c0", *limits], ["a0"], name="act0"),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="depthwise", pads=[1, 1, 1, 1], group=CHANNELS),
        helper.make_node(activation, ["c1", *limits], ["a1"], name="act1"),
        helper.make_node("Conv", ["a1", "w2", "b2"], ["c2"], name="pointwise"),
        helper.make_node("Add", ["c2", "a0"], ["sum"], name="residual"),
        helper.make_node("Concat", ["sum", "c2"], ["both"], name="both", axis=1),
        helper.make_node("GlobalAveragePool", ["both"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["y"], name="classifier", transB=1),
    ]
    return onnx_model(nodes, {"x": ["batch", 3, SIZE, SIZE]}, {"y": ["batch", CLASSES]}, arrays)


def images(count: int = 8, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(count)]


def run(graph: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    session = open_session(graph)
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def error(graph: onnx.ModelProto, whole: onnx.ModelProto) -> float:
    fresh = images(seed=9)
    expected = run(whole, fresh)
    return float(np.square(run(graph, fresh) - expected).mean() / np.square(expected - expected.mean(0)).mean())


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.full_range
def test_convolutional_network_uses_integer_kernels_throughout(activation: str, tmp_path: Path):
    whole = network(activation)
    graph = StaticQuantizer(whole, images(), PLAIN).quantize()
    kernel_names = kernels(graph, tmp_path)
    counts = {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QLinearConcat": 1}
    counts |= {"MatMulIntegerToFloat": 1, "QuantizeLinear": 1}
    counts |= dict.fromkeys(("Conv", "FusedConv", "Gemm", "DequantizeLinear"), 0)
    assert {name: kernel_names[name] for name in counts} == counts
    # Random pooled features hardly differ between images, so the relative error of rounding is large.
    assert 0 < error(graph, whole) < 0.15


def test_single_quantized_convolution_keeps_neighbours_float(tmp_path: Path):
    quantizer = StaticQuantizer(network(), images(), PLAIN)
    kernel_names = kernels(quantizer.quantize(float_layers=("depthwise", "pointwise", "classifier")), tmp_path)
    names = ("QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool")
    assert [kernel_names[name] for name in names] == [1, 0, 0]
    assert kernel_names["Conv"] + kernel_names["FusedConv"] == 2


@pytest.mark.full_range(own_kernels=True)
def test_float_layer_between_integer_layers_is_not_rounded(tmp_path: Path):
    graph = StaticQuantizer(network(), images(2), PLAIN).quantize(float_layers=("depthwise",))
    kernel_names = kernels(graph, tmp_path)
    assert kernel_names["QLinearConv"] == 2 and kernel_names["Conv"] + kernel_names["FusedConv"] == 1
    # Without optimization the outputs are equal; ONNX Runtime's optimizer would round such weights per tensor.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    plain = session.run(None, images(1)[0])[0]
    assert np.abs(run(graph, images(1)) - plain).max() < 0.02 * plain.std()


def test_operators_without_integer_kernel_stay_float(tmp_path: Path):
    arrays = {"a": weight(0, 16, 3, 3, 3), "b": weight(1, 16, 16, 3, 3), "c": weight(2, 8, 16, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], name="first"),
        helper.make_node("ConvTranspose", ["p", "b"], ["q"], name="larger"),
        helper.make_node("Conv", ["q", "c"], ["y"], name="last"),
    ]
    axes = ["batch", None, None, None]
    whole = onnx_model(nodes, {"x": axes}, {"y": axes}, arrays)
    quantizer = StaticQuantizer(whole, images(2), PLAIN)
    assert [layer.name for layer in quantizer.layers] == ["first", "last"]
    quantized = quantizer.quantize()
    kernel_names = kernels(quantized, tmp_path)
    assert kernel_names["QLinearConv"] == 2 and kernel_names["ConvTranspose"] == 1
    # Its weights are not dequantized in each call: what it is given is, and the last output. Nor are they rounded.
    assert kernel_names["DequantizeLinear"] == 2
    with pytest.raises(DataError, match=r"refuses the calibration data \(x float32 \[2, 4, 5, 5\]\)"):
        StaticQuantizer(whole, [{"x": np.zeros((2, 4, 5, 5), np.float32)}], PLAIN)


@pytest.mark.full_range
def test_quantized_convolution_matches_numpy():
    x, kernel = images(1)[0]["x"], weight(0, CHANNELS, 3, 3, 3)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="only")
    model = onnx_model([node], {"x": None}, {"y": None}, {"w": kernel})
    actual = run(StaticQuantizer(model, [{"x": x}], PLAIN).quantize(), [{"x": x}])
    scale = (x.max() - x.min()) / 255
    zero = np.rint(-x.min() / scale)
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    steps = np.abs(kernel).max(axis=(1, 2, 3), keepdims=True) / 127
    coarse = np.rint(kernel / steps) * steps
    windows = np.lib.stride_tricks.sliding_window_view(rounded, (3, 3), axis=(2, 3))
    exact = np.einsum("bchwij,ocij->bohw", windows, coarse)
    # The output is rounded to 255 steps as well.
    step = (exact.max() - exact.min()) / 255
    assert np.abs(actual - exact).max() < 0.75 * step


def test_bias_correction_reduces_mean_error_of_convolutions():
    whole = network()
    shifts = {}
    for corrected in (False, True):
        settings = Int8Options(method="static", reduce_range=False, per_channel=False, bias_correction=corrected)
        graph = StaticQuantizer(whole, images(32), settings).quantize(float_layers=("first", "pointwise", "classifier"))
        shifts[corrected] = np.abs((run(graph, images(32)) - run(whole, images(32))).mean(axis=0)).mean()
    assert shifts[True] < 0.7 * shifts[False]


@pytest.mark.full_range
def test_relu_after_residual_is_kept_before_float_consumer():
    # ONNX Runtime's quantizer removes the Relu, since the integers begin at zero; the float pooling needs it.
    whole = network()
    del whole.graph.node[6:]
    assert whole.graph.node[-1].name == "residual"
    steps = (("Relu", "sum", "positive"), ("GlobalAveragePool", "positive", "pooled"), ("Flatten", "pooled", "y"))
    whole.graph.node.extend(helper.make_node(kind, [source], [target], name=kind) for kind, source, target in steps)
    assert error(StaticQuantizer(whole, images(), PLAIN).quantize(), whole) < 0.05


WIDE, NARROW = 100.0, 1.0
JOINED_CHANNELS = (16, 24)
SIZES = np.random.default_rng(7)
WEIGHT = SIZES.standard_normal((8, sum(JOINED_CHANNELS), 1, 1)).astype(np.float32)
WEIGHT[:, : JOINED_CHANNELS[0]] *= NARROW / WIDE
BIAS = SIZES.standard_normal(8).astype(np.float32)


def skip_graph(weight: np.ndarray = WEIGHT, groups: int = 1, axis: int = 1, **attributes: object) -> onnx.ModelProto:
    """Return a U-Net skip connection: a concatenation that a convolution and an average pooling read."""
    nodes = [
        helper.make_node("Concat", ["below", "kept"], ["joined"], name="concat", axis=axis),
        helper.make_node("Conv", ["joined", "weight", "bias"], ["out"], name="shortcut", group=groups, **attributes),
        helper.make_node("GlobalAveragePool", ["joined"], ["mean"], name="mean"),
    ]
    ends = (dict.fromkeys(names, [None] * 4) for names in (("below", "kept"), ("out", "mean")))
    return onnx_model(nodes, *ends, {"weight": weight, "bias": BIAS})


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    """Return uniform inputs, of which one part has a hundred times the range of the other."""
    drawn = np.random.default_rng(1)
    parts = (("below", WIDE, JOINED_CHANNELS[0]), ("kept", NARROW, JOINED_CHANNELS[1]))
    return [{key: drawn.uniform(-r, r, (2, n, 12, 12)).astype(np.float32) for key, r, n in parts} for _ in range(count)]


def run_joined(graph: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def exact(feed: dict[str, np.ndarray], weight: np.ndarray = WEIGHT, **options: int) -> np.ndarray:
    """Return torch's convolution of the concatenation in float64."""
    joined = torch.cat([torch.from_numpy(feed[name]).double() for name in ("below", "kept")], dim=1)
    result = torch.nn.functional.conv2d(
        joined, torch.from_numpy(weight).double(), torch.from_numpy(BIAS).double(), **options
    )
    return np.asarray(result.numpy())


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 2, 1)])
def test_sum_of_split_convolutions_equals_the_convolution(size: int, stride: int, padding: int) -> None:
    weight = SIZES.standard_normal((8, sum(JOINED_CHANNELS), size, size)).astype(np.float32)
    model = ir.from_proto(skip_graph(weight, strides=[stride] * 2, pads=[padding] * 4))
    (feed,) = feeds(1)
    assert split_concatenations(model, [feed]) == ["shortcut"]
    graph = ir.to_proto(model)
    assert [node.name for node in graph.graph.node if node.op_type == "Conv"] == ["shortcut/part_0", "shortcut/part_1"]
    actual = run_joined(graph, feed)
    expected = exact(feed, weight, stride=stride, padding=padding)
    np.testing.assert_allclose(actual["out"], expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(actual["mean"][:, : JOINED_CHANNELS[0], 0, 0], feed["below"].mean((2, 3)), atol=1e-3)


def rounded(values: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    return np.round(values / step) * step


def by_hand(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return sums of quantized products: activations [pixels, n] in 255 steps, weights [n, 8] in 127 per column."""
    total = BIAS.astype(np.float64)
    for values, weight in parts:
        columns = np.abs(weight).max(axis=0) / 127
        product = rounded(values, np.ptp(values) / 255) @ rounded(weight, columns)
        total = total + rounded(product, np.ptp(product) / 255)
    return total


@pytest.mark.full_range
def test_each_part_is_quantized_with_its_own_range() -> None:
    """The numpy reference rounds alike; with one shared scale the narrow part loses precision to the wide one."""
    examples = feeds(1)
    exact_output = exact(examples[0]).transpose(0, 2, 3, 1).reshape(-1, 8)
    values = [array.transpose(0, 2, 3, 1).reshape(-1, array.shape[1]) for array in examples[0].values()]
    columns = np.split(WEIGHT[:, :, 0, 0].T.astype(np.float64), JOINED_CHANNELS[:1])
    expected = {
        False: by_hand([(np.concatenate(values, axis=1), np.concatenate(columns))]),
        True: by_hand(list(zip(values, columns, strict=True))),
    }
    errors = {}
    for split in (False, True):
        options = {"method": "static", "reduce_range": False, "bias_correction": False, "split_concatenations": split}
        quantizer = StaticQuantizer(skip_graph(), examples, Int8Options.model_validate(options))
        assert quantizer.split == (["shortcut"] if split else [])
        actual = run_joined(quantizer.quantize(), examples[0])["out"].transpose(0, 2, 3, 1).reshape(-1, 8)
        errors[split] = np.sqrt(np.square(actual - exact_output).mean())
        assert errors[split] == pytest.approx(np.sqrt(np.square(expected[split] - exact_output).mean()), rel=0.1)
    assert errors[True] < 0.1 * errors[False]


@pytest.mark.parametrize("changed", [{"groups": 2}, {"axis": 2}])
def test_grouped_convolutions_and_other_axes_are_not_split(changed: dict[str, int]) -> None:
    weight = WEIGHT[:, : WEIGHT.shape[1] // changed.get("groups", 1)]
    model = ir.from_proto(skip_graph(weight, **changed))
    original = [node.op_type for node in model.graph]
    assert split_concatenations(model, feeds(1)) == []
    assert [node.op_type for node in model.graph] == original
