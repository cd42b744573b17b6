"""Tests of integer kernel detection and saturation estimates, compared with loops over numpy scalars."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import onnx_model
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.inspection.activation_clipping import find_saturation
from compress.inspection.integer_kernels import read_kernels

INNER, OUTER = 64, 48


def network(layers: int = 2, peak: float = 1.0) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    nodes, weights, previous = [], {}, "x"
    for index in range(layers):
        size, name = (INNER, OUTER if index == layers - 1 else INNER), f"encoder.layer.{index}.weight"
        weights[name] = generator.uniform(-peak, 1, size).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [previous, name], [f"y{index}"], name=f"product_{index}"))
        nodes.append(helper.make_node("Relu", [f"y{index}"], [f"r{index}"], name=f"relu_{index}"))
        previous = f"r{index}"
    return onnx_model(nodes, {"x": ["rows", INNER]}, {previous: ["rows", OUTER]}, weights)


class CalibrationRows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rows, None)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(1).uniform(0, 1, (8, INNER)).astype(np.float32)}]


def saved(graph: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


def static(graph: onnx.ModelProto, kept: tuple[str, ...] = (), **settings: object) -> onnx.ModelProto:
    return StaticQuantizer(graph, feeds(), Int8Options(method="static", **settings)).quantize(kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["qoperator", "qdq"])
def test_static_graph_has_only_integer_kernels(layout: str, tmp_path: Path):
    kernels = read_kernels(saved(static(network(), format=layout), tmp_path))
    # Between two QDQ products ONNX Runtime also fuses the activation function.
    first = "MatMulIntegerToFloat" if layout == "qoperator" else "QLinearMatMul"
    assert [kernel.operator for kernel in kernels] == [first, "MatMulIntegerToFloat"]
    assert all(kernel.integer for kernel in kernels)


def test_float_kernels_are_named_with_a_reason(tmp_path: Path):
    kernels = read_kernels(saved(static(network(), kept=("product_1",)), tmp_path))
    assert kernels[0].integer and kernels[0].operator == "MatMulIntegerToFloat"
    assert kernels[1].name.startswith("product_1") and "not quantized" in kernels[1].why


@pytest.mark.parametrize(("kind", "integer"), [(QuantType.QInt8, False), (QuantType.QUInt8, True)])
def test_shared_signed_activations_stay_in_float(kind: QuantType, integer: bool, tmp_path: Path):
    """ONNX Runtime's quantizer writes both graphs, in which two products read one value."""
    weights = {name: np.random.default_rng(0).normal(size=(384, 384)).astype(np.float32) for name in ("a", "b")}
    nodes = [helper.make_node("Tanh", ["x"], ["tanh"], "tanh")]
    nodes += [helper.make_node("MatMul", ["tanh", name], [f"y_{name}"], f"product_{name}") for name in weights]
    nodes.append(helper.make_node("Max", ["y_a", "y_b"], ["y"], "max"))
    model = onnx_model(nodes, {"x": ["rows", 384]}, {"y": ["rows", 384]}, weights)
    reader = CalibrationRows([{"x": np.random.default_rng(1).normal(size=(2, 384)).astype(np.float32)}])
    path = tmp_path / "quantized.onnx"
    quantize_static(saved(model, tmp_path), path, reader, activation_type=kind, op_types_to_quantize=["MatMul"])
    kernels = read_kernels(path)
    assert [kernel.integer for kernel in kernels] == [integer, integer]
    assert integer or all(
        "activations are int8" in each.why and "unsigned activations" in each.help for each in kernels
    )


def test_weight_only_quantized_products_are_recognized(tmp_path: Path):
    # Like weight-only quantizers: activations stay float, for which ONNX Runtime has a kernel.
    graph = static(network(layers=1), format="qdq")
    (multiplication,) = (node for node in graph.graph.node if node.op_type == "MatMul")
    multiplication.input[0] = "x"
    (kernels,) = read_kernels(saved(graph, tmp_path))
    assert kernels.operator == "MatMulNBits" and kernels.integer
    weight = np.random.default_rng(0).integers(-127, 128, (16, 8, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["float"], name="weights"),
        helper.make_node("Conv", ["x", "float"], ["y"], name="convolution"),
    ]
    weights = {"w": weight, "scale": np.float32(0.1)}
    (kernels,) = read_kernels(saved(onnx_model(nodes, {"x": [1, 8, 9, 9]}, {"y": [1, 16, 7, 7]}, weights), tmp_path))
    assert not kernels.integer and "input is float" in kernels.why and "static" in kernels.help


def test_fully_dequantized_table_is_named(tmp_path: Path):
    table = np.arange(-60, 60, dtype=np.int8).reshape(30, 4)
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale"], ["float"], name="whole"),
        helper.make_node("Gather", ["float", "ids"], ["y"], name="look_up"),
    ]
    weights = {"table": table, "scale": np.float32(0.1)}
    model = onnx_model(nodes, {"ids": (TensorProto.INT64, ["n"])}, {"y": ["n", 4]}, weights)
    kernels = read_kernels(saved(model, tmp_path))
    # ONNX Runtime may have folded the table into float, which is no better.
    assert all(not kernel.integer and "whole table" in kernel.why for kernel in kernels)


def emulate(graph: onnx.ModelProto, name: str, x: np.ndarray) -> tuple[float, float]:
    """Return the share of saturated pair sums and the relative error of the layer ``name``, by loops over scalars."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    (node,) = (node for node in graph.graph.node if node.name == name)
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    changed.graph.output.append(onnx.ValueInfoProto(name=node.input[0]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(changed.SerializeToString(), options)
    rows = session.run([node.input[0]], {"x": x})[0].astype(int)
    weight, zero = arrays[node.input[1]].astype(int), int(arrays[node.input[4]])
    cut = wrong = whole = 0.0
    for row in rows:
        for column in weight.T:
            pairs = [row[k] * column[k] + row[k + 1] * column[k + 1] for k in range(0, INNER, 2)]
            clipped = [min(max(pair, -32768), 32767) for pair in pairs]
            cut += sum(a != b for a, b in zip(pairs, clipped, strict=True))
            wrong += (sum(clipped) - sum(pairs)) ** 2
            whole += (sum(pairs) - zero * sum(column)) ** 2
    return cut / (len(rows) * weight.shape[1] * INNER / 2), float(np.sqrt(wrong / whole))


@pytest.mark.full_range(own_kernels=True)
def test_saturation_matches_loops():
    graph = static(network(peak=0.02), bias_correction=False)
    kernels = find_saturation(graph, feeds())
    assert [layer.layer for layer in kernels] == ["product_0", "product_1"]
    for layer in kernels:
        cut, error = emulate(graph, layer.layer, feeds()[0]["x"])
        assert layer.cut == pytest.approx(cut) and layer.error == pytest.approx(error)
    assert kernels[0].cut and kernels[0].error and kernels[0].matters


def test_seven_bits_do_not_saturate():
    narrow = find_saturation(static(network(peak=0.02), reduce_range=True), feeds())
    assert len(narrow) == 2 and all(layer.risk == 0 and layer.cut == 0 and not layer.matters for layer in narrow)


def test_dynamic_graphs_are_checked_with_and_without_inputs():
    graph = quantize_products(network(peak=0.02), True, False)
    real, bound = find_saturation(graph, feeds()), find_saturation(graph, None)
    assert len(real) == 2 and real[0].operator == "MatMulInteger" and real[0].cut
    assert [layer.risk for layer in bound] == [layer.risk for layer in real]
    assert bound[0].matters and bound[0].error is None


def test_saturation_of_convolutions_matches_sliding_windows():
    generator = np.random.default_rng(0)
    weight = generator.uniform(-0.2, 1, (6, 4, 3, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])
    model = onnx_model([node], {"x": None}, {"y": None}, {"w": weight})
    x = generator.uniform(-0.1, 1, (1, 4, 9, 8)).astype(np.float32)
    settings = Int8Options(method="static", reduce_range=False, bias_correction=False, per_channel=False)
    quantized = StaticQuantizer(model, [{"x": x}], settings).quantize()
    (kernels,) = find_saturation(quantized, [{"x": x}])

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    scale, zero = float(arrays["x_scale"]), int(arrays["x_zero_point"])
    integers = arrays["w_quantized"].astype(int)
    rounded = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255).astype(int)[0]
    padded = np.pad(rounded, ((0, 0), (1, 2), (0, 1)), constant_values=zero)
    cut = pairs = 0
    for top, left, out in product(range(0, padded.shape[1] - 2, 2), range(padded.shape[2] - 2), range(6)):
        terms = [
            padded[channel, top + row, left + 2 * column] * integers[out, channel, row, column]
            for row, column, channel in product(range(3), range(2), range(4))
        ]
        sums = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        cut += sum(not -32768 <= pair_sum <= 32767 for pair_sum in sums)
        pairs += len(sums)
    assert kernels.operator == "Conv" and cut > 0 and kernels.cut == pytest.approx(cut / pairs)
