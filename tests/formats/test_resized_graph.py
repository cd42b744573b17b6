"""Graphs at widths that nobody made, against the same graphs made."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.interpolate_size import InterpolatedGraph
from compress.utils.errors import ModelError

HEAD, WIDE = 8, 300


def made(heads: int, neurons: int, tokens: int, operator: str = "Relu") -> onnx.ModelProto:
    """A table, a product into heads, one into neurons and back, and a split that counts the heads."""
    rng = np.random.default_rng(heads)
    shapes = {
        "table": (tokens, 16),
        "joint": (16, 3 * heads * HEAD),
        "bias": (neurons,),
        "up": (WIDE, neurons),
        "packed": (tokens, 4),
    }
    stored = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    stored.append(numpy_helper.from_array(np.array([0, -1, heads, HEAD], np.int64), "shape"))
    stored.append(helper.make_tensor("zeros", TensorProto.INT8, [neurons], [0] * neurons))
    for tensor in stored:
        if len(tensor.raw_data) >= 1024 and tensor.name == "bias":
            tensor.data_location = TensorProto.DEFAULT
    stored.sort(key=lambda tensor: -len(tensor.raw_data))  # as what a quantizer writes: by sizes
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "joint"], ["all"]),
        helper.make_node("MyHeads", ["all", "shape"], ["out"], domain="own", num_heads=heads, sizes=[heads * HEAD] * 3),
        helper.make_node(operator, ["out"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", heads * HEAD])],
        stored,
        value_info=[helper.make_tensor_value_info("all", TensorProto.FLOAT, ["batch", "length", 3 * heads * HEAD])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("own", 1)])


def widths(heads: int, neurons: int, tokens: int) -> dict[str, int]:
    return {"heads": heads, "neurons": neurons, "tokens": tokens}


@pytest.fixture(scope="module", params=[False, True], ids=["from large to small", "from small to large"])
def resized(request: pytest.FixtureRequest) -> InterpolatedGraph:
    smaller, other = sorted([(12, 384, 5000), (11, 200, 6009)], reverse=not request.param)
    return InterpolatedGraph(made(*smaller), widths(*smaller), made(*other), widths(*other))


@pytest.mark.parametrize("at", [(12, 384, 5000), (3, 17, 100), (1, 255, 127), (2, 256, 128), (64, 5000, 70_000)])
def test_bytes_are_those_of_the_graph_that_is_made(resized: InterpolatedGraph, at: tuple[int, int, int]) -> None:
    """Lengths of numbers in the file, marks of tensors from 1,024 bytes on and all."""
    assert resized.size_bytes(widths(*at)) == made(*at).ByteSize()


def test_every_number_but_weights_is_that_of_the_graph_that_is_made(resized: InterpolatedGraph) -> None:
    at = (3, 300, 77)
    actual, expected = resized.at(widths(*at)), made(*at)
    assert list(actual.graph.node) == list(expected.graph.node)
    assert {tensor.name: list(tensor.dims) for tensor in actual.graph.initializer} == {
        tensor.name: list(tensor.dims) for tensor in expected.graph.initializer
    }
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in actual.graph.initializer}
    assert arrays["shape"].tolist() == [0, -1, 3, HEAD]
    assert arrays["table"].shape == (77, 16) and (arrays["table"] != 0).any()


def test_graphs_of_other_operators_are_refused() -> None:
    first, other = (12, 384, 5000), (11, 200, 6009)
    with pytest.raises(ModelError, match="op_type"):
        InterpolatedGraph(made(*first), widths(*first), made(*other, operator="Tanh"), widths(*other))


def test_a_number_that_could_follow_two_widths_is_refused() -> None:
    first, other = (12, 384, 5000), (6, 192, 6009)
    with pytest.raises(ModelError, match="is ambiguous"):
        InterpolatedGraph(made(*first), widths(*first), made(*other), widths(*other))


def test_a_width_of_no_whole_number_is_refused() -> None:
    def packed(neurons: int) -> onnx.ModelProto:
        stored = [numpy_helper.from_array(np.zeros((neurons // 2, 4), np.uint8), "packed")]
        return helper.make_model(helper.make_graph([], "g", [], [], stored))

    graph = InterpolatedGraph(packed(64), {"neurons": 64}, packed(32), {"neurons": 32})
    assert graph.size_bytes({"neurons": 130}) == packed(130).ByteSize()
    with pytest.raises(ModelError, match="65"):
        graph.size_bytes({"neurons": 65})
