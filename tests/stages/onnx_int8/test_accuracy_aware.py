"""A floor on the metric: the layers that do damage go back to float, and few evaluations find them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.select_nodes import QuantizableLayer
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.stages.onnx_int8.accuracy_aware import agreement_with, rank, search
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

INNER, LAYERS, BAD = 32, 26, (3, 9, 16)


def network() -> onnx.ModelProto:
    """Products one after the other, of which those in `BAD` have an input channel that spoils a shared range."""
    generator = np.random.default_rng(0)
    nodes, arrays, previous = [], [], "x"
    for layer in range(LAYERS):
        weight = np.linalg.qr(generator.normal(size=(INNER, INNER)))[0].astype(np.float32)
        if layer in BAD:
            # One huge channel out of a bias, which the product after it ignores.
            weight[5] = 0
        arrays.append(numpy_helper.from_array(weight, f"w{layer}"))
        shift = np.zeros(INNER, np.float32)
        if layer + 1 in BAD:
            shift[5] = 4000
        arrays.append(numpy_helper.from_array(shift, f"b{layer}"))
        nodes.append(helper.make_node("MatMul", [previous, f"w{layer}"], [f"p{layer}"], name=f"layer_{layer}"))
        nodes.append(helper.make_node("Add", [f"p{layer}", f"b{layer}"], [f"y{layer}"], name=f"add_{layer}"))
        previous = f"y{layer}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INNER])
    y = helper.make_tensor_value_info(previous, TensorProto.FLOAT, ["rows", INNER])
    graph = helper.make_graph(nodes, "network", [x], [y], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(1).normal(size=(64, INNER)).astype(np.float32)}]


class Counted:
    """Agreement of the largest output with the float graph's, and how often it was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self._x = np.random.default_rng(2).normal(size=(400, INNER)).astype(np.float32)
        self._expected = self._answers(network())

    def _answers(self, graph: onnx.ModelProto) -> np.ndarray:
        import onnxruntime

        answers: np.ndarray = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"x": self._x})[0]
        return answers.argmax(axis=-1)

    def __call__(self, graph: onnx.ModelProto) -> float:
        self.asked += 1
        return float((self._answers(graph) == self._expected).mean())


def quantizer() -> StaticQuantizer:
    return StaticQuantizer(network(), feeds(), Int8Options(method="static", reduce_range=False, bias_correction=False))


@pytest.mark.full_range
def test_the_worst_layers_are_found_and_put_back():
    merit = Counted()
    outcome = search(network(), quantizer(), merit, 0.9, feeds(), 60, SilentProgress())
    assert set(outcome.kept) == {f"layer_{layer}" for layer in BAD}
    assert outcome.merit >= 0.9 and outcome.merit == merit(outcome.graph) and outcome.finished
    assert [damage.layer.name for damage in outcome.damages[:3]] == sorted(outcome.kept, key=list(outcome.kept).index)
    assert outcome.damages[2].error > 10 * outcome.damages[3].error
    operators = [node.op_type for node in outcome.graph.graph.node]
    assert operators.count("MatMul") == 3 and operators.count("MatMulIntegerToFloat") == LAYERS - 3
    rows = outcome.rows()
    assert [row[-1] for row in rows] == ["kept in float"] * 3 + ["int8"] * (LAYERS - 3)
    assert {row[0] for row in rows[:3]} == set(outcome.kept) and {row[3] for row in rows} == {3 * INNER * INNER}
    assert "3 of 26 layers in float" in outcome.verdict()


@pytest.mark.full_range
def test_it_needs_a_tenth_of_the_evaluations_of_a_search_one_layer_at_a_time():
    merit = Counted()
    outcome = search(network(), quantizer(), merit, 0.9, feeds(), 60, SilentProgress())
    ours = merit.asked
    assert outcome.evaluations + 1 == ours

    # A search that puts back, again and again, the layer that helps most tries every layer each time. It can't end
    # before its third round, since without any of the three the floor does not hold.
    judge, layer_quantizer = Counted(), quantizer()
    for missing in BAD:
        assert judge(layer_quantizer.quantize([f"layer_{layer}" for layer in BAD if layer != missing])) < 0.9
    one_at_a_time = 2 + LAYERS + (LAYERS - 1) + (LAYERS - 2)
    assert ours <= one_at_a_time / 10


def test_a_floor_that_holds_at_once_costs_one_evaluation():
    merit = Counted()
    outcome = search(network(), quantizer(), merit, 0.01, feeds(), 60, SilentProgress())
    assert merit.asked == 2 and outcome.kept == () and outcome.damages == () and outcome.passes == 0


@pytest.mark.full_range
def test_a_ceiling_on_the_error_needs_no_metric():
    layer_quantizer, asked = quantizer(), feeds()
    merit = agreement_with(network(), asked)
    both = (network(), layer_quantizer.quantize())
    float_answers, int8_answers = (open_session(graph).run(None, asked[0])[0].astype(float) for graph in both)
    error = np.sqrt(np.square(int8_answers - float_answers).mean()) / float_answers.std()
    assert merit(layer_quantizer.quantize()) == pytest.approx(1 - error) and error > 0.5
    outcome = search(network(), layer_quantizer, merit, 0.95, asked, 60, SilentProgress(), by_error=True)
    assert set(outcome.kept) == {f"layer_{layer}" for layer in BAD} and outcome.merit >= 0.95
    assert f"RMS error {1 - outcome.merit:.4f} on training examples (at most 0.0500)" in outcome.verdict()


def test_an_output_that_is_one_number_has_an_error_too():
    graph = network()
    graph.graph.node.append(onnx.helper.make_node("ReduceMean", [graph.graph.output[0].name], ["mean"], keepdims=0))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, []))
    assert agreement_with(graph, feeds())(graph) == 1.0


def test_a_floor_and_a_ceiling_are_one_too_many():
    with pytest.raises(ValidationError, match="accuracy_floor or error_ceiling, not both"):
        OnnxInt8(accuracy_floor=0.9, error_ceiling=0.1)
    assert OnnxInt8(error_ceiling=0.1).needs().splits == ("train",)
    assert OnnxInt8(error_ceiling=0.1, damage_examples=8).damage_examples == 8


class Spoiling:
    """A quantizer whose every layer spoils everything."""

    def __init__(self) -> None:
        self.layers = [QuantizableLayer(name, "MatMul", name, 1, -1) for name in ("layer_0", "layer_1")]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        graph = network()
        for tensor in graph.graph.initializer:
            if tensor.name in ("w0", "w1") and f"layer_{tensor.name[1]}" not in kept:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros((INNER, INNER), np.float32), tensor.name))
        return graph


def test_a_floor_that_no_layer_holds_is_an_error():
    with pytest.raises(StageError, match=r"No 8-bit layer keeps the metric at 99\.0%"):
        search(network(), Spoiling(), Counted(), 0.99, feeds(), 60, SilentProgress())


def test_damage_is_the_outputs_squared_change_over_their_variance():
    ranked = rank(network(), Spoiling(), feeds(), SilentProgress())
    x = feeds()[0]["x"].astype(np.float64)
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in network().graph.initializer}

    def output(gone: int | None) -> np.ndarray:
        y = x
        for layer in range(LAYERS):
            y = (0 if layer == gone else y @ arrays[f"w{layer}"]) + arrays[f"b{layer}"]
        return np.broadcast_to(y, (len(x), INNER))

    expected = output(None)
    for damage in ranked:
        change = output(int(damage.layer.name[-1])) - expected
        assert damage.error == pytest.approx(
            np.square(change).sum() / np.square(expected - expected.mean(0)).sum(), rel=1e-3
        )
