"""Tests of `compress compare` and `compress gate`: on a tiny run, on modified copies of it, and on broken input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_run
from onnx import helper, numpy_helper
from typer.testing import CliRunner, Result

from compress.cli import app
from compress.utils.errors import CompressError

STAGES = [{"finetune": {"epochs": 1, "batch_size": 4, "learning_rate": 2e-3}}, {"onnx": {}}, {"onnx_int8": {}}]
RULES = "rules:\n- {metric: accuracy, worse_by: 5 points}\n- {metric: size_bytes, worse_by: 0%}\n"


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which a tiny recipe with its own gate rules has been run."""
    folder = tmp_path_factory.mktemp("place")
    benchmark = {"threads": 1, "seconds": 0.1, "examples": 8, "batch_size": 4, "every_stage": False, "launches": 3}
    gate = {"rules": [{"metric": "size_bytes", "worse_by": "0%"}, {"metric": "accuracy", "worse_by": "5 points"}]}
    recipe = tiny_run.write_all(folder, stages=STAGES, benchmark=benchmark, gate=gate)
    done = tiny_run.compress("run", recipe, "--artifacts", folder / "artifacts", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(recipe_folder: Path) -> Path:
    return tiny_run.latest(recipe_folder / "artifacts")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result: Result) -> str:
    """Return the message of the expected error, whose exit code must be 2."""
    assert isinstance(result.exception, CompressError)
    assert result.exception.exit_code == 2
    return str(result.exception)


@pytest.fixture
def worse(run: Path, tmp_path: Path) -> Path:
    """Write a copy of the run's report with a larger file and an accuracy of 0, and return its path."""

    def spoil(row: dict[str, Any]) -> None:
        if row["model"] == "final" and row["metric"] == "size_bytes":
            row["value"] += 1
        if row["model"] == "final" and row["metric"] == "accuracy":
            row |= {"raw": [0.0] * row["n"], "value": 0.0, "low": 0.0, "high": 0.06}

    return changed(run, tmp_path / "worse.json", spoil)


def changed(run: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads((run / "report.json").read_text())
    for row in content["measurements"]:
        change(row)
    path.write_text(json.dumps(content))
    return path


def test_compare_run_with_its_own_baseline(run: Path) -> None:
    result = invoke("compare", run, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    changes = {change["metric"]: change for change in answer["changes"]}
    report = json.loads((run / "report.json").read_text())
    sizes = {row["model"]: row["value"] for row in report["measurements"] if row["metric"] == "size_bytes"}
    assert changes["size_bytes"]["effect"] == pytest.approx(sizes["final"] / sizes["baseline"] - 1)
    assert changes["size_bytes"]["verdict"] == "better"
    assert changes["accuracy"]["method"].startswith("paired on 60 examples")
    assert (answer["baseline"]["model"], answer["candidate"]["model"]) == ("baseline", "final")
    assert "launches" in changes["latency_ms"]["method"]


def test_gate_exit_code_is_0_when_passed_and_1_when_failed(run: Path, worse: Path) -> None:
    fine = invoke("gate", run, "--baseline", run)
    assert fine.exit_code == 0, fine.output
    assert "`gate:` of" in fine.stderr
    assert "Passed: 2 of 2." in fine.stdout
    failed = invoke("gate", worse, "--baseline", run, "--json")
    assert failed.exit_code == 1
    answer = json.loads(failed.stdout)
    assert answer["failed"] is True
    assert {j["metric"] for j in answer["judgements"] if j["status"] == "failed"} == {"accuracy", "size_bytes"}
    assert "policy: the defaults" in failed.stderr


def test_policy_file_replaces_gate_of_recipe(run: Path, worse: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(RULES.replace("0%", "50%").replace("5 points", "100 points"))
    result = invoke("gate", worse, "--baseline", run, "--policy", policy)
    assert result.exit_code == 0, result.output
    assert f"policy: {policy}" in result.stderr
    policy.write_text("rules: [{metric: accuracy}]")
    assert "rules.0.worse_by: found nothing" in message(invoke("gate", run, "--baseline", run, "--policy", policy))


def test_update_to_worse_baseline_requires_reason(run: Path, worse: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baselines" / "tiny.json"
    first = invoke("gate", run, "--baseline", baseline, "--update")
    assert first.exit_code == 0, first.output
    assert "the first baseline" in first.stdout
    assert baseline.stat().st_size < 50_000
    assert invoke("gate", run, "--baseline", baseline).exit_code == 0
    assert invoke("gate", worse, "--baseline", baseline).exit_code == 1
    baseline_text = baseline.read_text()
    refused = message(invoke("gate", worse, "--baseline", baseline, "--update"))
    assert "would lower the bar" in refused
    assert "size_bytes on cpu" in refused
    assert baseline.read_text() == baseline_text
    given = invoke("gate", worse, "--baseline", baseline, "--update", "--why", "a smaller price", "--json")
    assert given.exit_code == 0, given.output
    assert json.loads(given.stdout)["lowered"] == ["size_bytes", "accuracy"]
    assert json.loads(baseline.read_text())["origin"]["why"] == "a smaller price"
    assert invoke("gate", worse, "--baseline", baseline).exit_code == 0


def test_bad_input_is_rejected_with_message(run: Path, tmp_path: Path) -> None:
    assert "There is no report of" in message(invoke("compare", tmp_path / "nowhere"))
    assert "There is no model 'prune'" in message(invoke("compare", run, run, "--model", "prune"))
    assert "--why is the reason" in message(invoke("gate", run, "--baseline", run, "--why", "x"))
    assert "this is another file" in message(invoke("gate", run, "--baseline", run, "--update"))
    assert "this is another file" in message(invoke("gate", run, "--baseline", run / "report.json", "--update"))
    absent = message(invoke("gate", run, "--baseline", tmp_path / "absent.json"))
    assert "There is no such baseline" in absent and "--update" in absent
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "not JSON" in message(invoke("gate", run, "--baseline", broken))
    broken.write_text('{"schema": 99, "recipe": "x"}')
    assert "newer than this compress reads" in message(invoke("gate", run, "--baseline", broken))
    broken.write_text("[]")
    assert "names no schema" in message(invoke("compare", run, broken))
    assert "Two models are needed" in message(invoke("compare", run, "--now"))


@pytest.fixture
def slower(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's model with 20 extra MatMul nodes that do not change its logits."""
    folder = tmp_path / "slower"
    shutil.copytree(run / "model", folder)
    (path,) = folder.rglob("*.onnx")
    model = onnx.load(path)
    logits = model.graph.output[0].name
    for node in model.graph.node:
        for output_index, name in enumerate(node.output):
            if name == logits:
                node.output[output_index] = "logits_0"
    side = 700
    wide = numpy_helper.from_array(np.ones((1, side), np.float32), "wide")
    square = numpy_helper.from_array(np.ones((side, side), np.float32), "square")
    nothing = numpy_helper.from_array(np.zeros(1, np.float32), "nothing")
    model.graph.initializer.extend([wide, square, nothing])
    # The sum of the logits goes through 20 MatMuls and is then clamped to 0, so that only time is added.
    model.graph.node.extend(
        [
            helper.make_node("ReduceSum", ["logits_0"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["wide", "sum"], ["product_0"]),
            *(helper.make_node("MatMul", [f"product_{i}", "square"], [f"product_{i + 1}"]) for i in range(20)),
            helper.make_node("ReduceMax", ["product_20"], ["largest"], keepdims=0),
            helper.make_node("Min", ["largest", "nothing"], ["least"]),
            helper.make_node("Max", ["least", "nothing"], ["zero"]),
            helper.make_node("Add", ["logits_0", "zero"], [logits]),
        ]
    )
    onnx.save(model, path)
    return folder


def test_slower_model_is_worse_in_latency_and_size_but_not_accuracy(run: Path, slower: Path) -> None:
    recipe = run / "recipe.yaml"
    result = invoke(*("compare", run, slower, "--now", "--recipe", recipe, "--threads", "1", "--budget", "6", "--json"))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    changes = {change["metric"]: change for change in answer["changes"]}
    assert answer["how"] == "side by side"
    assert changes["latency_ms"]["verdict"] == "worse"
    assert changes["latency_ms"]["low"] > 1
    assert changes["latency_ms"]["method"].startswith("calls paired side by side")
    assert (changes["accuracy"]["effect"], changes["accuracy"]["n"], answer["flips"]) == (0.0, 60, [])
    assert changes["size_bytes"]["verdict"] == "worse"
