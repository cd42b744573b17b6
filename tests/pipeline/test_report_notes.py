"""Tests of report notes on processors without VNNI and on sparse weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
from onnx import helper
from onnx_graphs import onnx_model

from compress.benchmark import machine
from compress.formats import target_profile
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.targets import TARGETS
from compress.pipeline.run import notes_on_other_recipe, with_absolute_paths
from compress.pipeline.warnings import processor_notes, sparse_notes
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.recipe import Recipe
from compress.report.run_folder import update_latest_link
from compress.results.report import Measurement


def recipe(*stages: str | dict[str, object], baseline: str = "start") -> Recipe:
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    given = {"name": "r", "task": "text-classification", "model": "m", "data": data, "baseline": baseline}
    return Recipe.model_validate({**given, "stages": stages})


def session(*stages: str) -> Any:
    quantized_recipe = recipe(*stages)
    return SimpleNamespace(
        runner=SimpleNamespace(recipe=quantized_recipe),
        target=TARGETS["cpu"],
        profile=SimpleNamespace(device=None),
        benchmark=quantized_recipe.benchmark,
    )


@pytest.mark.parametrize(
    ("kind", "stages", "has_note"),
    [
        ("x86-avx2", ("onnx", "onnx_int8"), True),
        ("x86-avx2", ("onnx",), False),
        ("x86-vnni", ("onnx", "onnx_int8"), False),
    ],
)
def test_note_compares_int8_and_float_speed_without_vnni(
    kind: str, stages: tuple[str, ...], has_note: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_profile, "processor_class", lambda: kind)
    rates = {("fp32", 128): [2.0], ("int8", 128): [3.0], ("fp32", 256): [1.0, 3.0], ("int8", 256): [2.0]}
    rates |= {("fp32", 512): [1.0], ("int8", 512): [1.2]}
    monkeypatch.setattr(machine, "product_rates", lambda arithmetic, rows, *_: rates[arithmetic, rows])
    notes = processor_notes(session(*stages))
    assert bool(notes) is has_note
    assert all("8-bit integers are 1.0 to 1.5 times as fast as those of float" in note for note in notes)


def save_matmul(folder: Path, zeros: int) -> Path:
    """Save a MatMul with an [8, 10] weight of which ``zeros`` values are 0; the zero bias must not be counted."""
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
def test_note_states_share_of_zero_weights_and_speedup(speed: tuple[float, ...], message: str, tmp_path: Path) -> None:
    artifacts = {"baseline": save_matmul(tmp_path / "dense", 0), "sparsify": save_matmul(tmp_path / "sparse", 20)}
    artifacts["onnx"] = save_matmul(tmp_path / "hardly", 3)
    value, low, high = speed
    rows = [Measurement(model="sparsify", metric="speedup", target="cpu", value=value, unit="", low=low, high=high)]
    (line,) = sparse_notes(recipe_with_stage(sparsify={"pattern": "2:4"}), artifacts, rows, TARGETS["cpu"])
    assert line.startswith("cpu: 25% of the weights of sparsify are zeros, which no kernel of onnxruntime skips")
    assert line.endswith(message)


def test_files_are_not_read_when_no_stage_sparsifies(tmp_path: Path) -> None:
    assert sparse_notes(recipe_with_stage(prune={"heads": 0.5}), {"prune": tmp_path / "gone"}, [], TARGETS["cpu"]) == []


def test_other_recipe_of_the_same_name_is_noted(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder = runs / "2026-12-01T10-00-00"
    folder.mkdir(parents=True)
    tiny_run.write_all(tmp_path)
    tiny = with_absolute_paths(read_recipe(tmp_path / "tiny.yaml"), tmp_path)
    assert notes_on_other_recipe(tiny, runs) == ()
    (folder / "recipe.yaml").write_text(dump_recipe(tiny))
    update_latest_link(folder)
    assert notes_on_other_recipe(tiny, runs) == ()
    other = tiny.model_copy(update={"model": "org/other"})
    (note,) = notes_on_other_recipe(other, runs)
    assert "used another model or other data" in note and str(runs) in note
