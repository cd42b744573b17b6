"""Static INT8 of convolutional nets: integers from the first convolution to the last product, and the right numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.select_nodes import count_without_kernel
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.runtimes.profile import write_optimized
from compress.utils.errors import DataError

PLAIN = Int8Options(method="static", reduce_range=False, bias_correction=False)
CHANNELS, SIZE, CLASSES = 16, 12, 40


def weight(seed: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def network(activation: Sequence[str] = ("Relu",)) -> onnx.ModelProto:
    """Convolution, depthwise convolution with a residual, pooling, and a product: what mobile nets are made of."""
    arrays = {
        **{"w0": weight(0, CHANNELS, 3, 3, 3), "b0": weight(1, CHANNELS, 1)[:, 0]},
        **{"w1": weight(2, CHANNELS, 1, 3, 3), "b1": weight(3, CHANNELS, 1)[:, 0]},
        **{"w2": weight(4, CHANNELS, CHANNELS, 1, 1), "b2": weight(5, CHANNELS, 1)[:, 0]},
        **{"w3": weight(6, CLASSES, CHANNELS * 2), "b3": weight(7, CLASSES, 1)[:, 0]},
        **{"low": np.float32(0), "high": np.float32(6), "twice": np.array([0], np.int64)},
    }
    limits = ["low", "high"] if activation[0] == "Clip" else []
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node(activation[0], ["c0", *limits], ["a0"], name="act0"),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="depthwise", pads=[1, 1, 1, 1], group=CHANNELS),
        helper.make_node(activation[0], ["c1", *limits], ["a1"], name="act1"),
        helper.make_node("Conv", ["a1", "w2", "b2"], ["c2"], name="pointwise"),
        helper.make_node("Add", ["c2", "a0"], ["sum"], name="residual"),
        helper.make_node("Concat", ["sum", "c2"], ["both"], name="both", axis=1),
        helper.make_node("GlobalAveragePool", ["both"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["y"], name="classifier", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name != "twice"]
    graph = helper.make_graph(nodes, "network", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def images(count: int = 8, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(count)]


def run(graph: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def kernels(graph: onnx.ModelProto, folder: Path) -> Counter[str]:
    onnx.save(graph, folder / "model.onnx")
    return Counter(node.op_type for node in ir.load(write_optimized(folder / "model.onnx", folder, 1)).graph)


def error(graph: onnx.ModelProto, whole: onnx.ModelProto) -> float:
    fresh = images(seed=9)
    expected = run(whole, fresh)
    return float(np.square(run(graph, fresh) - expected).mean() / np.square(expected - expected.mean(0)).mean())


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.full_range
def test_a_net_of_convolutions_is_integers_from_end_to_end(activation: str, tmp_path: Path):
    whole = network((activation,))
    graph = StaticQuantizer(whole, images(), PLAIN).quantize()
    kernel_names = kernels(graph, tmp_path)
    assert (
        kernel_names["QLinearConv"] == 3
        and kernel_names["QLinearAdd"] == 1
        and kernel_names["QLinearGlobalAveragePool"] == 1
    )
    assert kernel_names["QLinearConcat"] == 1 and kernel_names["MatMulIntegerToFloat"] == 1
    assert (
        not kernel_names["Conv"]
        and not kernel_names["FusedConv"]
        and not kernel_names["Gemm"]
        and not kernel_names["DequantizeLinear"]
    )
    assert kernel_names["QuantizeLinear"] == 1
    # Random pooled features hardly differ from image to image, so that little rounding is much of it.
    assert 0 < error(graph, whole) < 0.15


def test_a_convolution_alone_among_floats_keeps_its_neighbours_float(tmp_path: Path):
    quantizer = StaticQuantizer(network(), images(), PLAIN)
    kernel_names = kernels(quantizer.quantize(float_layers=("depthwise", "pointwise", "classifier")), tmp_path)
    assert (
        kernel_names["QLinearConv"] == 1
        and kernel_names["QLinearAdd"] == 0
        and kernel_names["QLinearGlobalAveragePool"] == 0
    )
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
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, None, None]) for name in ("x", "y")
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "decoder", values[:1], values[1:], stored)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
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
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(kernel, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
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
    residual = next(index for index, node in enumerate(whole.graph.node) if node.name == "residual")
    del whole.graph.node[residual:]
    whole.graph.node.extend(
        [
            helper.make_node("Add", ["c2", "a0"], ["sum"], name="residual"),
            helper.make_node("Relu", ["sum"], ["positive"], name="after"),
            helper.make_node("GlobalAveragePool", ["positive"], ["pooled"], name="pool"),
            helper.make_node("Flatten", ["pooled"], ["y"], name="flat"),
        ]
    )
    assert error(StaticQuantizer(whole, images(), PLAIN).quantize(), whole) < 0.05
