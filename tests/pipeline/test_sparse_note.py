"""What a report says of zeros: counted in the files, beside the speed that was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.targets import TARGETS
from compress.pipeline.warnings import sparse_notes
from compress.recipe.recipe import Recipe
from compress.results.measurement import Measurement


def write(folder: Path, zeros: int) -> Path:
    """A product with a weight of 8 x 10, so many of whose values are zero, and a bias of zeros, which don't count."""
    weight = np.ones(80, dtype=np.float32)
    weight[:zeros] = 0
    tensors = [
        numpy_helper.from_array(weight.reshape(8, 10), "w"),
        numpy_helper.from_array(np.zeros(10, np.float32), "b"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])]
    values = [helper.make_tensor_value_info(name, 1, [None, width]) for name, width in (("x", 8), ("z", 10))]
    graph = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors))
    folder.mkdir()
    OnnxModel(graph, FLOAT_GRAPH, {"config.json": b"{}"}).save(folder)
    return folder


def recipe(**stage: object) -> Recipe:
    data = {"splits": {"train": "train.csv", "test": "test.csv"}}
    stages = [{"finetune": {}}, stage, {"onnx": {}}]
    given = {"name": "r", "task": "text-classification", "model": "m", "data": data, "baseline": "finetune"}
    return Recipe.model_validate({**given, "stages": stages})


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        ((1.0, 0.97, 1.03), "it is 1.00 times as fast as the baseline, 0.97 to 1.03: they gain nothing"),
        ((1.01, 1.005, 1.015), "1.01 times as fast as the baseline, 1.00 to 1.01: they gain nothing"),
        ((1.5, 1.4, 1.6), "it is 1.50 times as fast as the baseline, 1.40 to 1.60"),
    ],
)
def test_zeros_are_counted_and_said_beside_the_speed(speed: tuple[float, ...], said: str, tmp_path: Path) -> None:
    artifacts = {"baseline": write(tmp_path / "dense", 0), "sparsify": write(tmp_path / "sparse", 20)}
    artifacts["onnx"] = write(tmp_path / "hardly", 3)
    value, low, high = speed
    rows = [Measurement(model="sparsify", metric="speedup", target="cpu", value=value, unit="", low=low, high=high)]
    (line,) = sparse_notes(recipe(sparsify={"pattern": "2:4"}), artifacts, rows, TARGETS["cpu"])
    assert line.startswith("cpu: 25% of the weights of sparsify are zeros, which no kernel of onnxruntime skips")
    assert line.endswith(said)


def test_files_are_not_looked_at_where_no_stage_makes_zeros(tmp_path: Path) -> None:
    assert sparse_notes(recipe(prune={"heads": 0.5}), {"prune": tmp_path / "gone"}, [], TARGETS["cpu"]) == []
