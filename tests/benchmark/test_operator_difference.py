"""An 8-bit file against its float file: one that ONNX Runtime leaves in float, and sums of made-up times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from compress.benchmark import operator_difference
from compress.benchmark.operator_difference import compare_operators
from compress.benchmark.profile import OperatorDifference
from compress.benchmark.profiled_calls import ProfiledCalls
from compress.formats.onnx.model import FLOAT_GRAPH
from compress.formats.targets import TARGETS
from compress.inspection.integer_kernels import APART, FASTER, OTHER, read_kernels
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.alone
WIDTH, ROWS = 384, 2


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._feeds = iter([{"x": np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two layers that read one value: in float, and by ONNX Runtime's quantizer with either type of activations."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    names = [f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key")]
    arrays = [numpy_helper.from_array(generator.normal(size=(WIDTH, WIDTH)).astype(np.float32), name) for name in names]
    nodes = [helper.make_node("Tanh", ["x"], ["tanh"], "node_tanh")]
    nodes += [
        helper.make_node("MatMul", ["tanh", name], [f"val_{index}"], f"node_MatMul_{index}")
        for index, name in enumerate(names)
    ]
    nodes.append(helper.make_node("Max", ["val_0", "val_1"], ["y"], "node_max"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    graphs = {name: folder / name / FLOAT_GRAPH for name in ("float", "signed", "unsigned")}
    for path in graphs.values():
        path.parent.mkdir(parents=True)
    onnx.save(model, graphs["float"])
    for name, kind in (("signed", QuantType.QInt8), ("unsigned", QuantType.QUInt8)):
        quantize_static(graphs["float"], graphs[name], Reader(), activation_type=kind, op_types_to_quantize=["MatMul"])
    return graphs


def test_signed_activations_that_several_read_stay_in_float(files: dict[str, Path]) -> None:
    signed, unsigned = (read_kernels(files[name]) for name in ("signed", "unsigned"))
    assert [kernel.integer for kernel in unsigned] == [True, True]
    assert [kernel.integer for kernel in signed] == [False, False]
    assert all("signed bytes" in kernel.why and "unsigned activations" in kernel.help for kernel in signed)


@pytest.fixture(scope="module")
def difference(files: dict[str, Path]) -> OperatorDifference:
    batch = {"x": np.random.default_rng(2).normal(size=(ROWS, WIDTH)).astype(np.float32)}
    settings = {"threads": 1, "seconds": 0.1, "progress": SilentProgress(), "seed": 0}
    return compare_operators(files["float"], files["signed"], ProfiledCalls((batch,) * 4), TARGETS["cpu"], **settings)  # type: ignore[arg-type]


def test_what_makes_a_file_slow_is_named_with_its_layers(difference: OperatorDifference) -> None:
    """Both weights are dequantized in each call, which takes many times what two rows times them take."""
    assert difference.verdict == "slower" and difference.low <= difference.faster <= difference.high < 1
    first = difference.responsible[0]
    assert "signed bytes" in first.why and "DequantizeLinear" in first.operators
    assert first.layers == ("encoder.layer.0.attention",)
    layer = difference.layers[0]
    assert layer.layer == "encoder.layer.0.attention" and layer.why == first.why
    assert 0 < layer.low_ms <= layer.more_ms <= layer.high_ms


def test_causes_sum_up_to_the_whole(difference: OperatorDifference) -> None:
    """Within what medians of sums and sums of medians differ by."""
    assert sum(cause.more_ms for cause in difference.causes) == pytest.approx(
        sum(layer.more_ms for layer in difference.layers), rel=0.2
    )


def test_shares_of_a_layer_with_times_that_a_person_can_check() -> None:
    """In float a product of 3 ms and a sum of 1; in 8 bits a product of 1, its conversion of 0.5, two others of 2."""

    def node(operator: str, name: str) -> ir.Node:
        return ir.Node("", operator, inputs=[None], name=name)

    old = [node("MatMul", "a"), node("Add", "b")]
    new = [node("MatMulIntegerToFloat", "c"), node("QuantizeLinear", "d"), node("Add", "e"), node("Softmax", "f")]
    milliseconds = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 0.5, "e": 2.0, "f": 2.0}
    times = {name: np.full((7, 2), value) for name, value in milliseconds.items()}
    files = [operator_difference._File({"layer": nodes}, times) for nodes in (old, new)]
    (layer,), causes = operator_difference._differences(files[0], files[1], (7, 2), 0)
    assert (layer.float_ms, layer.int8_ms, layer.more_ms) == (4.0, 5.5, 1.5)
    assert (layer.low_ms, layer.high_ms) == (1.5, 1.5)
    assert {cause.why: cause.more_ms for cause in causes} == {
        APART.why: 3.0, "floats are rounded to integers before a product": 0.5, FASTER.why: -2.0,
    }  # fmt: skip
    assert layer.why == APART.why != OTHER.why
