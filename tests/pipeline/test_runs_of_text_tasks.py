"""Tests of complete runs of further text tasks: the INT8 model against the float model, and a desktop bundle.

Each day tests a different subset of the tasks; other tests run a tiny recipe of each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rotation import todays
from tiny_run import BENCHMARK, compress, latest, read_report
from tiny_tasks import MAKERS, ROWS, write_all

from compress.results.report import BASELINE, FINAL

pytestmark = pytest.mark.slow

TRAINED = {"batch_size": 8, "learning_rate": 3e-3}
STAGES: list[Any] = [
    {"finetune": {"epochs": 2, **TRAINED}},
    {"prune": {"feed_forward": 0.25, "importance_examples": 16}},
    {"distill": {"teacher": "finetune", "epochs": 1, **TRAINED}},
    {"onnx": {}},
    {"onnx_int8": {"method": "static", "calibration_examples": 16}},
]
METRICS = {
    "token-classification": ("f1", "exact_match"),
    "text-ranking": ("ndcg_at_10", "accuracy"),
    "fill-mask": ("top_1_accuracy", "loss"),
    "question-answering": ("f1", "exact_match"),
}
SLICED = {"text-ranking": "accuracy", "question-answering": "exact_match"}


@pytest.fixture(scope="module", params=todays(MAKERS, 3, str))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the task's name and the artifacts folder of its run."""
    task: str = request.param
    folder = tmp_path_factory.mktemp(task)
    recipe = write_all(folder, task, STAGES, benchmark={**BENCHMARK, "every_stage": False})
    done = compress("run", recipe, "--artifacts", folder / "artifacts")
    assert done.returncode == 0, done.stderr
    return task, folder / "artifacts"


def test_quantized_text_model_is_evaluated_like_float_model(finished: tuple[str, Path]) -> None:
    task, artifacts = finished
    report = read_report(artifacts)
    rows = {(row["model"], row["metric"]): row for row in report["measurements"]}
    for metric in METRICS[task]:
        before, after = rows[BASELINE, metric], rows[FINAL, metric]
        assert before["low"] <= before["value"] <= before["high"]
        assert len(before["raw"]) == len(after["raw"])
        assert abs(sum(after["raw"]) / len(after["raw"]) - after["value"]) < 1e-6, "outcomes are what pairs are made of"
    assert rows[FINAL, "size_bytes"]["value"] < 0.5 * rows[BASELINE, "size_bytes"]["value"]
    sliced = SLICED.get(task, METRICS[task][0])
    assert sum(metric.startswith(f"{sliced}[characters=Q") for model, metric in rows if model == FINAL) == 4


def test_bundle_runs_without_compress(finished: tuple[str, Path], tmp_path: Path) -> None:
    _, artifacts = finished
    pytest.importorskip("compress.plugins.apps")
    bundle = tmp_path / "bundle"
    done = compress("bundle", latest(artifacts), "--target", "desktop", "--output", bundle)
    assert done.returncode == 0, done.stderr
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for arguments in (["--selftest"], []):
        command = [sys.executable, str(bundle / "examples" / "run.py"), *arguments]
        ran = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    assert sum(ROWS.values()) > 200
