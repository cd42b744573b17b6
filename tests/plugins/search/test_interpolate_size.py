"""Tests of interpolated ONNX graphs: sizes and attributes against graphs built at those widths."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.plugins.search.interpolate_size import InterpolatedGraph
from compress.utils.errors import ModelError

HEAD, WIDE = 8, 300


def graph_of(heads: int, neurons: int, tokens: int, operator: str = "Relu") -> onnx.ModelProto:
    """Return a graph whose tensor shapes, attributes and constants depend on heads, neurons and tokens."""
    rng = np.random.default_rng(heads)
    shapes = {"table": (tokens, 16), "joint": (16, 3 * heads * HEAD), "bias": (neurons,), "up": (WIDE, neurons)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    stored.append(numpy_helper.from_array(np.array([0, -1, heads, HEAD], np.int64), "shape"))
    stored.append(helper.make_tensor("zeros", TensorProto.INT8, [neurons], [0] * neurons))
    bias = stored[2]
    if len(bias.raw_data) >= 1024:
        bias.data_location = TensorProto.DEFAULT
    stored.sort(key=lambda tensor: -len(tensor.raw_data))  # sorted by size, as quantizers write them
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "joint"], ["all"]),
        helper.make_node("MyHeads", ["all", "shape"], ["out"], domain="own", num_heads=heads, sizes=[heads * HEAD] * 3),
        helper.make_node(operator, ["out"], ["y"]),
    ]
    info, axes = helper.make_tensor_value_info, ["batch", "length"]
    outputs = [info("y", TensorProto.FLOAT, [*axes, heads * HEAD])]
    shapes_inside = [info("all", TensorProto.FLOAT, [*axes, 3 * heads * HEAD])]
    inputs = [info("ids", TensorProto.INT64, axes)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored, value_info=shapes_inside)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("own", 1)])


def widths(heads: int, neurons: int, tokens: int) -> dict[str, int]:
    return {"heads": heads, "neurons": neurons, "tokens": tokens}


@pytest.fixture(scope="module", params=[False, True], ids=["from large to small", "from small to large"])
def resized(request: pytest.FixtureRequest) -> InterpolatedGraph:
    smaller, other = sorted([(12, 384, 5000), (11, 200, 6009)], reverse=not request.param)
    return InterpolatedGraph(graph_of(*smaller), widths(*smaller), graph_of(*other), widths(*other))


@pytest.mark.parametrize("at", [(12, 384, 5000), (3, 17, 100), (1, 255, 127), (2, 256, 128), (64, 5000, 70_000)])
def test_interpolated_size_equals_built_graph(resized: InterpolatedGraph, at: tuple[int, int, int]) -> None:
    """The size includes variable-length integers, and fields that only tensors of 1,024 bytes or more have."""
    assert resized.size_bytes(widths(*at)) == graph_of(*at).ByteSize()


def test_interpolated_graph_equals_built_graph_except_weights(resized: InterpolatedGraph) -> None:
    at = (3, 300, 77)
    actual, expected = resized.at(widths(*at)), graph_of(*at)
    assert list(actual.graph.node) == list(expected.graph.node)
    shapes = [{tensor.name: list(tensor.dims) for tensor in one.graph.initializer} for one in (actual, expected)]
    assert shapes[0] == shapes[1]
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in actual.graph.initializer}
    assert arrays["shape"].tolist() == [0, -1, 3, HEAD]
    assert arrays["table"].shape == (77, 16) and (arrays["table"] != 0).any()


@pytest.mark.parametrize(
    ("other", "operator", "words"), [((11, 200, 6009), "Tanh", "op_type"), ((6, 192, 6009), "Relu", "is ambiguous")]
)
def test_different_operators_and_ambiguous_widths_are_refused(
    other: tuple[int, int, int], operator: str, words: str
) -> None:
    first = (12, 384, 5000)
    with pytest.raises(ModelError, match=words):
        InterpolatedGraph(graph_of(*first), widths(*first), graph_of(*other, operator=operator), widths(*other))


def test_fractional_width_is_refused() -> None:
    def packed(neurons: int) -> onnx.ModelProto:
        stored = [numpy_helper.from_array(np.zeros((neurons // 2, 4), np.uint8), "packed")]
        return helper.make_model(helper.make_graph([], "g", [], [], stored))

    graph = InterpolatedGraph(packed(64), {"neurons": 64}, packed(32), {"neurons": 32})
    assert graph.size_bytes({"neurons": 130}) == packed(130).ByteSize()
    with pytest.raises(ModelError, match="65"):
        graph.size_bytes({"neurons": 65})
