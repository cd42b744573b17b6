"""Tests of OpenVINO IR: outputs in OpenVINO are compared with ONNX Runtime, and invalid input is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_graphs import onnx_model, write_classifier

from compress.formats.model_file import format_of, model_file
from compress.formats.onnx.model import OnnxModel
from compress.formats.openvino.conversion import Precision, to_openvino
from compress.formats.openvino.model import IR_FILE, OpenVinoModel, read_tensors
from compress.formats.openvino.runtime import core
from compress.formats.runtime import TensorType, get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.budget import budget_of
from compress.utils.errors import InputError, ModelError, StageError

pytest.importorskip("openvino")
TARGET = TARGETS["openvino"]
IDS = {"input_ids": np.random.default_rng(1).integers(0, 100, (3, 7))}


def write(tmp_path: Path, precision: Precision = "fp32", table_bits: int = 8) -> tuple[Path, Path]:
    """Write an ONNX folder and its OpenVINO folder and return both paths."""
    source, folder = tmp_path / "source", tmp_path / "written"
    graph = onnx.load(model_file(write_classifier(source, width=64, layers=2)))
    folder.mkdir()
    to_openvino(graph, {"config.json": b"{}"}, precision, table_bits).save(folder)
    return source, folder


def logits_of(folder: Path, target: str) -> np.ndarray:
    profile = TARGETS[target]
    return get_runtime(profile.runtime).open(folder, profile, threads=1).predict(IDS)["logits"]


@pytest.mark.parametrize(("precision", "bits", "near"), [("fp32", 32, 1e-5), ("fp16", 16, 0.02), ("int8", 8, 0.1)])
def test_logits_match_the_onnx_graph_in_each_precision(
    tmp_path: Path, precision: Precision, bits: int, near: float
) -> None:
    source, folder = write(tmp_path, precision)
    assert format_of(folder) == "openvino" and model_file(folder) == folder / IR_FILE
    expected = logits_of(source, "cpu")
    np.testing.assert_allclose(logits_of(folder, "openvino"), expected, atol=near * np.abs(expected).max())
    budget, source_budget = budget_of(folder), budget_of(source)
    assert budget.format == "openvino" and budget.parameters == source_budget.parameters
    assert budget.total_bytes == budget.tensor_bytes + sum(budget.overhead.values())
    weights = sum(tensor.bytes for tensor in budget.tensors if tensor.role == "weight")
    assert weights * 8 == bits * budget.parameters


def test_embedding_table_has_4_bits_if_requested(tmp_path: Path) -> None:
    source, folder = write(tmp_path, "int8", table_bits=4)
    expected = logits_of(source, "cpu")
    np.testing.assert_allclose(logits_of(folder, "openvino"), expected, atol=0.3 * np.abs(expected).max())
    budget, table = budget_of(folder), table_of(source)
    assert budget.parameters == budget_of(source).parameters
    parameters = {kind: share.parameters for kind, share in budget.dtypes.items()}
    assert parameters["u4"] == table.size and parameters["uint8"] == budget.parameters - table.size
    large = [tensor.shape for tensor in budget.tensors if tensor.dtype == "u4" and tensor.bytes > 1000]
    assert large == [(len(table), 2, 32)]
    # 16 levels between the minimum and maximum of each 32 weights of a row; scales and zero points are rounded.
    groups = table.reshape(len(table), -1, 32)
    step = (groups.max(axis=-1) - groups.min(axis=-1)) / 15
    error = np.abs(rows_of(folder, np.arange(len(table))) - table).reshape(groups.shape).max(axis=-1)
    assert (error <= step * 1.02 + 1e-6).all() and error.mean() > step.mean() / 8


@pytest.mark.parametrize(("width", "group"), [(64, 64), (192, 192), (768, 256), (80, 32)])
def test_dynamic_quantization_group_is_the_largest_allowed(tmp_path: Path, width: int, group: int) -> None:
    source = tmp_path / "source"
    graph = onnx.load(model_file(write_classifier(source, width=width, layers=2)))
    to_openvino(graph, {"config.json": b"{}"}, "int8").save(tmp_path)
    # The group size is stored in the file and applies without further settings.
    assert core().compile_model(tmp_path / IR_FILE, "CPU").get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == group
    expected = logits_of(source, "cpu")
    np.testing.assert_allclose(logits_of(tmp_path, "openvino"), expected, atol=0.1 * np.abs(expected).max())


def rows_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Return the rows of the table from OpenVINO, by cutting the graph after the lookup."""
    import openvino

    model = core().read_model(folder / IR_FILE)
    gathers = [operation for operation in model.get_ordered_ops() if operation.get_type_name() == "Gather"]
    (gather,) = filter(is_of_ids, gathers)
    cut = openvino.Model([gather.output(0)], model.get_parameters(), "cut")
    rows = core().compile_model(cut, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"input_ids": ids[None]})
    return np.array(rows[0])[0]


def is_of_ids(gather: Any) -> bool:
    """Return whether token ids select the rows, directly or through a Convert node."""
    source = gather.input_value(1).get_node()
    while source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return bool(source.get_type_name() == "Parameter")


def test_constant_is_read_as_stored(tmp_path: Path) -> None:
    source, folder = write(tmp_path)
    (table,) = (tensor for tensor in read_tensors(folder / IR_FILE, folder) if tensor.name == "table")
    np.testing.assert_array_equal(table.values(), table_of(source))


def table_of(source: Path) -> np.ndarray:
    tensors = {tensor.name: tensor for tensor in onnx.load(model_file(source)).graph.initializer}
    return onnx.numpy_helper.to_array(tensors["table"])


def test_session_reports_inputs_and_settings(tmp_path: Path) -> None:
    _, folder = write(tmp_path)
    session = get_runtime("openvino").open(folder, TARGET, threads=2)
    assert session.input_types == {"input_ids": TensorType("int64", (None, None))}
    assert session.settings["intra_op_threads"] == 2 and session.settings["inference_precision_hint"] == "f32"
    with pytest.raises(InputError, match="lacks the model's input input_ids"):
        session.predict({"other": IDS["input_ids"]})
    with pytest.raises(StageError, match="failed on a batch"):
        session.predict({"input_ids": np.full((1, 3), "word")})


def test_incomplete_model_is_refused(tmp_path: Path) -> None:
    _, folder = write(tmp_path)
    weights = (folder / IR_FILE).with_suffix(".bin")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"ends at byte \d+ of"):
        budget_of(folder)
    with pytest.raises(ModelError, match="cannot open the IR"):
        get_runtime("openvino").open(folder, TARGET, threads=1)
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights of openvino_model\.xml are missing"):
        OpenVinoModel.load(folder, "text-classification")
    (folder / IR_FILE).write_text('<!DOCTYPE x [<!ENTITY a "b">]><net/>')
    weights.write_bytes(whole)
    with pytest.raises(ModelError, match="document type"):
        budget_of(folder)


def test_unsupported_operators_are_named() -> None:
    node = onnx.helper.make_node("QuickGelu", ["x"], ["y"], domain="nowhere")
    graph = onnx_model([node], {"x": [1, 4]}, {"y": [1, 4]}, domains=["nowhere"])
    with pytest.raises(StageError, match=r"OpenVINO cannot read the graph.*QuickGelu"):
        to_openvino(graph, {}, "fp32")


def test_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    graph = OnnxModel.load(write(tmp_path)[0], "text-classification").graph
    once, twice = (to_openvino(graph, {}, "int8", 4) for _ in range(2))
    assert once == twice


INTERRUPTED = """
import gc, os, signal, sys, time
from pathlib import Path
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
signal.signal(signal.SIGINT, signal.default_int_handler)
target = TARGETS["openvino"]
first, second = (get_runtime("openvino").open(Path(sys.argv[1]), target, threads=1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interrupt_after_closing_models_in_order_is_no_crash(tmp_path: Path) -> None:
    _, folder = write(tmp_path)
    program = [sys.executable, "-c", INTERRUPTED, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")
