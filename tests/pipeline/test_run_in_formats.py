"""Tests of one recipe measured as ONNX, ORT and OpenVINO files: metrics are compared between the formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import output_of
from tiny_run import Notes, load, write_all

from compress.formats.ort.model import read_ort
from compress.pipeline.artifact import outputs_of
from compress.pipeline.run import run
from compress.utils.errors import InputError

pytestmark = pytest.mark.slow

NORM = "bert.encoder.layer.0.output.LayerNorm.weight"
STAGES = [{"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}}, "onnx", "onnx_int8"]
PHONE = {"android": {"threads": 1, "max_bytes": 2000, "max_memory_bytes": 10**11}}


def diagnose(*options: str | Path) -> dict[str, Any]:
    """Return the JSON of `compress doctor`, which must exit with 0."""
    diagnosis: dict[str, Any] = json.loads(output_of("doctor", *options, "--json"))
    return diagnosis


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifacts folder that all recipes share: their first stages are equal and run only once."""
    return tmp_path_factory.mktemp("artifacts")


def test_onnx_and_ort_files_have_equal_accuracy(artifacts: Path, tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=STAGES, targets=["cpu", "ort"]))
    done = run(recipe, tmp_path, artifacts, Notes())
    report = done.report
    assert not report.skipped
    for model in ("baseline", "onnx", "final"):
        onnx_accuracy, ort_accuracy = (report.find(model, "accuracy", target) for target in ("cpu", "ort"))
        assert onnx_accuracy is not None and ort_accuracy is not None
        # Both formats use the same dynamic INT8 kernels.
        assert ort_accuracy.value == pytest.approx(onnx_accuracy.value, abs=0.02)
        parameters = [report.find(model, "parameters", target) for target in ("cpu", "ort")]
        assert parameters[0] is not None and parameters[1] is not None
        assert parameters[0].value == parameters[1].value
    size = {target: report.find("final", "size_bytes", target) for target in ("cpu", "ort")}
    assert size["cpu"] is not None and size["ort"] is not None and size["cpu"].value != size["ort"].value
    speed = report.find("final", "speedup", "ort")
    assert speed is not None and speed.value > 0
    diagnosis = diagnose(done.folder, "--target", "ort")
    assert diagnosis["answers"]["departures"] == [] and diagnosis["answers"]["worst"]["bits"] < 16
    assert diagnosis["findings"][0]["what"].startswith("ort: none of ") and diagnosis["findings"][0]["level"] == "ok"


def test_run_with_ort_stage_ships_ort_file(artifacts: Path, tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=[*STAGES, "ort"], targets=["cpu", "ort"]))
    done = run(recipe, tmp_path, artifacts, Notes())
    shipped = done.folder / "model" / "model.ort"
    assert shipped.is_file() and (done.folder / "model" / "tokenizer.json").is_file()
    assert [(skipped.target, "ORT" in skipped.reason) for skipped in done.report.skipped] == [("cpu", True)]
    findings = {check.check: check.found for check in done.report.integrity if check.stage == "ort"}
    assert findings["predictions"] == "finite and not constant"
    broken = tmp_path / "broken"
    shutil.copytree(shipped.parent, broken)
    content = bytearray(shipped.read_bytes())
    (norm,) = (tensor for tensor in read_ort(bytes(content), shipped).tensors if tensor.name == NORM)
    content[norm.start : norm.start + norm.bytes] = (norm.values(bytes(content)) * np.float32(2)).tobytes()
    (broken / "model.ort").write_bytes(content)
    recipe_file = done.folder / "recipe.yaml"
    with pytest.raises(InputError, match="There is no reference to compare the file with"):
        diagnose(broken, "--target", "ort", "--recipe", recipe_file)
    diagnosis = diagnose(
        broken, "--target", "ort", "--recipe", recipe_file, "--against", outputs_of(done.folder)["onnx"]
    )
    assert [departure["layer"] for departure in diagnosis["answers"]["departures"]] == [NORM.removesuffix(".weight")]
    assert (
        diagnosis["findings"][0]["level"] == "warning"
        and f"in {NORM.removesuffix('.weight')}" in diagnosis["findings"][0]["what"]
    )
    assert "differ from the reference" in diagnosis["findings"][0]["advice"]


def test_openvino_int8_file_is_smaller_and_as_accurate(artifacts: Path, tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=STAGES, targets=[PHONE, "openvino", "genai"], limits=[]))
    done = run(recipe, tmp_path, artifacts, Notes())
    report = done.report
    assert [(skipped.target, skipped.reason) for skipped in report.skipped] == [
        ("genai", "onnxruntime-genai runs text-generation only")
    ]
    assert [note for note in report.notes if "nothing ran on an Android phone" in note]
    size, memory = report.limits
    assert (size.metric, size.target, size.passed, size.missed) == ("shipped_bytes", "android", False, True)
    assert "without the runtime" in str(size.reason) and "biggest: onnx/model_quantized.onnx" in str(size.reason)
    assert (memory.metric, memory.passed) == ("peak_memory_bytes", True) and memory.value is not None
    assert 1e7 < memory.value < 1e11
    for model in ("baseline", "final"):
        android_accuracy, openvino_accuracy = (
            report.find(model, "accuracy", target) for target in ("android", "openvino")
        )
        assert android_accuracy is not None and openvino_accuracy is not None
        assert openvino_accuracy.value == pytest.approx(android_accuracy.value, abs=0.05)
    assert report.find("onnx", "accuracy", "openvino") is None
    sizes = [report.find(model, "size_bytes", "openvino") for model in ("baseline", "final")]
    assert sizes[0] is not None and sizes[1] is not None and sizes[1].value < sizes[0].value
    parameters = [report.find(model, "parameters", "openvino") for model in ("baseline", "final")]
    assert parameters[0] is not None and parameters[1] is not None
    assert parameters[1].value == pytest.approx(parameters[0].value, rel=0.01)
