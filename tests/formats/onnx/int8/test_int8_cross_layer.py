"""Cross-layer equalization: the same function in float, the paper's ranges, and more levels for small channels."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_int8_convolutions import run, weight

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.equalization import apply_factors, equalize, find_channel_groups
from compress.formats.onnx.int8.observers import observe
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer

CHANNELS, SIZE = 8, 10


def network(activation: str, uneven: float = 1.0, opset: int = 20) -> onnx.ModelProto:
    """Stem, depthwise convolution, a residual over two, a convolution in groups, pooling and a product.

    Every second channel of what the stem and the block write is ``uneven`` times smaller, and what reads it larger.
    """
    generator = np.random.default_rng(0)
    sizes = np.where(np.arange(CHANNELS) % 2, 1.0, 1 / uneven)
    shapes = {
        **{"w0": (CHANNELS, 3, 3, 3), "w1": (CHANNELS, 1, 3, 3), "w2": (CHANNELS, CHANNELS, 1, 1)},
        **{"w3": (CHANNELS, CHANNELS, 3, 3), "w4": (CHANNELS, CHANNELS // 2, 1, 1), "w5": (40, CHANNELS)},
    }
    arrays = {name: generator.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    arrays |= {f"b{index}": generator.normal(size=shapes[f"w{index}"][0]) / 2 for index in range(6)}
    for index in (0, 2, 3):
        arrays[f"w{index}"] *= sizes[:, None, None, None]
        arrays[f"b{index}"] *= sizes
    for index, shape in ((1, (-1, 1, 1, 1)), (3, (1, -1, 1, 1))):
        arrays[f"w{index}"] = arrays[f"w{index}"] / sizes.reshape(shape)
    arrays["w4"].reshape(2, -1, CHANNELS // 2)[:] /= sizes.reshape(2, 1, -1)
    arrays |= {"slope": np.full((CHANNELS, 1, 1), 0.2), "low": np.array(0.0), "high": np.array(1.5)}
    extra = {"PRelu": ["slope"], "Clip": ["low", "high"]}.get(activation, [])
    around = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="stem", **around),
        helper.make_node(activation, ["c0", *extra], ["a0"], name="act0"),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="depthwise", group=CHANNELS, **around),
        helper.make_node(activation, ["c1", *extra], ["a1"], name="act1"),
        helper.make_node("Conv", ["a1", "w2", "b2"], ["c2"], name="point"),
        helper.make_node("Conv", ["c2", "w3", "b3"], ["c3"], name="block", **around),
        helper.make_node("Add", ["c3", "c2"], ["sum"], name="residual"),
        helper.make_node("Conv", ["sum", "w4", "b4"], ["c4"], name="groups", group=2),
        helper.make_node("GlobalAveragePool", ["c4"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "w5", "b5"], ["y"], name="classifier", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 40])
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "network", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def images(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(count)]


def observed(graph: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> dict[str, object]:
    names = {str(output): 1 for node in graph.graph.node for output in node.output if output not in ("flat", "y")}
    return observe(graph, names, feeds)  # type: ignore[return-value]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu"])
def test_any_factors_leave_the_float_function_as_it_is(activation: str):
    whole = network(activation)
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
    assert all(
        not np.allclose(original[name], after[name]) for name in ("w0", "w1", "w2", "w3", "w4", "w5", "b0", "b3")
    )
    np.testing.assert_allclose(run(changed, images(3)), run(whole, images(3)), rtol=1e-4, atol=1e-5)


def test_the_papers_factors_make_both_ranges_the_geometric_mean():
    arrays = [numpy_helper.from_array(weight(seed, 6, 6, 1, 1), f"w{seed}") for seed in (1, 2)]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], name="one"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="two"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 6, 4, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "pair", values[:1], values[1:], arrays)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    first, second = (numpy_helper.to_array(array) for array in arrays)
    assert equalize(model, {}, "weights") == ["two"]
    weights = [constant(model.graph.initializers[name]) for name in ("w1", "w2")]
    # Equations 9 and 11: row i of the first, column i of the second.
    mean = np.sqrt(np.abs(first).max(axis=(1, 2, 3)) * np.abs(second).max(axis=(0, 2, 3)))
    np.testing.assert_allclose(np.abs(weights[0]).max(axis=(1, 2, 3)), mean, rtol=1e-5)
    np.testing.assert_allclose(np.abs(weights[1]).max(axis=(0, 2, 3)), mean, rtol=1e-5)


def test_a_clip_lets_only_through_what_it_does_not_cut_off():
    whole, feeds = network("Clip", uneven=6), images(16)
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
    assert (after[~reached] >= original[~reached] - 1e-5).all() and after[~reached] == pytest.approx(
        0.95 * 1.5, abs=1e-3
    )


def test_small_channels_get_more_levels():
    whole, fresh = network("Relu", uneven=40), images(8, seed=9)
    exact = run(whole, fresh)
    errors = {}
    for method in ("none", "activations"):
        settings = Int8Options(
            method="static", reduce_range=False, bias_correction=False, cross_layer_equalization=method
        )  # type: ignore[arg-type]
        graph = StaticQuantizer(whole, images(16), settings).quantize()
        errors[method] = float(np.square(run(graph, fresh) - exact).mean() / np.square(exact - exact.mean(0)).mean())
    assert errors["activations"] < 0.3 * errors["none"]


def test_a_graph_without_pairs_is_left_alone():
    model = ir.from_proto(network("HardSwish"))
    groups = find_channel_groups(model)
    assert [sorted(str(node.name) for node in group.readers) for group in groups] == [
        ["block", "groups"],
        ["classifier"],
    ]
