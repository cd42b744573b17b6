"""One recipe, measured in every format that its targets run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import Notes, load, write_all

from compress.pipeline.run import run

STAGES = [{"finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-3}}, "export", "quantize"]


def test_a_model_is_measured_as_onnx_and_in_onnx_runtimes_format(tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=STAGES, targets=["cpu", "ort"]))
    report = run(recipe, tmp_path, tmp_path / "artifacts", Notes()).report
    assert not report.skipped
    for model in ("baseline", "export", "final"):
        here, there = (report.find(model, "accuracy", target) for target in ("cpu", "ort"))
        assert here is not None and there is not None
        # Dynamic INT8 is the same arithmetic in both.
        assert there.value == pytest.approx(here.value, abs=0.02)
        parameters = [report.find(model, "parameters", target) for target in ("cpu", "ort")]
        assert parameters[0] is not None and parameters[1] is not None
        assert parameters[0].value == parameters[1].value
    size = {target: report.find("final", "size_bytes", target) for target in ("cpu", "ort")}
    assert size["cpu"] is not None and size["ort"] is not None and size["cpu"].value != size["ort"].value
    speed = report.find("final", "speedup", "ort")
    assert speed is not None and speed.value > 0


def test_a_run_that_ends_in_that_format_ships_it(tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=[*STAGES, "ort"], targets=["cpu", "ort"]))
    done = run(recipe, tmp_path, tmp_path / "artifacts", Notes())
    assert (done.folder / "model" / "model.ort").is_file() and (done.folder / "model" / "tokenizer.json").is_file()
    assert [(one.target, "ORT" in one.reason) for one in done.report.skipped] == [("cpu", True)]
    found = {one.check: one.found for one in done.report.integrity if one.stage == "ort"}
    assert found["predictions"] == "finite and not constant"


def test_openvino_gets_eight_bits_of_its_own(tmp_path: Path) -> None:
    recipe = load(write_all(tmp_path, stages=STAGES, targets=[{"android": {"threads": 1}}, "openvino"], limits=[]))
    report = run(recipe, tmp_path, tmp_path / "artifacts", Notes()).report
    assert not report.skipped
    assert [note for note in report.notes if "nothing ran on an Android phone" in note]
    for model in ("baseline", "final"):
        here, there = (report.find(model, "accuracy", target) for target in ("android", "openvino"))
        assert here is not None and there is not None
        assert there.value == pytest.approx(here.value, abs=0.05)
    assert report.find("export", "accuracy", "openvino") is None
    sizes = [report.find(model, "size_bytes", "openvino") for model in ("baseline", "final")]
    assert sizes[0] is not None and sizes[1] is not None and sizes[1].value < sizes[0].value
    parameters = [report.find(model, "parameters", "openvino") for model in ("baseline", "final")]
    assert parameters[0] is not None and parameters[1] is not None
    assert parameters[1].value == pytest.approx(parameters[0].value, rel=0.01)
