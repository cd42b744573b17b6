"""Notes on slow 8-bit graphs and on sparse weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import onnx_model

from compress.benchmark import machine, operator_difference, profiled_calls
from compress.benchmark.profile import CauseDifference, OperatorDifference
from compress.formats import target_profile
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.targets import TARGETS
from compress.pipeline.warnings import processor_notes, slow_int8_notes, sparse_notes
from compress.recipe.recipe import Recipe
from compress.results.report import Measurement
from compress.tasks.registry import get_task


def recipe(*stages: str | dict[str, object], baseline: str = "start") -> Recipe:
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    given = {"name": "r", "task": "text-classification", "model": "m", "data": data, "baseline": baseline}
    return Recipe.model_validate({**given, "stages": stages})


def session(folder: Path, *stages: str, target: str = "cpu") -> Any:
    quantized_recipe = recipe(*stages)
    inputs = SimpleNamespace(task=get_task(quantized_recipe.task), progress=None)
    runner = SimpleNamespace(inputs=inputs, recipe=quantized_recipe, progress=None)
    artifacts = {label: folder / label for label in ("baseline", "onnx", "final")}
    for artifact in artifacts.values():
        artifact.mkdir()
        (artifact / "model.onnx").touch()
    return SimpleNamespace(
        runner=runner,
        artifacts=artifacts,
        target=TARGETS[target],
        profile=SimpleNamespace(device=None),
        benchmark=quantized_recipe.benchmark,
        examples=lambda label: label,
    )


def speed(high: float, latency_ms: float = 4.0) -> list[Measurement]:
    return [
        Measurement(model="final", metric="speedup", target="cpu", value=0.5, unit="", low=0.4, high=high),
        Measurement(model="final", metric="latency_ms", target="cpu", value=latency_ms, unit="ms"),
    ]


def test_a_slow_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    causes = (
        CauseDifference(why="apart", help="do so", more_ms=2.0, layers=("a", "b"), operators=("MatMul", "MatMul")),
        CauseDifference(why="too little to be said", more_ms=0.01, layers=("a",), operators=("Cast",)),
    )
    difference = OperatorDifference(
        schema_version=1, float_file="e", int8_file="f", target="cpu", threads=1, batch_size=1, calls=1, passes=7,
        float_ms=2.0, int8_ms=4.0, faster=0.5, low=0.45, high=0.55, layers=(), causes=causes,
    )  # fmt: skip

    def compare(*arguments: Any) -> OperatorDifference:
        compared.append(arguments[:3])
        return difference

    monkeypatch.setattr(operator_difference, "compare_operators", compare)
    monkeypatch.setattr(profiled_calls, "batch_calls", lambda examples, size, seed: (examples, size))
    assert slow_int8_notes(session(tmp_path, "onnx", "onnx_int8"), speed(0.55)) == [
        "cpu: INT8 is slower than float: 0.50x as fast (0.45-0.55), 4.00 ms a call for 2.00 ms",
        "cpu: 2 ms more, 100% of the float file's time (MatMul in a, b): apart; what helps: do so",
    ]
    assert compared == [(tmp_path / "onnx", tmp_path / "final", ("final", 1))]


@pytest.mark.parametrize(
    ("stages", "measured", "target"),
    [
        (("onnx", "onnx_int8"), speed(1.01), "cpu"),
        (("onnx",), speed(0.9), "cpu"),
        (("onnx", "onnx_int8"), speed(0.9), "gpu"),
        (("onnx", "onnx_int8"), [], "cpu"),
        (("onnx", "onnx_int8"), speed(0.9, latency_ms=0.4), "cpu"),  # the runtime's own work takes as long
    ],
)
def test_nothing_is_profiled_where_it_is_not_slower_or_cannot_be(
    stages: tuple[str, ...], measured: list[Measurement], target: str, tmp_path: Path
) -> None:
    assert slow_int8_notes(session(tmp_path, *stages, target=target), measured) == []


def test_a_model_of_two_graphs_is_left_alone(tmp_path: Path) -> None:
    run_session = session(tmp_path, "onnx", "onnx_int8")
    for name in ("encoder_model.onnx", "decoder_model_merged.onnx"):
        (tmp_path / "final" / name).touch()
    assert slow_int8_notes(run_session, speed(0.5)) == []


@pytest.mark.parametrize(
    ("kind", "stages", "has_note"),
    [
        ("x86-avx2", ("onnx", "onnx_int8"), True),
        ("x86-avx2", ("onnx",), False),
        ("x86-vnni", ("onnx", "onnx_int8"), False),
    ],
)
def test_what_a_processor_without_vnni_costs_is_measured(
    kind: str, stages: tuple[str, ...], has_note: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_profile, "processor_class", lambda: kind)
    rates = {("fp32", 128): [2.0], ("int8", 128): [3.0], ("fp32", 256): [1.0, 3.0], ("int8", 256): [2.0]}
    rates |= {("fp32", 512): [1.0], ("int8", 512): [1.2]}
    monkeypatch.setattr(machine, "product_rates", lambda arithmetic, rows, *_: rates[arithmetic, rows])
    notes = processor_notes(session(tmp_path, *stages))
    assert bool(notes) is has_note
    assert all("8-bit integers are 1.0 to 1.5 times as fast as those of float" in note for note in notes)


def write(folder: Path, zeros: int) -> Path:
    """A product with a weight of 8 x 10, so many of whose values are zero, and a bias of zeros, which don't count."""
    weight = np.ones(80, dtype=np.float32)
    weight[:zeros] = 0
    tensors = {"w": weight.reshape(8, 10), "b": np.zeros(10, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])]
    graph = onnx_model(nodes, {"x": [None, 8]}, {"z": [None, 10]}, tensors)
    folder.mkdir()
    OnnxModel(graph, FLOAT_GRAPH, {"config.json": b"{}"}).save(folder)
    return folder


def recipe_with_stage(**stage: object) -> Recipe:
    return recipe("finetune", stage, "onnx", baseline="finetune")


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ((1.0, 0.97, 1.03), "it is 1.00 times as fast as the baseline, 0.97 to 1.03: they gain nothing"),
        ((1.01, 1.005, 1.015), "1.01 times as fast as the baseline, 1.00 to 1.01: they gain nothing"),
        ((1.5, 1.4, 1.6), "it is 1.50 times as fast as the baseline, 1.40 to 1.60"),
    ],
)
def test_zeros_are_counted_and_said_beside_the_speed(speed: tuple[float, ...], message: str, tmp_path: Path) -> None:
    artifacts = {"baseline": write(tmp_path / "dense", 0), "sparsify": write(tmp_path / "sparse", 20)}
    artifacts["onnx"] = write(tmp_path / "hardly", 3)
    value, low, high = speed
    rows = [Measurement(model="sparsify", metric="speedup", target="cpu", value=value, unit="", low=low, high=high)]
    (line,) = sparse_notes(recipe_with_stage(sparsify={"pattern": "2:4"}), artifacts, rows, TARGETS["cpu"])
    assert line.startswith("cpu: 25% of the weights of sparsify are zeros, which no kernel of onnxruntime skips")
    assert line.endswith(message)


def test_files_are_not_looked_at_where_no_stage_makes_zeros(tmp_path: Path) -> None:
    assert sparse_notes(recipe_with_stage(prune={"heads": 0.5}), {"prune": tmp_path / "gone"}, [], TARGETS["cpu"]) == []
