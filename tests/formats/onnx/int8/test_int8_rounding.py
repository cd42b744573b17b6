"""Weights of convolutions rounded against each other: a smaller error of the outputs in the same file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer


def network() -> onnx.ModelProto:
    """A 3x3 convolution of differences, one for each channel, and a pointwise one."""
    generator = np.random.default_rng(0)
    edges = generator.normal(size=(8, 3, 3, 3))
    edges -= edges.mean(axis=(1, 2, 3), keepdims=True)
    weights = {
        "a": (8 * edges).astype(np.float32),
        "b": generator.normal(size=(8, 1, 3, 3)).astype(np.float32),
        "c": generator.normal(size=(16, 8, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], "first", strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("Conv", ["p", "b"], ["q"], "each", group=8, pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Conv", ["q", "c"], ["y"], "points", kernel_shape=[1, 1]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [value("y", TensorProto.FLOAT, ["batch", 16, 7, 7])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def smooth_images(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Images in which neighbours are alike."""
    generator = np.random.default_rng(seed)
    coarse = np.ones((1, 1, 3, 16, 16)) * generator.uniform(-1, 1, (count, 1, 1, 1, 1))
    return [{"x": (image + generator.normal(0, 0.02, image.shape)).astype(np.float32)} for image in coarse]


def run(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["y"], feed)[0] for feed in feeds])


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.full_range
def test_outputs_are_nearer_and_nothing_else_changes(reduce_range: bool) -> None:
    graph, feeds = network(), smooth_images(32, 1)
    graphs = {
        rounding: StaticQuantizer(
            graph,
            feeds,
            Int8Options(method="static", weight_rounding=rounding, reduce_range=reduce_range, bias_correction=False),
        ).quantize()
        for rounding in ("nearest", "feedback")
    }
    others = smooth_images(16, 2)
    exact = run(graph, others)
    error = {name: float(np.square(run(model, others) - exact).mean()) for name, model in graphs.items()}
    assert error["feedback"] < 0.7 * error["nearest"]
    parts = {
        name: {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for name, model in graphs.items()
    }
    changed = [name for name, array in parts["nearest"].items() if not np.array_equal(array, parts["feedback"][name])]
    assert changed and all(name.endswith("_quantized") for name in changed)
    for name in changed:
        assert np.abs(parts["feedback"][name].astype(int)).max() <= (64 if reduce_range else 127)


def test_the_same_data_gives_the_same_file() -> None:
    graph, feeds = network(), smooth_images(8, 1)
    settings = Int8Options(method="static", reduce_range=False, weight_rounding="feedback")
    once, twice = (StaticQuantizer(graph, feeds, settings).quantize().SerializeToString() for _ in range(2))
    assert once == twice
