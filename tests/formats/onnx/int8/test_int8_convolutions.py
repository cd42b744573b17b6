"""Static INT8 of convolutional nets: integers from the first convolution to the last product, and the right numbers."""

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
from onnx import helper, numpy_helper
from onnx_graphs import onnx_model

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.equalization import apply_factors, equalize, find_channel_groups
from compress.formats.onnx.int8.observers import observe, open_session
from compress.formats.onnx.int8.qdq_cleanup import split_concatenations
from compress.formats.onnx.int8.select_nodes import count_without_kernel
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.utils.errors import DataError

PLAIN = Int8Options(method="static", reduce_range=False, bias_correction=False)
CHANNELS, SIZE, CLASSES = 16, 12, 40


def weight(seed: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def network(activation: str = "Relu") -> onnx.ModelProto:
    """Convolution, depthwise convolution with a residual, pooling, and a product: what mobile nets are made of."""
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


def images(count: int = 8, seed: int = 0, size: int = SIZE) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(2, 3, size, size)).astype(np.float32)} for _ in range(count)]


def run(graph: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    session = open_session(graph)
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def error(graph: onnx.ModelProto, whole: onnx.ModelProto, size: int = SIZE) -> float:
    fresh = images(seed=9, size=size)
    expected = run(whole, fresh)
    return float(np.square(run(graph, fresh) - expected).mean() / np.square(expected - expected.mean(0)).mean())


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.full_range
def test_a_net_of_convolutions_is_integers_from_end_to_end(activation: str, tmp_path: Path):
    whole = network(activation)
    graph = StaticQuantizer(whole, images(), PLAIN).quantize()
    kernel_names = kernels(graph, tmp_path)
    counts = {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QLinearConcat": 1}
    counts |= {"MatMulIntegerToFloat": 1, "QuantizeLinear": 1}
    counts |= dict.fromkeys(("Conv", "FusedConv", "Gemm", "DequantizeLinear"), 0)
    assert {name: kernel_names[name] for name in counts} == counts
    # Random pooled features hardly differ from image to image, so that little rounding is much of it.
    assert 0 < error(graph, whole) < 0.15


def test_a_convolution_alone_among_floats_keeps_its_neighbours_float(tmp_path: Path):
    quantizer = StaticQuantizer(network(), images(), PLAIN)
    kernel_names = kernels(quantizer.quantize(float_layers=("depthwise", "pointwise", "classifier")), tmp_path)
    names = ("QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool")
    assert [kernel_names[name] for name in names] == [1, 0, 0]
    assert kernel_names["Conv"] + kernel_names["FusedConv"] == 2


@pytest.mark.full_range(own_kernels=True)
def test_a_layer_that_is_kept_between_integers_is_not_rounded_by_the_runtime(tmp_path: Path):
    graph = StaticQuantizer(network(), images(2), PLAIN).quantize(float_layers=("depthwise",))
    kernel_names = kernels(graph, tmp_path)
    assert kernel_names["QLinearConv"] == 2 and kernel_names["Conv"] + kernel_names["FusedConv"] == 1
    # The same numbers as without any optimization, in which ONNX Runtime rounds such weights to one scale a tensor.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    plain = session.run(None, images(1)[0])[0]
    assert np.abs(run(graph, images(1)) - plain).max() < 0.02 * plain.std()


def test_what_has_no_integer_kernel_stays_float(tmp_path: Path):
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
    assert count_without_kernel(ir.from_proto(whole)) == {"ConvTranspose": 1}
    quantized = quantizer.quantize()
    kernel_names = kernels(quantized, tmp_path)
    assert kernel_names["QLinearConv"] == 2 and kernel_names["ConvTranspose"] == 1
    # Its weights are not dequantized in each call: what it is given is, and the last output. Nor are they rounded.
    assert kernel_names["DequantizeLinear"] == 2
    with pytest.raises(DataError, match=r"refuses the calibration data \(x float32 \[2, 4, 5, 5\]\)"):
        StaticQuantizer(whole, [{"x": np.zeros((2, 4, 5, 5), np.float32)}], PLAIN)


@pytest.mark.full_range
def test_a_convolution_is_what_its_integers_say():
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


def test_bias_correction_takes_the_mean_error_of_convolutions_away():
    whole = network()
    shifts = {}
    for corrected in (False, True):
        settings = Int8Options(method="static", reduce_range=False, per_channel=False, bias_correction=corrected)
        graph = StaticQuantizer(whole, images(32), settings).quantize(float_layers=("first", "pointwise", "classifier"))
        shifts[corrected] = np.abs((run(graph, images(32)) - run(whole, images(32))).mean(axis=0)).mean()
    assert shifts[True] < 0.7 * shifts[False]


def test_the_graph_that_shifts_were_found_by_is_made_use_of_as_if_made_anew():
    # A product's bias is float there; those of convolutions and of the classifier are integers, in steps of their own.
    quantizer = StaticQuantizer(network(), images(32), Int8Options(method="static", reduce_range=False))
    reused, anew = quantizer.quantize(), quantizer.quantize()
    assert reused.SerializeToString(deterministic=True) == anew.SerializeToString(deterministic=True)
    plain = StaticQuantizer(network(), images(32), PLAIN).quantize()
    assert reused.SerializeToString(deterministic=True) != plain.SerializeToString(deterministic=True)


@pytest.mark.full_range
def test_an_activation_after_a_residual_is_kept_where_what_reads_it_is_float():
    # ONNX Runtime's quantizer takes the Relu out, since the integers begin at zero; the float pooling needs it.
    whole = network()
    del whole.graph.node[6:]
    assert whole.graph.node[-1].name == "residual"
    steps = (("Relu", "sum", "positive"), ("GlobalAveragePool", "positive", "pooled"), ("Flatten", "pooled", "y"))
    whole.graph.node.extend(helper.make_node(kind, [source], [target], name=kind) for kind, source, target in steps)
    assert error(StaticQuantizer(whole, images(), PLAIN).quantize(), whole) < 0.05


NARROW_CHANNELS, SMALL_SIZE = 8, 10


def uneven_network(activation: str, uneven: float = 1.0, opset: int = 20) -> onnx.ModelProto:
    """Stem, depthwise convolution, a residual over two, a convolution in groups, pooling and a product.

    Every second channel of what the stem and the block write is ``uneven`` times smaller, and what reads it larger.
    """
    generator = np.random.default_rng(0)
    sizes = np.where(np.arange(NARROW_CHANNELS) % 2, 1.0, 1 / uneven)
    channels = NARROW_CHANNELS
    shapes = {
        **{"w0": (channels, 3, 3, 3), "w1": (channels, 1, 3, 3), "w2": (channels, channels, 1, 1)},
        **{"w3": (channels, channels, 3, 3), "w4": (channels, channels // 2, 1, 1), "w5": (40, channels)},
    }
    arrays = {name: generator.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    arrays |= {f"b{index}": generator.normal(size=shapes[f"w{index}"][0]) / 2 for index in range(6)}
    for index in (0, 2, 3):
        arrays[f"w{index}"] *= sizes[:, None, None, None]
        arrays[f"b{index}"] *= sizes
    for index, shape in ((1, (-1, 1, 1, 1)), (3, (1, -1, 1, 1))):
        arrays[f"w{index}"] = arrays[f"w{index}"] / sizes.reshape(shape)
    arrays["w4"].reshape(2, -1, NARROW_CHANNELS // 2)[:] /= sizes.reshape(2, 1, -1)
    arrays |= {"slope": np.full((NARROW_CHANNELS, 1, 1), 0.2), "low": np.array(0.0), "high": np.array(1.5)}
    extra = {"PRelu": ["slope"], "Clip": ["low", "high"]}.get(activation, [])
    around = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="stem", **around),
        helper.make_node(activation, ["c0", *extra], ["a0"], name="act0"),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="depthwise", group=NARROW_CHANNELS, **around),
        helper.make_node(activation, ["c1", *extra], ["a1"], name="act1"),
        helper.make_node("Conv", ["a1", "w2", "b2"], ["c2"], name="point"),
        helper.make_node("Conv", ["c2", "w3", "b3"], ["c3"], name="block", **around),
        helper.make_node("Add", ["c3", "c2"], ["sum"], name="residual"),
        helper.make_node("Conv", ["sum", "w4", "b4"], ["c4"], name="groups", group=2),
        helper.make_node("GlobalAveragePool", ["c4"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w5", "b5"], ["y"], name="classifier", transB=1),
    ]
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    return onnx_model(nodes, {"x": ["batch", 3, SMALL_SIZE, SMALL_SIZE]}, {"y": ["batch", 40]}, weights, opset)


def small_images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return images(count, seed, SMALL_SIZE)


def observed(graph: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> dict[str, object]:
    names = {str(output): 1 for node in graph.graph.node for output in node.output if output not in ("flat", "y")}
    return observe(graph, names, feeds)  # type: ignore[return-value]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu"])
def test_any_factors_leave_the_float_function_as_it_is(activation: str):
    whole = uneven_network(activation)
    model = ir.from_proto(whole)
    groups = find_channel_groups(model)
    # The residual ties what `point` and `block` write; `block` reads what it is added to.
    assert [sorted(str(node.name) for node in group.readers) for group in groups] == [
        ["depthwise"],
        ["point"],
        ["block", "groups"],
        ["classifier"],
    ]
    generator = np.random.default_rng(5)
    for group in groups:
        apply_factors(model, group, np.exp(generator.normal(size=group.channels)).astype(np.float32))
    changed = ir.to_proto(model)
    original = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    assert all(not np.allclose(original[key], after[key]) for key in ("w0", "w1", "w2", "w3", "w4", "w5", "b0", "b3"))
    np.testing.assert_allclose(run(changed, small_images(3)), run(whole, small_images(3)), rtol=1e-4, atol=1e-5)


def test_the_papers_factors_make_both_ranges_the_geometric_mean():
    first, second = (weight(seed, 6, 6, 1, 1) for seed in (1, 2))
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="one"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="two"),
    ]
    axes = [1, 6, 4, 4]
    model = ir.from_proto(onnx_model(nodes, {"x": axes}, {"y": axes}, {"w1": first, "w2": second}))
    assert equalize(model, {}, "weights") == ["two"]
    weights = [constant(model.graph.initializers[name]) for name in ("w1", "w2")]
    # Equations 9 and 11: row i of the first, column i of the second.
    mean = np.sqrt(np.abs(first).max(axis=(1, 2, 3)) * np.abs(second).max(axis=(0, 2, 3)))
    np.testing.assert_allclose(np.abs(weights[0]).max(axis=(1, 2, 3)), mean, rtol=1e-5)
    np.testing.assert_allclose(np.abs(weights[1]).max(axis=(0, 2, 3)), mean, rtol=1e-5)


def test_a_clip_lets_only_through_what_it_does_not_cut_off():
    whole, feeds = uneven_network("Clip", uneven=6), small_images(16)
    seen = observed(whole, feeds)
    model = ir.from_proto(whole)
    equalize(model, seen, "activations")  # type: ignore[arg-type]
    changed = ir.to_proto(model)
    np.testing.assert_allclose(run(changed, feeds), run(whole, feeds), rtol=1e-4, atol=1e-5)
    again = observed(changed, feeds)
    original, after = seen["a0"].largest, again["a0"].largest  # type: ignore[attr-defined]
    reached = original > 1.499
    assert reached.any() and not reached.all()
    assert after[reached] == pytest.approx(1.5)
    assert (after[~reached] >= original[~reached] - 1e-5).all() and after[~reached] == pytest.approx(1.425, abs=1e-3)


def test_small_channels_get_more_levels():
    whole, errors = uneven_network("Relu", uneven=40), {}
    for method in ("none", "activations"):
        settings = Int8Options(
            method="static", reduce_range=False, bias_correction=False, cross_layer_equalization=method
        )  # type: ignore[arg-type]
        graph = StaticQuantizer(whole, small_images(16), settings).quantize()
        errors[method] = error(graph, whole, SMALL_SIZE)
    assert errors["activations"] < 0.3 * errors["none"]


def test_a_graph_without_pairs_is_left_alone():
    model = ir.from_proto(uneven_network("HardSwish"))
    groups = find_channel_groups(model)
    assert [sorted(str(node.name) for node in group.readers) for group in groups] == [
        ["block", "groups"],
        ["classifier"],
    ]


WIDE, NARROW = 100.0, 1.0
JOINED_CHANNELS = (16, 24)
SIZES = np.random.default_rng(7)
WEIGHT = SIZES.standard_normal((8, sum(JOINED_CHANNELS), 1, 1)).astype(np.float32)
WEIGHT[:, : JOINED_CHANNELS[0]] *= NARROW / WIDE
BIAS = SIZES.standard_normal(8).astype(np.float32)


def skip_graph(weight: np.ndarray = WEIGHT, groups: int = 1, axis: int = 1, **attributes: object) -> onnx.ModelProto:
    """A U-Net's skip connection: two values joined, which a convolution and an average read."""
    nodes = [
        helper.make_node("Concat", ["below", "kept"], ["joined"], name="concat", axis=axis),
        helper.make_node("Conv", ["joined", "weight", "bias"], ["out"], name="shortcut", group=groups, **attributes),
        helper.make_node("GlobalAveragePool", ["joined"], ["mean"], name="mean"),
    ]
    ends = (dict.fromkeys(names, [None] * 4) for names in (("below", "kept"), ("out", "mean")))
    return onnx_model(nodes, *ends, {"weight": weight, "bias": BIAS})


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    """Uniform values, one part a hundred times as far as the other."""
    drawn = np.random.default_rng(1)
    parts = (("below", WIDE, JOINED_CHANNELS[0]), ("kept", NARROW, JOINED_CHANNELS[1]))
    return [{key: drawn.uniform(-r, r, (2, n, 12, 12)).astype(np.float32) for key, r, n in parts} for _ in range(count)]


def run_joined(graph: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def exact(feed: dict[str, np.ndarray], weight: np.ndarray = WEIGHT, **options: int) -> np.ndarray:
    """torch's own convolution of the concatenation, in 64 bits."""
    joined = torch.cat([torch.from_numpy(feed[name]).double() for name in ("below", "kept")], dim=1)
    result = torch.nn.functional.conv2d(
        joined, torch.from_numpy(weight).double(), torch.from_numpy(BIAS).double(), **options
    )
    return np.asarray(result.numpy())


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 2, 1)])
def test_the_sum_of_the_parts_is_the_convolution(size: int, stride: int, padding: int) -> None:
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
    """Sums of activations [pixels, n] rounded in 255 steps of their range, weights [n, 8] in 127 of each column's."""
    total = BIAS.astype(np.float64)
    for values, weight in parts:
        columns = np.abs(weight).max(axis=0) / 127
        product = rounded(values, np.ptp(values) / 255) @ rounded(weight, columns)
        total = total + rounded(product, np.ptp(product) / 255)
    return total


@pytest.mark.full_range
def test_each_part_has_the_rounding_of_its_own_range() -> None:
    """Against the same rounding done by hand: with one scale each, the parts lose what the other's range takes."""
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
def test_what_reads_no_channels_of_one_part_alone_is_left(changed: dict[str, int]) -> None:
    weight = WEIGHT[:, : WEIGHT.shape[1] // changed.get("groups", 1)]
    model = ir.from_proto(skip_graph(weight, **changed))
    original = [node.op_type for node in model.graph]
    assert split_concatenations(model, feeds(1)) == []
    assert [node.op_type for node in model.graph] == original
