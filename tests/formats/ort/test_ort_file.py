"""Tests of ONNX Runtime's ORT format: outputs are compared with the ONNX graph, and stored tensors are read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_graphs import write_classifier

from compress.formats.model_file import format_of, model_file
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.model import OnnxModel
from compress.formats.ort.model import OPERATORS_FILE, ORT_FILE, OrtGraph, OrtModel, read_ort
from compress.formats.ort.stage import to_ort
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.inspection.tensors import read_model
from compress.utils.errors import ModelError

IDS = {"input_ids": np.random.default_rng(1).integers(0, 100, (3, 7))}


@pytest.fixture(params=["float", "int8"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    file = model_file(write_classifier(folder, width=16, layers=2))
    if request.param == "int8":
        onnx.save(quantize_products(onnx.load(file), per_channel=True, reduce_range=False), file)
    return folder


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "written"
    folder.mkdir()
    to_ort(OnnxModel.load(source, "text-classification")).save(folder)
    return folder


def graph_of(folder: Path) -> OrtGraph:
    return read_ort((folder / ORT_FILE).read_bytes(), folder / ORT_FILE)


def logits_of(folder: Path, target: str) -> np.ndarray:
    return get_runtime("onnxruntime").open(folder, TARGETS[target], threads=1).predict(IDS)["logits"]


def test_logits_match_the_onnx_graph(source: Path, written: Path) -> None:
    assert format_of(written) == "ort" and model_file(written) == written / ORT_FILE
    np.testing.assert_allclose(logits_of(written, "ort"), logits_of(source, "cpu"), atol=1e-5)


def test_tensors_match_the_onnx_graph(source: Path, written: Path) -> None:
    expected = {part.name: numpy_helper.to_array(part) for part in onnx.load(model_file(source)).graph.initializer}
    stored_values = {part.name: part.values((written / ORT_FILE).read_bytes()) for part in graph_of(written).tensors}
    shared = expected.keys() & stored_values.keys()
    assert {"table", "head"} <= shared or len(shared) > 3
    for name in shared:
        assert stored_values[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(stored_values[name], expected[name])


def test_parameters_are_counted_as_in_the_graph(source: Path, written: Path) -> None:
    budget_before, after = budget_of(source), budget_of(written)
    assert after.format == "ort" and after.parameters == budget_before.parameters
    assert {name: share.parameters for name, share in after.dtypes.items() if share.parameters} == {
        name: share.parameters for name, share in budget_before.dtypes.items() if share.parameters
    }
    assert after.total_bytes == after.tensor_bytes + sum(after.overhead.values())
    for tensor in read_model(written).tensors:
        assert tensor.values().shape == tensor.shape


def test_operator_list_names_the_operators_of_the_graph(source: Path, written: Path) -> None:
    text = (written / OPERATORS_FILE).read_text()
    called = {node.op_type for node in graph_of(written).nodes}
    assert all(f"{operator}" in text for operator in called) and "#" not in text
    assert text.startswith("ai.onnx;")


def test_invalid_or_missing_ort_files_are_refused(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.ort"
    other.write_bytes(b"0000ONNXrest")
    with pytest.raises(ModelError, match="not in ONNX Runtime's format"):
        read_ort(other.read_bytes(), other)
    (written / ORT_FILE).write_bytes((written / ORT_FILE).read_bytes()[:600])
    with pytest.raises(ModelError, match="cannot be read"):
        OrtModel.load(written, "text-classification")
    (written / ORT_FILE).unlink()
    with pytest.raises(ModelError, match=r"0 \.ort files"):
        OrtModel.load(written, "text-classification")
