from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx_graphs import make_examples, write_classifier

from compress.bench.child import Child
from compress.bench.session import STARTS, BenchResult, measure_together
from compress.errors import DataError, InputError, ModelError, StageError
from compress.measurement import Measurement
from compress.progress import SilentProgress
from compress.recipe import Benchmark
from compress.targets import TARGETS, Target

QUICK = Benchmark(threads=1, batch_size=8, seconds=0.2, examples=40)


def bench(artifacts: dict[str, Path], baseline: str = "baseline", target: Target = TARGETS["cpu"]) -> BenchResult:
    return measure_together(
        artifacts,
        dict.fromkeys(artifacts, make_examples(60)),
        target,
        QUICK,
        baseline,
        SilentProgress(),
        seed=1,
        timeout_seconds=60,
    )


@pytest.fixture(scope="module")
def asked() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Every round that a process was asked for: the model and the numbers of its batches."""
    log: list[tuple[str, tuple[int, ...]]] = []
    genuine = Child.round

    def spy(self: Child, calls: list[int], timeout: float, untimed: int = 0) -> list[float]:
        log.append((self.label, tuple(calls)))
        return genuine(self, calls, timeout, untimed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "round", spy)
        yield log


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, tuple[int, ...]]]) -> BenchResult:
    """A heavy model with 100 MB of unused embedding, one with far less work, and a copy of the latter."""
    root = tmp_path_factory.mktemp("artifacts")
    heavy = write_classifier(root / "heavy", width=384, layers=12, extra_rows=100_000_000 // (4 * 384) + 1)
    light = write_classifier(root / "light", width=16, layers=1)
    shutil.copytree(light, root / "copy")
    return bench({"baseline": heavy, "quantize": light, "final": root / "copy"})


def row(result: BenchResult, model: str, metric: str) -> Measurement:
    (found,) = (r for r in result.measurements if (r.model, r.metric) == (model, metric))
    return found


def test_every_model_has_every_metric(result: BenchResult) -> None:
    metrics = {
        model: [r.metric for r in result.measurements if r.model == model and "_length_" not in r.metric]
        for model in ("baseline", "quantize", "final")
    }
    assert metrics["baseline"] == metrics["quantize"] == metrics["final"]
    assert set(metrics["final"]) == {
        *("latency_ms", "latency_p90_ms", "latency_p99_ms", "latency_ms_batch_8", "throughput", "speedup"),
        *("startup_ms", "session_load_ms", "peak_memory_bytes", "peak_memory_bytes_batch_8"),
        "runtime_memory_bytes",
    }
    assert {r.target for r in result.measurements} == {"cpu"}


def test_raw_samples_give_the_reported_medians_and_tails(result: BenchResult) -> None:
    for model in ("baseline", "final"):
        for metric in (
            "latency_ms",
            "latency_ms_batch_8",
            "throughput",
            "speedup",
            "startup_ms",
            "session_load_ms",
        ):
            found = row(result, model, metric)
            if found.raw is None:
                assert (model, metric) == ("baseline", "speedup")
                continue
            assert found.value == np.median(found.raw)
            assert found.n == len(found.raw)
            assert found.low is not None
            assert found.high is not None
            assert min(found.raw) <= found.low <= found.value <= found.high <= max(found.raw)
        raw = row(result, model, "latency_ms").raw
        assert raw is not None
        assert row(result, model, "latency_p90_ms").value == pytest.approx(np.quantile(raw, 0.9))
        assert row(result, model, "latency_p99_ms").value == pytest.approx(np.quantile(raw, 0.99))


def test_length_buckets_share_out_the_same_calls(result: BenchResult) -> None:
    buckets = [r for r in result.measurements if r.model == "baseline" and "_length_" in r.metric]
    assert len(buckets) == 4
    pooled = sorted(sample for r in buckets for sample in r.raw or ())
    assert pooled == sorted(row(result, "baseline", "latency_ms").raw or ())
    bounds = [tuple(map(int, r.metric.rsplit("_", 2)[1:])) for r in buckets]
    assert [edge for bound in bounds for edge in bound] == sorted({edge for bound in bounds for edge in bound})


def test_much_less_work_is_faster(result: BenchResult) -> None:
    speedup = row(result, "quantize", "speedup")
    assert speedup.low is not None
    assert speedup.low > 2
    assert row(result, "baseline", "speedup").value == 1.0
    assert row(result, "quantize", "latency_ms").value < row(result, "baseline", "latency_ms").value
    assert row(result, "quantize", "throughput").value > row(result, "baseline", "throughput").value
    # The longest sentences make four and more times the products of the shortest.
    by_length = [r.value for r in result.measurements if r.model == "baseline" and "_length_" in r.metric]
    assert by_length[0] < by_length[-1]


def test_equal_folders_are_measured_once(result: BenchResult) -> None:
    assert set(result.environment["runtime_settings"]) == {"baseline", "quantize"}
    for metric in ("latency_ms", "startup_ms", "speedup"):
        assert row(result, "final", metric).raw == row(result, "quantize", metric).raw


def test_start_contains_the_loading(result: BenchResult) -> None:
    for model in ("baseline", "quantize"):
        start, load = row(result, model, "startup_ms"), row(result, model, "session_load_ms")
        assert start.n == load.n == STARTS
        assert all(whole > part for whole, part in zip(start.raw or (), load.raw or (), strict=True))


def test_the_environment_says_what_ran(result: BenchResult) -> None:
    assert result.environment["runtime_settings"]["baseline"]["provider"] == "CPUExecutionProvider"
    assert result.environment["threads"] == 1
    assert len(result.environment["pinned_cores"]) == 1
    assert result.environment["noise"]["verdict"] in ("quiet", "noisy", "unusable")
    assert result.notes[0].startswith("noise: ")


def test_memory_holds_the_model(result: BenchResult) -> None:
    """100 MB of embedding must be found in the process that opened it, and not in its neighbour."""
    large, small = (row(result, name, "peak_memory_bytes").value for name in ("baseline", "quantize"))
    assert large - small >= 100_000_000
    own = small - row(result, "quantize", "runtime_memory_bytes").value
    assert 0 < own < 50_000_000


def test_models_take_turns_in_alternating_order(result: BenchResult, asked: list[tuple[str, tuple[int, ...]]]) -> None:
    rounds = result.environment["rounds"]["batched"]
    starts = 2 * STARTS
    batched = asked[-starts - 2 * rounds : -starts]
    for number in range(rounds):
        (first, calls), (second, same_calls) = batched[2 * number : 2 * number + 2]
        assert (first, second) == (("baseline", "quantize") if number % 2 == 0 else ("quantize", "baseline"))
        assert calls == same_calls


def test_a_corrupt_model_is_reported_and_no_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Child] = []
    genuine = Child.__init__

    def spy(self: Child, label: str) -> None:
        genuine(self, label)
        started.append(self)

    monkeypatch.setattr(Child, "__init__", spy)
    good = write_classifier(tmp_path / "good", 8, 1)
    bad = write_classifier(tmp_path / "bad", 8, 1)
    (bad / "onnx" / "model.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot open the graph"):
        bench({"baseline": good, "final": bad})
    assert len(started) == 2
    assert all(child._process.returncode is not None for child in started)


def test_an_interrupt_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Child] = []

    def interrupted(self: Child, *_: object, **__: object) -> Iterator[float]:
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench({"baseline": write_classifier(tmp_path / "m", 8, 1)})
    assert [child._process.returncode for child in started] == [-9]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m", 8, 1)
    with pytest.raises(InputError, match="not among the models"):
        bench({"final": folder})
    with pytest.raises(StageError, match="'npu' is not to be had"):
        bench({"baseline": folder}, target=Target("npu", "onnxruntime", "NoSuchProvider", ""))
    with pytest.raises(DataError, match="no example"):
        measure_together(
            {"baseline": folder},
            {"baseline": make_examples(0)},
            TARGETS["cpu"],
            QUICK,
            "baseline",
            SilentProgress(),
            seed=0,
        )
    with pytest.raises(ModelError, match="does not exist"):
        bench({"baseline": tmp_path / "nowhere"})
