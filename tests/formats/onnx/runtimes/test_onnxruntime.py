from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes import onnxruntime as subject
from compress.formats.runtime import get_runtime, why_unavailable
from compress.formats.targets import TARGETS
from compress.utils.errors import InputError, ModelError, StageError

CPU = TARGETS["cpu"]


def write_linear(path: Path, weight: np.ndarray) -> Path:
    """y = x @ weight, for float32 x [n, rows of weight]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def test_a_folder_answers_as_numpy_does(tmp_path: Path, weight: np.ndarray) -> None:
    write_linear(tmp_path / "onnx" / "model_quantized.onnx", weight)
    session = get_runtime("onnxruntime").open(tmp_path, CPU, threads=1)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    outputs = session.predict({"x": x, "token_type_ids": np.zeros(4)})
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], x @ weight, rtol=1e-5)
    assert session.inputs == ("x",)
    assert session.provider == "CPUExecutionProvider"
    assert session.settings["intra_op_threads"] == 1


def test_a_missing_input_is_named(tmp_path: Path, weight: np.ndarray) -> None:
    session = subject.RUNTIME.open(write_linear(tmp_path / "m.onnx", weight), CPU, threads=1)
    with pytest.raises(InputError, match="lacks the model's input x"):
        session.predict({"input_ids": np.zeros((1, 3))})


@pytest.mark.parametrize("x", [np.zeros((1, 4), np.float32), np.zeros((1, 3), np.int64), np.zeros(3, np.float32)])
def test_a_wrong_shape_or_type_is_an_input_error(tmp_path: Path, weight: np.ndarray, x: np.ndarray) -> None:
    session = subject.RUNTIME.open(write_linear(tmp_path / "m.onnx", weight), CPU, threads=1)
    with pytest.raises(InputError, match="refuses the batch") as caught:
        session.predict({"x": x})
    assert "x tensor(float) ['n', 3]" in str(caught.value)


def test_a_folder_must_hold_exactly_one_graph(tmp_path: Path, weight: np.ndarray) -> None:
    with pytest.raises(ModelError, match=r"0 \.onnx files"):
        find_graph(tmp_path)
    write_linear(tmp_path / "onnx" / "model.onnx", weight)
    assert find_graph(tmp_path) == tmp_path / "onnx" / "model.onnx"
    write_linear(tmp_path / "onnx" / "decoder.onnx", weight)
    with pytest.raises(ModelError, match=r"2 \.onnx files \(onnx/decoder.onnx, onnx/model.onnx\)"):
        find_graph(tmp_path)


def test_an_absent_or_foreign_artifact_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        find_graph(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is no \.onnx file"):
        find_graph(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_graph_is_a_model_error(tmp_path: Path, weight: np.ndarray, share: float) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match="cannot open the graph"):
        subject.RUNTIME.open(path, CPU, threads=1)


def _without_weights(model: onnx.ModelProto, path: Path) -> None:
    onnx.save_model(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    path.with_name("weights.data").unlink()


def _of_tomorrow(model: onnx.ModelProto, path: Path) -> None:
    model.opset_import[0].version = 99
    onnx.save(model, path)


def _with_an_operator_of_its_own(model: onnx.ModelProto, path: Path) -> None:
    model.graph.node[0].op_type = "MyMatMul"
    onnx.save(model, path)


def _with_other_shapes(model: onnx.ModelProto, path: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("spoil", "said", "hint"),
    [
        (_without_weights, "external weights are missing: .*weights.data", "copy the folder"),
        (_of_tomorrow, "operator set is newer", "older `opset`"),
        (_with_an_operator_of_its_own, "unknown operator: MyMatMul", "custom operators"),
        (_with_other_shapes, "shapes contradict each other", "export the model again"),
    ],
)
def test_a_graph_that_does_not_open_says_why_and_what_to_do(
    tmp_path: Path, weight: np.ndarray, spoil: Callable[[onnx.ModelProto, Path], None], said: str, hint: str
) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    spoil(onnx.load(path), path)
    with pytest.raises(ModelError, match=said) as raised:
        subject.RUNTIME.open(path, CPU, threads=1)
    assert hint in (raised.value.hint or "") and raised.value.where == str(path)


def test_zero_threads_are_refused(tmp_path: Path, weight: np.ndarray) -> None:
    with pytest.raises(InputError, match="0 threads"):
        subject.RUNTIME.open(write_linear(tmp_path / "m.onnx", weight), CPU, threads=0)


def test_the_processor_is_always_to_be_had() -> None:
    assert why_unavailable(CPU) is None


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_an_absent_provider_is_refused_with_its_reason(tmp_path: Path, weight: np.ndarray) -> None:
    path = write_linear(tmp_path / "m.onnx", weight)
    assert "has no CUDAExecutionProvider" in (why_unavailable(TARGETS["gpu"]) or "")
    with pytest.raises(StageError, match="'gpu' is not to be had"):
        subject.RUNTIME.open(path, TARGETS["gpu"], threads=1)


def test_a_silent_fallback_is_refused(tmp_path: Path, weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package built with CUDA on a machine without a device: it lists CUDA and then takes the processor."""

    class FallingBack(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: object, sess_options: object = None, providers: object = None) -> None:
            super().__init__(model, sess_options, providers=["CPUExecutionProvider"])

    path = write_linear(tmp_path / "m.onnx", weight)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallingBack)
    subject._why_not.cache_clear()
    try:
        assert "does not start here" in (why_unavailable(TARGETS["gpu"]) or "")
        monkeypatch.setattr(subject.OnnxRuntime, "unavailable", lambda self, target: None)
        with pytest.raises(StageError, match="took CPUExecutionProvider in place of CUDAExecutionProvider"):
            subject.RUNTIME.open(path, TARGETS["gpu"], threads=1)
    finally:
        subject._why_not.cache_clear()


def test_naming_a_runtime_imports_none_of_it() -> None:
    code = "import sys, compress.formats.runtime; sys.exit('onnxruntime' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
