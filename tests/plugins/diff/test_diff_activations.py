"""Where a file departs from a graph of floats: the operator that errs by itself, not those behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.plugins.diff.activations import compare_files
from compress.utils.progress import SilentProgress

RANDOM = np.random.default_rng(1)
WEIGHTS = [RANDOM.standard_normal((16, 16)).astype(np.float32) for _ in range(3)]
BATCHES = [{"x": RANDOM.standard_normal((4, 16)).astype(np.float32), "more": np.zeros(1)} for _ in range(2)]


def graph(folder: Path, weights: list[np.ndarray]) -> Path:
    """Three products one after the other, each with a weight of a layer's name."""
    constants = [numpy_helper.from_array(weight, f"layer.{number}.weight") for number, weight in enumerate(weights)]
    nodes = [
        helper.make_node(
            "MatMul", ["x" if not number else f"y{number - 1}", constant.name], [f"y{number}"], name=f"m{number}"
        )
        for number, constant in enumerate(constants)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 16]) for name in ("x", "y2")]
    folder.mkdir()
    built = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(
        helper.make_model(built, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    return folder


def test_the_operator_that_errs_is_first_with_its_own_error(tmp_path: Path) -> None:
    file_before = graph(tmp_path / "a", WEIGHTS)
    after = graph(tmp_path / "b", [WEIGHTS[0], WEIGHTS[1] * np.float32(1.25), WEIGHTS[2]])
    comparison = compare_files(file_before, after, BATCHES, SilentProgress())
    assert comparison is not None
    assert comparison.first == "layer.1" and [module.module for module in comparison.modules] == ["layer.1"]
    given = np.concatenate([batch["x"] for batch in BATCHES]) @ WEIGHTS[0] @ WEIGHTS[1]
    assert comparison.error == pytest.approx(0.25 * np.sqrt((given**2).mean()) / given.std() / 1.0, rel=1e-3)
    same = compare_files(file_before, graph(tmp_path / "c", WEIGHTS), BATCHES, SilentProgress())
    assert same is not None and same.first is None and same.notes[0].startswith("0 of 3 operators")


def test_a_graph_whose_inputs_were_not_drawn_is_left_alone(tmp_path: Path) -> None:
    file_before = graph(tmp_path / "a", WEIGHTS)
    assert compare_files(file_before, file_before, [{"input_ids": np.zeros((1, 4))}], SilentProgress()) is None
