"""Tests of benchmark worker processes: requests, errors, memory and termination."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from imported import packages_imported_by
from onnx_graphs import make_examples, write_classifier

from compress.benchmark.subprocess_client import WorkerProcess
from compress.benchmark.worker import read_batches, write_batches
from compress.formats.targets import TARGETS
from compress.utils.errors import InputError, ModelError, StageError

CPU = TARGETS["cpu"]


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    examples = make_examples(3)
    write_batches(tmp_path / "batches.npz", [examples.batch([0]), examples.batch([1, 2])])
    return tmp_path / "batches.npz"


def gone(child: WorkerProcess) -> bool:
    return not Path(f"/proc/{child.pid}").exists()


def test_batches_survive_a_file_round_trip(batches: Path) -> None:
    examples = make_examples(3)
    for batch, expected in zip(read_batches(batches), [examples.batch([0]), examples.batch([1, 2])], strict=True):
        assert list(batch) == ["input_ids", "attention_mask"]
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


def test_worker_opens_a_model_times_calls_and_quits(tmp_path: Path, batches: Path) -> None:
    model = write_classifier(tmp_path / "model", 8, 1)
    with WorkerProcess("final") as child:
        opened = child.open(model, CPU, threads=1, cores=[0], batches=batches, timeout=60)
        assert opened["settings"]["intra_op_threads"] == 1
        began = time.perf_counter()
        latencies = child.round([0, 1, 1], timeout=60).latencies_ms
        elapsed_ms = 1e3 * (time.perf_counter() - began)
        assert len(latencies) == 3
        assert 0 < sum(latencies) < elapsed_ms
        assert Path(f"/proc/{child.pid}/status").read_text().split("Cpus_allowed_list:")[1].split()[0] == "0"
    assert gone(child)
    assert child._piped.process.returncode == 0


def test_memory_is_that_of_the_worker(tmp_path: Path, batches: Path) -> None:
    ballast = np.ones(50_000_000)
    with WorkerProcess("final") as child:
        child.open(write_classifier(tmp_path / "model", 8, 1), CPU, 1, [0], batches, 60)
        assert 10_000_000 < child.memory()["peak_bytes"] < ballast.nbytes


def test_worker_imports_only_numpy_and_onnxruntime(tmp_path: Path, batches: Path) -> None:
    model = write_classifier(tmp_path / "model", 8, 1)
    code = f"""
from compress.benchmark.worker import Worker
worker = Worker()
target = dict(name="cpu", runtime="onnxruntime", provider="CPUExecutionProvider", description="", format="onnx")
worker.open(dict(artifact={str(model)!r}, target=target, threads=1, cores=[], batches={str(batches)!r}))
worker.round(dict(calls=[0], untimed=1))
"""
    assert packages_imported_by(code) == {"compress", "numpy", "onnxruntime"}


def test_errors_of_the_worker_keep_their_type(tmp_path: Path, batches: Path) -> None:
    with WorkerProcess("final") as child, pytest.raises(ModelError, match="does not exist") as caught:
        child.open(tmp_path / "nowhere", CPU, 1, [0], batches, 60)
    assert caught.value.where == str(tmp_path / "nowhere")
    write_batches(batches, [{"pixel_values": np.zeros((1, 3))}])
    with WorkerProcess("final") as child:
        child.open(write_classifier(tmp_path / "model", 8, 1), CPU, 1, [0], batches, 60)
        with pytest.raises(InputError, match="lacks the model's input input_ids"):
            child.round([0], timeout=60)


@pytest.mark.parametrize(
    ("code", "words", "timeout"),
    [
        (
            "import sys; input(); sys.exit('the weights melted')",
            r"'prune' ended with exit code 1.*\nIts last output:\nthe weights melted",
            60,
        ),
        ("import os; input(); os.kill(os.getpid(), 9)", r"SIGKILL \(the system may have run out of memory\)", 60),
        ("raise SystemExit(7)", "exit code 7", 60),
        ("import time; time.sleep(600)", "did not answer 'memory' within 0 s", 0.1),
        ("input(); print('loading...')", "loading", 60),
    ],
)
def test_failed_worker_is_reported_with_the_reason(code: str, words: str, timeout: float) -> None:
    child = WorkerProcess("prune", [sys.executable, "-c", code])
    if "input" not in code and "sleep" not in code:
        child._piped.process.wait()
    with child, pytest.raises(StageError, match=words):
        child.request({"do": "memory"}, timeout=timeout)
    assert gone(child)


def test_worker_ends_when_its_parent_is_gone() -> None:
    """The parent's end of the pipe is closed however the parent ends."""
    command = [sys.executable, "-m", "compress.benchmark.worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0
