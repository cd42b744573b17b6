"""A recipe under a launcher: two processes train together, one of them keeps the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    benchmark = {**tiny_run.BENCHMARK, "every_stage": False}
    recipe = tiny_run.write_all(tmp_path, stages=[*tiny_run.STAGES[:2], {"onnx": {}}], benchmark=benchmark)
    command = [*LAUNCHER, "-m", "compress", "run", str(recipe)]
    done = subprocess.run(
        command, cwd=tmp_path, env=tiny_run.surroundings(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    runs = [path for path in (tmp_path / "artifacts" / "runs" / "tiny").iterdir() if not path.is_symlink()]
    assert len(runs) == 1
    report = tiny_run.read_report(tmp_path / "artifacts")
    accuracies = {row["model"]: row["value"] for row in report["measurements"] if row["metric"] == "accuracy"}
    assert accuracies["baseline"] > 0.75
    # Each process took half of the batches: 15 steps of 4 rows each, where one process takes 30.
    assert "finetune (15 steps)" in (runs[0] / "run.log").read_text()

    again = tiny_run.compress("run", recipe, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(tiny_run.cached_stages(tiny_run.read_report(tmp_path / "artifacts")).values())
