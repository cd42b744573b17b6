"""The compared tools for timing an ONNX file, each in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.benchmark.session import measure_side_by_side
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.tasks.task import Examples
from compress.utils.errors import StageError
from compress.utils.progress import SilentProgress

_OPTIMUM_WARM_UP = 10
_TIMEOUT_SECONDS = 1200.0
_TAIL_LINES = 12


@dataclass(frozen=True)
class Setting:
    """Inputs of every tool: model folder, graph, one input (repeated, and as a file), and duration."""

    model: Path
    graph: Path
    examples: Examples
    batches: Path
    threads: int
    core: int
    runs: int
    seconds: float


def time_compress(setting: Setting) -> dict[str, Any]:
    """Time with one session of compress, of at least six processes."""
    result = measure_side_by_side(
        {"model": setting.model},
        {"model": setting.examples},
        TARGETS["cpu"],
        Benchmark(threads=setting.threads, batched=False, examples=len(setting.examples), seconds=setting.seconds),
        "model",
        SilentProgress(),
        seed=0,
    )
    (row,) = (row for row in result.measurements if (row.model, row.metric) == ("model", "latency_ms"))
    settings = result.environment["runtime_settings"]["model"]
    return {
        "onnxruntime": settings["runtime"].split()[-1],
        "p50_ms": row.value,
        "launches": result.environment["launches"],
        "notes": result.notes,
        "latencies_ms": list(row.raw or ()),
    }


def time_loop(setting: Setting) -> dict[str, Any]:
    """Time with the loop of `onnxruntime_perf_test`."""
    order = {
        "graph": str(setting.graph),
        "batches": str(setting.batches),
        "threads": setting.threads,
        "core": setting.core,
        "runs": setting.runs,
    }
    script = Path(__file__).with_name("perf_test.py")
    timing: dict[str, Any] = json.loads(
        _run_process([sys.executable, str(script), json.dumps(order)], dict(os.environ))
    )
    return timing


def time_optimum(setting: Setting, python: Path) -> dict[str, Any]:
    """Time with optimum-benchmark, in the interpreter of its environment."""
    order = {
        "model": str(setting.model),
        "threads": setting.threads,
        "core": setting.core,
        "length": int(setting.examples.lengths()[0]),
        "warm_up": _OPTIMUM_WARM_UP,
        "runs": setting.runs,
    }
    script = Path(__file__).with_name("optimum_run.py")
    # Without PYTHONPATH and access to the hub.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = [str(python), "-P", str(script), json.dumps(order), str(answer)]
        _run_process(command, {**variables, "HF_HUB_OFFLINE": "1"}, folder=scratch)
        timing: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return timing


def _run_process(command: Sequence[str], variables: dict[str, str], folder: str | None = None) -> str:
    """Run a process and return its standard output. Raises `StageError` if it fails or hangs."""
    script = next(Path(part).name for part in command if part.endswith(".py"))
    try:
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise StageError(f"{script} did not end within {_TIMEOUT_SECONDS:.0f} s and was stopped.") from None
    if done.returncode != 0:
        tail = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_TAIL_LINES:])
        raise StageError(f"{script} ended with exit code {done.returncode}. Its last output:\n{tail}")
    return done.stdout
