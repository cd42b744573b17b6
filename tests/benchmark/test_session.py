"""Tests of benchmark sessions on small classifiers: metrics, pairing, budgets and failing processes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_graphs import make_examples, write_classifier
from scipy import stats

from compress.benchmark.rounds import RoundTimes
from compress.benchmark.session import BenchmarkResult, measure_side_by_side, more_precise
from compress.benchmark.subprocess_client import WorkerProcess
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.utils.errors import DataError, InputError, ModelError, StageError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.alone
CPU = TARGETS["cpu"]
QUICK = Benchmark(threads=1, batch_size=8, seconds=0.2, examples=40)


def bench(
    artifacts: dict[str, Path], target: Target = CPU, count: int = 60, precision: float = 0.01, **changes: Any
) -> BenchmarkResult:
    examples, settings = dict.fromkeys(artifacts, make_examples(count)), QUICK.model_copy(update=changes)
    limits = {"seed": 1, "timeout_seconds": 60, "precision": precision}
    return measure_side_by_side(artifacts, examples, target, settings, "baseline", SilentProgress(), **limits)


@pytest.fixture(scope="module")
def round_log() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Return a log of every timed round: the model and the indices of its batches."""
    log: list[tuple[str, tuple[int, ...]]] = []
    genuine = WorkerProcess.round

    def spy(self: WorkerProcess, calls: list[int], timeout: float, untimed: int = 0) -> RoundTimes:
        # Warm-ups and probes have no untimed calls, or only calls of a single example.
        if untimed and len(set(calls)) > 1:
            log.append((self.label, tuple(calls)))
        return genuine(self, calls, timeout, untimed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerProcess, "round", spy)
        yield log


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, round_log: list[tuple[str, tuple[int, ...]]]) -> BenchmarkResult:
    """Measure a heavy model with 100 MB of unused embedding, a model with far less work, and a copy of the latter."""
    root = tmp_path_factory.mktemp("artifacts")
    heavy = write_classifier(root / "heavy", width=384, layers=12, extra_rows=100_000_000 // (4 * 384) + 1)
    light = write_classifier(root / "light", width=16, layers=1)
    shutil.copytree(light, root / "copy")
    return bench({"baseline": heavy, "onnx_int8": light, "final": root / "copy"})


def row(result: BenchmarkResult, model: str, metric: str) -> Measurement:
    (measurement,) = (r for r in result.measurements if (r.model, r.metric) == (model, metric))
    return measurement


def test_every_model_has_every_metric(result: BenchmarkResult) -> None:
    metrics = {
        model: [r.metric for r in result.measurements if r.model == model and "_length_" not in r.metric]
        for model in ("baseline", "onnx_int8", "final")
    }
    assert metrics["baseline"] == metrics["onnx_int8"] == metrics["final"]
    assert set(metrics["final"]) == {
        *("latency_ms", "latency_p90_ms", "latency_p99_ms", "latency_ms_batch_8", "throughput", "cpu_ms"),
        *("speedup", "speedup_batch_8"),
        *("startup_ms", "session_load_ms", "peak_memory_bytes", "peak_memory_bytes_batch_8"),
        "runtime_memory_bytes",
    }
    assert {r.target for r in result.measurements} == {"cpu"}


def test_speedup_is_the_geometric_mean_over_launches(result: BenchmarkResult) -> None:
    for metric in ("speedup", "speedup_batch_8"):
        measurement = row(result, "final", metric)
        # Launches whose rounds are all excluded because the machine was slowed give no ratio.
        assert measurement.raw is not None and 3 <= len(measurement.raw) <= result.environment["launches"]
        assert measurement.value == pytest.approx(stats.gmean(measurement.raw))
        logs = np.log(measurement.raw)
        low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
        assert (measurement.low, measurement.high) == pytest.approx((np.exp(low), np.exp(high)))


def test_reference_kernels_are_timed_in_every_launch(result: BenchmarkResult) -> None:
    product, copy = (row(result, "machine", f"reference_{name}_ms") for name in ("matmul", "copy"))
    assert product.n == copy.n >= result.environment["launches"]
    # 34 million operations and a copy of 64 MiB take more than a microsecond and less than a second.
    assert 0.001 < product.value < 1000
    assert 0.001 < copy.value < 1000


def test_cpu_time_of_one_thread_is_about_the_latency(result: BenchmarkResult) -> None:
    assert row(result, "baseline", "cpu_ms").value == pytest.approx(
        row(result, "baseline", "latency_ms").value, rel=0.5
    )


def test_model_with_less_work_is_faster(result: BenchmarkResult) -> None:
    speedup = row(result, "onnx_int8", "speedup")
    assert speedup.low is not None
    assert speedup.low > 2
    assert row(result, "baseline", "speedup").value == 1.0
    assert row(result, "onnx_int8", "latency_ms").value < row(result, "baseline", "latency_ms").value
    assert row(result, "onnx_int8", "throughput").value > row(result, "baseline", "throughput").value
    # The longest sentences need at least four times the operations of the shortest.
    by_length = [r.value for r in result.measurements if r.model == "baseline" and "_length_" in r.metric]
    assert by_length[0] < by_length[-1]


def test_equal_folders_are_measured_once(result: BenchmarkResult) -> None:
    assert set(result.environment["runtime_settings"]) == {"baseline", "onnx_int8"}
    for metric in ("latency_ms", "startup_ms", "speedup"):
        assert row(result, "final", metric).raw == row(result, "onnx_int8", metric).raw


def test_startup_time_includes_session_load_time(result: BenchmarkResult) -> None:
    for model in ("baseline", "onnx_int8"):
        start, load = row(result, model, "startup_ms"), row(result, model, "session_load_ms")
        assert start.n == load.n == result.environment["launches"]
        assert 6 <= start.n <= 12
        assert all(whole > part for whole, part in zip(start.raw or (), load.raw or (), strict=True))


def test_environment_records_runtime_settings(result: BenchmarkResult) -> None:
    assert result.environment["runtime_settings"]["baseline"]["provider"] == "CPUExecutionProvider"
    assert result.environment["threads"] == 1
    assert len(result.environment["pinned_cores"]) == 1
    assert result.environment["noise"]["verdict"] in ("quiet", "noisy", "unusable")
    assert result.notes[0].startswith("noise: ")


def test_peak_memory_includes_the_model(result: BenchmarkResult) -> None:
    """The 100 MB of embedding must count for the process that loaded it, and not for the other one."""
    large, small = (row(result, name, "peak_memory_bytes").value for name in ("baseline", "onnx_int8"))
    assert large - small >= 100_000_000
    assert 0 < small - row(result, "onnx_int8", "runtime_memory_bytes").value < 50_000_000


def test_models_run_in_alternating_order(result: BenchmarkResult, round_log: list[tuple[str, tuple[int, ...]]]) -> None:
    pairs = list(zip(round_log[::2], round_log[1::2], strict=True))
    assert len(pairs) >= result.environment["rounds"]["single"]
    for (first, calls), (second, same_calls) in pairs:
        assert {first, second} == {"baseline", "onnx_int8"}
        assert calls == same_calls
    firsts = [first for (first, _), _ in pairs]
    assert abs(firsts.count("baseline") - firsts.count("onnx_int8")) <= 2 + len(firsts) // 4


def test_sampling_stays_within_budget(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", width=64, layers=2)
    began = time.perf_counter()
    measured = bench({"baseline": folder}, precision=0.0, budget_seconds=3.0)
    # Twice the budget, because a busy machine stops later; a session that ignores its budget would never stop.
    assert time.perf_counter() - began < 6
    assert measured.environment["launches"] >= 2
    assert any("above the target of 0.0%" in note for note in measured.notes)


def test_requests_above_capacity_are_queued(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", width=384, layers=12)
    slow, fast = (bench({"baseline": folder}, precision=1.0, rate=rate, launches=2) for rate in (20.0, 5_000.0))
    latencies = [row(slow, "baseline", "latency_ms_rate_20"), row(fast, "baseline", "latency_ms_rate_5000")]
    assert latencies[1].value > 5 * latencies[0].value
    overloaded = [[note for note in one.notes if "exceed the throughput" in note] for one in (slow, fast)]
    assert list(map(len, overloaded)) == [0, 1]


def test_model_with_dead_process_is_excluded_and_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = WorkerProcess.round
    answers = iter(range(1_000_000))

    def dying(self: WorkerProcess, calls: list[int], timeout: float, untimed: int = 0) -> RoundTimes:
        if self.label == "final" and next(answers) == 20:
            os.kill(self.pid, signal.SIGKILL)
        return genuine(self, calls, timeout, untimed)

    monkeypatch.setattr(WorkerProcess, "round", dying)
    artifacts = {
        name: write_classifier(tmp_path / name, 16, layers) for layers, name in ((1, "baseline"), (2, "final"))
    }
    result = bench(artifacts)
    assert {r.model for r in result.measurements} == {"baseline", "machine"}
    assert set(result.environment["runtime_settings"]) == set(result.environment["warm_up_rounds"]) == {"baseline"}
    # In the launch that ended early, the baseline may not have been started yet.
    assert result.environment["launches"] - row(result, "baseline", "startup_ms").n in (0, 1)
    assert result.environment["launches"] >= 6
    (note,) = [note for note in result.notes if note.startswith("final could not be timed completely")]
    assert "was killed by SIGKILL" in note


def test_corrupt_model_is_reported_and_no_process_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []
    genuine = WorkerProcess.__init__

    def spy(self: WorkerProcess, label: str, **others: Any) -> None:
        genuine(self, label, **others)
        started.append(self)

    monkeypatch.setattr(WorkerProcess, "__init__", spy)
    good = write_classifier(tmp_path / "good", 8, 1)
    bad = write_classifier(tmp_path / "bad", 8, 1)
    (bad / "onnx" / "model.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot open the graph"):
        bench({"baseline": good, "final": bad})
    assert [child.label for child in started] == ["machine", "baseline", "final"]
    assert all(child._piped.process.returncode is not None for child in started)


def test_interrupt_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []

    def interrupted(self: WorkerProcess, *_: object, **__: object) -> Iterator[float]:
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerProcess, "round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench({"baseline": write_classifier(tmp_path / "m", 8, 1)})
    assert [child._piped.process.returncode for child in started] == [-9]


def test_invalid_benchmark_inputs_are_rejected(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", 8, 1)
    with pytest.raises(InputError, match="not among the models"):
        bench({"final": folder})
    with pytest.raises(StageError, match="'npu' is not available here"):
        bench({"baseline": folder}, target=Target("npu", "onnxruntime", "NoSuchProvider", "", "onnx"))
    with pytest.raises(DataError, match="no example"):
        bench({"baseline": folder}, count=0)
    with pytest.raises(ModelError, match="does not exist"):
        bench({"baseline": tmp_path / "nowhere"})


@pytest.mark.parametrize(("fields", "name"), [({}, "seconds"), ({"budget_seconds": 5}, "budget_seconds")])
def test_advice_on_wide_intervals_names_the_field_that_ends_the_session(fields: dict[str, float], name: str) -> None:
    advice = more_precise(Benchmark.model_validate(fields))
    assert advice == f"raise benchmark.{name} or reduce other load on the machine"
