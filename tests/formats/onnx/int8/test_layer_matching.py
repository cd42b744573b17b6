"""Where layers stand in a graph: side by side, several times, alike, or not at all; and which grids they share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.layer_matching import UNLIMITED, LayerMatch, grids, match_layers

GENERATOR = np.random.default_rng(0)
QUERY, KEY, OUT = (GENERATOR.normal(size=(6, 8)).astype(np.float32) for _ in range(3))


def graph(products: list[tuple[str, str, np.ndarray]]) -> ir.Model:
    """`MatMul` of a value's name with weights [inputs, outputs], giving the value named."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", [source, f"w{i}"], [gives], gives) for i, (source, gives, _) in enumerate(products)
    ]
    stored = [numpy_helper.from_array(np.ascontiguousarray(w), f"w{i}") for i, (_, _, w) in enumerate(products)]
    inputs = [value(name, TensorProto.FLOAT, None) for name in ("x", "z")]
    outputs = [value(gives, TensorProto.FLOAT, None) for _, gives, _ in products]
    proto = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_layers_side_by_side_are_found_in_their_order() -> None:
    model = graph([("x", "packed", np.concatenate([KEY, QUERY]).T), ("x", "other", OUT.T)])
    places = match_layers(model, {"query": QUERY, "key": KEY, "out": OUT})
    assert [(match.node, match.layers, match.reads) for match in places] == [
        ("packed", ("key", "query"), "x"),
        ("other", ("out",), "x"),
    ]
    shared = grids(places).inputs
    assert shared["key"] == shared["query"] == shared["out"], "they read one value"


def test_layers_that_are_alike_cut_or_changed_have_no_place() -> None:
    model = graph([("x", "alike", QUERY.T), ("x", "cut", KEY[:4].T), ("x", "scaled", OUT.T * 2)])
    weights = {"query": QUERY, "twin": QUERY.copy(), "key": KEY, "out": OUT}
    assert match_layers(model, weights) == []


def test_a_layer_in_two_places_has_one_grid_for_both() -> None:
    model = graph([("x", "once", QUERY.T), ("z", "twice", QUERY.T), ("z", "beside", KEY.T)])
    shared = grids(match_layers(model, {"query": QUERY, "key": KEY})).inputs
    assert shared["query"] == shared["key"]
    apart = graph([("x", "once", QUERY.T), ("z", "beside", KEY.T)])
    shared = grids(match_layers(apart, {"query": QUERY, "key": KEY})).inputs
    assert shared["query"] != shared["key"]


def test_a_layer_that_follows_a_convolution_in_one_place_only_has_a_grid_of_its_own() -> None:
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


def test_a_convolution_in_two_places_is_limited_where_both_are() -> None:
    places = [
        LayerMatch("a", ("a",), True, "x", None, (0.0, np.inf)),
        LayerMatch("b", ("a",), True, "y", None, UNLIMITED),
    ]
    assert set(grids(places).limits.values()) == {UNLIMITED}
