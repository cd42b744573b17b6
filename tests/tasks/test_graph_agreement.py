"""Tests of graphs without a task: inputs from files or at random, and the agreement of outputs with the baseline."""

from __future__ import annotations

from pathlib import Path

import foreign_graphs
import numpy as np
import pyarrow as pa
import pytest

from compress.data.columns import choose
from compress.data.config import DataConfig
from compress.data.source import locate_split, read
from compress.formats.onnx.import_onnx import import_graph
from compress.models.graph_inputs import GRAPH_INPUTS, GraphInput, GraphInputs, read_graph_inputs
from compress.tasks.graph_agreement import TASK
from compress.utils.errors import DataError

INPUTS = GraphInputs(
    (GraphInput("x", "float32", ("n", 3), (1, 3)), GraphInput("ids", "int64", (None,), (4,), below=10))
)


def table(folder: Path, config: DataConfig, split: str) -> pa.Table:
    location = locate_split(config, split, folder, lambda name: None)
    assert location is not None
    return choose(read(location, ["inputs"]), TASK.columns, {})


def test_random_inputs_are_reproducible_and_differ_between_splits(tmp_path: Path) -> None:
    config = DataConfig(splits={"train": "random:3", "test": "random:3"})
    first, again, other = (
        TASK.encode(table(tmp_path, config, split), INPUTS, None, 8) for split in ("train", "train", "test")
    )
    assert len(first) == 3 and "drawn at random" in first.note and "not accuracy" in first.note
    for row in range(3):
        batch = first.batch([row])
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "x": ("float32", (1, 3)),
            "ids": ("int64", (4,)),
        }
        assert (batch["x"] == again.batch([row])["x"]).all() and not (batch["x"] == other.batch([row])["x"]).any()
        assert batch["ids"].max() < 10


def test_files_are_read_by_input_name_and_checked(tmp_path: Path) -> None:
    (tmp_path / "calls").mkdir()
    x = np.arange(6, dtype=np.float64).reshape(2, 3)
    np.savez(tmp_path / "calls" / "one.npz", x=x, ids=np.array([1, 2], np.int32))
    config = DataConfig(splits={"test": "./calls"})
    examples = TASK.encode(table(tmp_path, config, "test"), INPUTS, None, 8)
    batch = examples.batch([0])
    assert (batch["x"] == x).all() and batch["x"].dtype == np.float32 and batch["ids"].dtype == np.int64
    assert "random" not in examples.note
    for arrays, words in (
        ({"x": x}, "no array for the input ids"),
        ({"x": x[:, :2], "ids": [1]}, r"has the shape \[2, 2\]"),
        ({"x": x, "ids": [0.5]}, "'ids' is float64"),
    ):
        np.savez(tmp_path / "calls" / "one.npz", **{name: np.asarray(array) for name, array in arrays.items()})
        with pytest.raises(DataError, match=words):
            TASK.encode(table(tmp_path, config, "test"), INPUTS, None, 8)
    (tmp_path / "calls" / "one.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(DataError, match="cannot be read"):
        TASK.encode(table(tmp_path, config, "test"), INPUTS, None, 8)


def test_graph_inputs_are_saved_beside_the_graph(tmp_path: Path) -> None:
    graph_inputs = import_graph(foreign_graphs.write(foreign_graphs.embedding(), tmp_path)).inputs
    (tmp_path / GRAPH_INPUTS).write_bytes(graph_inputs.as_json())
    assert read_graph_inputs(tmp_path) == graph_inputs


def test_outputs_are_compared_with_baseline() -> None:
    examples = TASK.encode(pa.table({"inputs": []}), INPUTS, None, 8)
    scores = [np.array([[1.0, 2.0, 0.0]]), np.array([[0.0, 1.0, 3.0]])]
    other = [scores[0], np.array([[3.5, 1.0, 3.0]])]
    reference, collected = (
        [TASK.collect({"scores": row, "count": np.array([7])}, examples, [0]) for row in side]
        for side in (scores, other)
    )
    joined, candidate = (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in (reference, collected)
    )
    rows = {row.metric: row.value for row in TASK.compare(candidate, joined, "final", "cpu")}
    spread = np.concatenate(scores).std()
    assert rows["agreement"] == 0.5
    assert rows["largest_error"] == pytest.approx(3.5 / spread)
    assert rows["rms_error"] == pytest.approx(np.sqrt(3.5**2 / 6) / spread)
    assert TASK.measure(candidate, None, "final", "cpu") == []
