"""Tests of the soak benchmarks: a minute of faults on a registry, and growth that must be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import soak_faults
import soak_nightly
from registry import write_run
from soak_faults import Soak
from soak_nightly import Sample

from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.utils.storage import digest_file

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_registry_under_faults_loses_no_acknowledged_write(tmp_path: Path) -> None:
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("no C compiler, or no Linux")
    command = [sys.executable, "-P", ROOT / "benchmarks" / "soak.py", "faults", "--faults", "40", "--minutes", "2"]
    folders = [str(ROOT), str(ROOT / "benchmarks")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "lost, corrupted, duplicated | 0, 0, 0" in done.stdout


def test_audit_names_lost_duplicated_and_corrupted_writes(tmp_path: Path) -> None:
    soak = Soak(tmp_path, soak_faults.random.Random(0))
    registry: Registry = soak.registry()
    for number in range(2):
        run = write_run(tmp_path / f"run-{number}", bytes([number]))
        version, _ = registry.register(run, "reviews", note=f"token-{number}")
        soak.digests[str(run)] = digest_file(run / "model" / "onnx" / "model.onnx")
        soak.acknowledged[f"token-{number}"] = {"operation": "register", "version": version.number}
    for reference in ("reviews@1", "reviews@2"):
        promote(registry, PromotionRequest(reference, why="token-twice"))
    soak.acknowledged["token-lost"] = {"operation": "promote", "version": 1}
    soak.acknowledged["token-1"]["version"] = 1
    registry.objects.path(soak.digests[str(tmp_path / "run-0")]).unlink()
    soak._audit_log()
    soak._audit_files()
    words = Counter(problem.partition(":")[0] for problem in soak.problems)
    assert words == {"lost": 1, "duplicated": 1, "corrupted": 2}, soak.problems


def test_growth_and_different_verdicts_are_problems() -> None:
    first = Sample(100, 1000, 1000, 5000, 10**8, 7, 2, 0, 1.0, ("a passed",))
    steady = [replace(first, history=100 * n, nights=1000 * n, runs=1000 * n) for n in range(1, 31)]
    assert soak_nightly.judge(steady) == (
        pytest.approx(
            {
                **{"history": 100, "work": 0, "resident": 0, "handles": 0, "threads": 0, "children": 0},
                **{"records": 2000, "late records": 2000},
            }
        ),
        [],
    )
    growing = {
        "work": [replace(sample, work=5000 + 200 * n) for n, sample in enumerate(steady)],
        "handles": [replace(sample, handles=7 + n // 20) for n, sample in enumerate(steady)],
        "resident": [replace(sample, resident=10**8 + 200_000 * n) for n, sample in enumerate(steady)],
        "faster and faster": [replace(sample, nights=1000 * n * n) for n, sample in enumerate(steady)],
        "differ": [*steady[:-1], replace(steady[-1], verdict=("a missed",))],
    }
    for word, samples in growing.items():
        (problem,) = soak_nightly.judge(samples)[1]
        assert word in problem
