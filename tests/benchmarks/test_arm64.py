"""Operators taken apart, and what an emulated processor answers: small graphs, made-up departures, qemu."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from arm64 import (
    NEWEST,
    OLD,
    EmulatedArm,
    IsolatedNodes,
    arm_findings,
    differing_operators,
    find_emulated_arm,
    host_outputs,
    isolate_nodes,
)
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.int8.observers import stream_activations
from compress.utils.errors import StageError

ROWS, INNER, COLUMNS = 3, 70, 24


def product() -> onnx.ModelProto:
    """x -> 8-bit product -> float -> Softmax."""
    weight = np.random.default_rng(0).integers(-128, 128, (INNER, COLUMNS)).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "scale", "zero"], "quantize"),
        helper.make_node("MatMulInteger", ["bytes", "w", "zero"], ["sums"], "product"),
        helper.make_node("Cast", ["sums"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["floats"], ["y"], "softmax"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, INNER])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(ROWS, INNER)).astype(np.float32)}


@pytest.fixture
def apart(feed: dict[str, np.ndarray]) -> IsolatedNodes:
    return isolate_nodes(product(), feed)


def test_each_operator_answers_as_it_does_in_the_graph(apart: IsolatedNodes, feed: dict[str, np.ndarray]) -> None:
    (values,) = stream_activations(product(), ["bytes", "scale", "zero", "sums", "floats", "y"], [feed])
    answers = host_outputs(apart)
    assert set(answers) == {"answer_0_0", "answer_0_1", "answer_0_2", "answer_1_0", "answer_2_0", "answer_3_0"}
    np.testing.assert_array_equal(answers["answer_1_0"], values["sums"])
    np.testing.assert_array_equal(answers["answer_3_0"], values["y"])
    # No operator is another's input, so that one difference is not told twice.
    computed_names = {name for node in apart.graph.graph.node for name in node.output}
    assert not computed_names & {name for node in apart.graph.graph.node for name in node.input}


def test_the_operators_that_depart_are_named_with_how_far(apart: IsolatedNodes) -> None:
    """One sum in 72 is off by 300; a Softmax whose last bits differ is not worth a word."""
    host_answers = host_outputs(apart)
    changed_answers = {name: array.copy() for name, array in host_answers.items()}
    assert differing_operators(apart, host_answers, changed_answers) == []
    changed_answers["answer_1_0"][0, 5] += 300
    changed_answers["answer_3_0"] *= np.float32(1 + 2e-6)
    sums, softmax = differing_operators(apart, host_answers, changed_answers)
    assert (sums.operator, sums.name, sums.steps, sums.matters) == ("MatMulInteger", "product", 300, True)
    assert sums.share == pytest.approx(1 / (ROWS * COLUMNS))
    assert sums.error == pytest.approx(300 / np.sqrt(np.square(host_answers["answer_1_0"].astype(float)).sum()))
    assert (softmax.name, softmax.steps, softmax.matters) == ("softmax", None, False)
    assert softmax.error == pytest.approx(2e-6, rel=0.1)


@pytest.fixture
def emulator(tmp_path: Path) -> EmulatedArm:
    """In place of qemu: this machine's Python, which takes the same code and files."""
    script = tmp_path / "qemu"
    script.write_text(f'#!/bin/sh\nshift 5\nunset PYTHONHOME PYTHONPATH\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return EmulatedArm(str(script), tmp_path)


def test_an_emulator_is_given_the_graph_and_its_failure_is_told(
    emulator: EmulatedArm, feed: dict[str, np.ndarray]
) -> None:
    feeds = [feed, {"x": -feed["x"]}]
    answers = emulator.run(product(), feeds, optimize=True)
    for given, answer in zip(stream_activations(product(), ["y"], feeds), answers, strict=True):
        np.testing.assert_array_equal(answer["y"], given["y"])
    Path(emulator.emulator).write_text("#!/bin/sh\necho lost >&2\nexit 1\n")
    with pytest.raises(StageError, match="failed: lost"):
        emulator.run(product(), feeds, optimize=True)


def test_the_script_tells_what_an_emulated_processor_answers(
    emulator: EmulatedArm, feed: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers first, then a processor whose product is wrong."""
    onnx.save(product(), tmp_path / "model.onnx")
    operators, whole = arm_findings(tmp_path / "model.onnx", [feed], emulator)
    assert operators.level == whole.level == "ok"
    assert "operators answers as here on the same inputs" in operators.what
    assert "y of 1 examples differs by at most 0.0e+00 of its size" in whole.what and "in 1 of them" in whole.what
    genuine = EmulatedArm.run

    def wrong(arm: EmulatedArm, *given: Any, **options: Any) -> list[dict[str, np.ndarray]]:
        return [{name: array + 1 for name, array in arrays.items()} for arrays in genuine(arm, *given, **options)]

    monkeypatch.setattr(EmulatedArm, "run", wrong)
    operators, whole = arm_findings(tmp_path / "model.onnx", [feed], emulator)
    assert operators.level == whole.level == "warning"
    assert "the first operator that departs is DynamicQuantizeLinear quantize" in operators.what


@pytest.mark.slow
def test_arm_kernels_sum_bytes_as_integers_do(apart: IsolatedNodes) -> None:
    """Exact sums, by integers of 64 bits: no saturation on ARM."""
    arm = find_emulated_arm()
    if isinstance(arm, str):
        pytest.skip(arm)
    (arm_answers,) = arm.run(apart.graph, [apart.feed], optimize=False)
    weight = numpy_helper.to_array(product().graph.initializer[0]).astype(np.int64)
    sums = (apart.feed["bytes"].astype(np.int64) - int(apart.feed["zero"])) @ weight
    np.testing.assert_array_equal(arm_answers["answer_1_0"], sums)
    assert not any(departure.matters for departure in differing_operators(apart, host_outputs(apart), arm_answers))


@pytest.mark.slow
@pytest.mark.parametrize("processor", [NEWEST, OLD])
def test_dynamic_products_have_a_scale_for_each_row_on_an_arm_processor_with_sme(processor: str) -> None:
    """Rows of very different size: one scale for all of them, as here, is coarse for the small ones."""
    arm = find_emulated_arm()
    if isinstance(arm, str):
        pytest.skip(arm)
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (INNER, COLUMNS)).astype(np.int8)
    x = generator.normal(size=(ROWS, INNER)) * np.array([[0.1], [1], [3]])
    stored = {"w": weight, "s": np.full(COLUMNS, 0.01, np.float32), "z": np.zeros(COLUMNS, np.int8)}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *stored], ["y"], domain="com.microsoft")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    arrays = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], arrays), opset_imports=sets)
    graph.ir_version = 8
    (arm_answers,) = replace(arm, processor=processor).run(graph, [{"x": x.astype(np.float32)}], optimize=True)

    def rounded(values: np.ndarray) -> np.ndarray:
        low, high = min(values.min(), 0), max(values.max(), 0)
        scale = np.float32((high - low) / 255)
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale

    scaled = np.stack([rounded(row) for row in x]) if processor == NEWEST else rounded(x)
    np.testing.assert_allclose(arm_answers["y"], scaled @ (weight * 0.01), rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processor", [NEWEST, OLD])
def test_few_bit_products_round_their_inputs_by_blocks_here_and_otherwise_on_arm(processor: str) -> None:
    """accuracy_level 4: 8 bits for each block here; by other scales on a new ARM processor, not at all on an old."""
    arm = find_emulated_arm()
    if isinstance(arm, str):
        pytest.skip(arm)
    generator = np.random.default_rng(0)
    inner, outer, block = 576, 96, 64
    integers = generator.integers(0, 16, (outer, inner // block, block))
    scales = generator.uniform(0.01, 0.02, (outer, inner // block, 1)).astype(np.float32)
    x = generator.normal(size=(ROWS, inner)).astype(np.float32)
    weight = ((integers - 8) * scales).reshape(outer, inner)
    packed = (integers[..., 0::2] | integers[..., 1::2] << 4).astype(np.uint8)
    arrays = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales[..., 0], "s")]
    sizes = {"K": inner, "N": outer, "bits": 4, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **sizes)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], arrays), opset_imports=sets)
    graph.ir_version = 8
    (host_answers,) = stream_activations(graph, ["y"], [{"x": x}])
    (arm_answers,) = replace(arm, processor=processor).run(graph, [{"x": x}], optimize=True)
    steps = np.abs(x.reshape(ROWS, -1, block)).max(axis=-1, keepdims=True) / 127
    rounded = (np.rint(x.reshape(ROWS, -1, block) / steps) * steps).reshape(ROWS, inner)

    def error(values: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(np.square(values - expected).sum() / np.square(expected).sum()))

    assert error(host_answers["y"], rounded @ weight.T) < 1e-5
    assert 1e-3 < error(host_answers["y"], x @ weight.T) < 2e-2
    off = error(arm_answers["y"], x @ weight.T)
    assert 1e-3 < off < 3e-2 if processor == NEWEST else off < 1e-5
