"""Tests of the browser target: predictions and transfer sizes are compared with those of the cpu target."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from tiny_run import LABELS, Notes, load, write_all, write_model

from compress.formats.model_file import model_file
from compress.formats.targets import TARGETS
from compress.pipeline.formats import unsupported_reason
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from compress.report.run_folder import read_predictions
from compress.results.report import Report

BENCHMARK = {"threads": 1, "budget_seconds": 1, "examples": 16, "batch_size": 8, "every_stage": False}
TIMINGS = ("runtime_download_ms", "runtime_compile_ms", "model_download_ms", "first_call_ms", "session_load_ms")


def value(report: Report, model: str, metric: str, target: str) -> float:
    row = report.find(model, metric, target)
    assert row is not None, (model, metric, target)
    return row.value


@pytest.mark.browser
@pytest.mark.slow
def test_browser_target_matches_cpu_predictions(tmp_path: Path, chromium: str) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with")
    stages, targets = ["onnx", "onnx_int8"], ["cpu", "browser"]
    path = write_all(tmp_path, stages=stages, targets=targets, benchmark=BENCHMARK, baseline="onnx")
    write_model(tmp_path / "model", LABELS)
    recipe = load(path)
    done = run(recipe, tmp_path, tmp_path / "artifacts", Notes())
    report = done.report
    assert not report.skipped
    # Sums in another order may move activations at the border of an 8-bit step to the neighbouring step.
    for model, near in (("baseline", 1e-5), ("final", 6e-3)):
        for metric in ("accuracy", "agreement", "latency_ms", "latency_ms_batch_8", "speedup", "startup_ms", "cpu_ms"):
            assert value(report, model, metric, "browser") > 0
        assert value(report, model, "accuracy", "browser") == value(report, model, "accuracy", "cpu")
        host_answers, browser_answers = (
            read_predictions(done.folder, model, target).answers for target in ("cpu", "browser")
        )
        assert host_answers.probability.std() > 0.01
        np.testing.assert_allclose(browser_answers.probability, host_answers.probability, atol=near)
        assert report.find(model, "transfer_bytes", "cpu") is None
        assert all(value(report, model, name, "browser") > 0 for name in TIMINGS)
        # The WebAssembly runtime is downloaded with the model and is loaded into memory before it.
        sent, model_sent = (value(report, model, f"{part}transfer_bytes", "browser") for part in ("", "model_"))
        assert sent - model_sent > 14e6
        memory = [value(report, model, name, "browser") for name in ("runtime_memory_bytes", "peak_memory_bytes")]
        assert 14e6 < memory[0] <= memory[1]
    shipped = model_file(done.folder / "model").stat().st_size
    assert shipped < value(report, "final", "model_transfer_bytes", "browser") < shipped + 1000
    runtime_settings = report.environment["runtime_settings"]["onnx_int8"]
    assert runtime_settings["runtime"] == "onnxruntime-web 1.30.0" and runtime_settings["cross_origin_isolated"] is True


@pytest.mark.parametrize("task", ["text-generation", "automatic-speech-recognition"])
def test_browser_and_node_skip_autoregressive_tasks(task: str) -> None:
    recipe = SimpleNamespace(task=task)
    for name in ("browser", "node"):
        reason = unsupported_reason(cast(Recipe, recipe), None, TARGETS[name], from_graph=False)
        assert reason == f"it runs one batch per call, and {task} generates token by token"


def test_browser_and_node_support_image_generation() -> None:
    recipe = SimpleNamespace(task="text-to-image", stages=[], baseline="start", labels=lambda: ["start"])
    for name in ("browser", "node"):
        assert unsupported_reason(cast(Recipe, recipe), None, TARGETS[name], from_graph=False) is None
