"""Tests of generation benchmarks: tokens compared with a numpy reference, and metrics with values by hand."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from decoder_graphs import TinyDecoder
from onnx_graphs import write_classifier

from compress.benchmark.generation import generation_rows, measure_generation, speedup_rows
from compress.benchmark.record import TimingRecord
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import GenerationTimes, TimedRounds
from compress.benchmark.session import BenchmarkResult
from compress.benchmark.subprocess_client import WorkerProcess
from compress.benchmark.workloads.text_generation import add_text_round, random_tokens
from compress.formats.targets import TARGETS
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.utils.errors import DataError, InputError, ModelError, StageError
from compress.utils.progress import SilentProgress

pytestmark = pytest.mark.alone
CPU = TARGETS["cpu"]
LIGHT = TinyDecoder(positions=512)
HEAVY = TinyDecoder(width=256, layers=4, heads=4, positions=512)
QUICK = Benchmark(contexts=(8, 256), tokens=6, threads=1, seconds=0.1)


def measure(
    artifacts: dict[str, Path],
    settings: Benchmark = QUICK,
    texts: dict[str, list[int]] | None = None,
) -> BenchmarkResult:
    limits = {"timeout_seconds": 60, "precision": 1.0}
    return measure_generation(artifacts, texts or {}, CPU, settings, "baseline", SilentProgress(), 3, **limits)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    """Measure a heavy decoder with a cache and a light one without."""
    root = tmp_path_factory.mktemp("decoders")
    return measure({"baseline": HEAVY.write(root / "heavy"), "artifact": LIGHT.write(root / "light", cache=False)})


def row(result: BenchmarkResult, model: str, metric: str) -> Measurement:
    (measurement,) = (r for r in result.measurements if (r.model, r.metric) == (model, metric))
    return measurement


def open_decoder(child: WorkerProcess, folder: Path, scratch: Path) -> None:
    np.savez(scratch / "nothing.npz")
    child.open(folder, CPU, 1, [0], scratch / "nothing.npz", 60)


def test_worker_generates_the_tokens_of_the_numpy_reference(tmp_path: Path) -> None:
    with WorkerProcess("final") as child:
        open_decoder(child, LIGHT.write(tmp_path / "m"), tmp_path)
        began = time.perf_counter()
        generated = child.generate([4, 8, 15], 5, timeout=60, untimed=2)
        elapsed_ms = 1e3 * (time.perf_counter() - began)
        alone = child.generate([16], 0, timeout=60)
    assert generated.tokens == LIGHT.continuation([4, 8, 15], 6)
    assert (len(generated.steps_ms), len(generated.disturbed)) == (5, 6)
    assert 0 < generated.first_ms + sum(generated.steps_ms) < elapsed_ms
    assert min(generated.steps_ms) > 0
    assert (generated.cached, generated.vocabulary) == (True, LIGHT.vocabulary)
    assert (alone.tokens, alone.steps_ms) == (LIGHT.continuation([16], 1), [])


def recorded() -> TimingRecord:
    """Return two launches of one round each, with a context of 100 tokens and two tokens after the first."""
    record = TimingRecord({"context_100": TimedRounds(), "steps_100": TimedRounds()})

    def generation(first_ms: float, *steps_ms: float) -> GenerationTimes:
        return GenerationTimes(first_ms, list(steps_ms), [False] * 3, [1, 2, 3], True, 50)

    add_text_round(record, 100, 0, {"a": generation(50.0, 10.0, 30.0), "b": generation(25.0, 5.0, 15.0)}, 1.0)
    add_text_round(record, 100, 1, {"a": generation(200.0, 20.0, 20.0), "b": generation(25.0, 40.0, 40.0)}, 1.0)
    return record


def test_latencies_are_medians_and_rates_are_tokens_per_time() -> None:
    rows = {r.metric: r for r in generation_rows(MeasurementWriter("final", "cpu", 0), recorded(), "a", 100)}
    assert rows["time_to_first_token_ms_context_100"].raw == (50.0, 200.0)
    assert rows["time_to_first_token_ms_context_100"].value == 125.0
    assert rows["time_per_output_token_ms_context_100"].raw == (10.0, 30.0, 20.0, 20.0)
    assert rows["time_per_output_token_ms_context_100"].value == 20.0
    # Two tokens in 40 ms, and again; a hundred tokens in 50 ms, then in 200.
    assert rows["tokens_per_second_context_100"].raw == (50.0, 50.0)
    assert rows["prefill_tokens_per_second_context_100"].raw == (2000.0, 500.0)
    assert rows["prefill_tokens_per_second_context_100"].value == 1250.0
    assert {r.unit for r in rows.values()} == {"ms", "tokens/s"}
    # Two launches are too few for a 95% interval of a median.
    assert {(r.low, r.high) for r in rows.values()} == {(None, None)}


def test_speedups_pair_the_same_step_of_the_same_round() -> None:
    first, steps = speedup_rows(MeasurementWriter("b", "cpu", 0), recorded(), "b", "a", 100)
    # The prompt: 50 / 25 and 200 / 25. Tokens: 10 / 5 and 30 / 15, then 20 / 40 twice.
    assert first.raw == (2.0, 8.0)
    assert first.value == pytest.approx(4.0)
    assert steps.raw == (2.0, 0.5)
    assert steps.value == pytest.approx(1.0)
    assert first.metric == "speedup_time_to_first_token_context_100"
    assert steps.metric == "speedup_time_per_output_token_context_100"
    assert speedup_rows(MeasurementWriter("a", "cpu", 0), recorded(), "a", "a", 100)[0].value == 1.0


def test_random_tokens_are_reproducible_and_from_mid_vocabulary() -> None:
    tokens = random_tokens(5000, 100, seed=1)
    assert set(tokens) == set(range(25, 75))
    assert tokens == random_tokens(5000, 100, seed=1) != random_tokens(5000, 100, seed=2)
    assert set(random_tokens(10, 1, seed=0)) == {0}


def test_every_model_has_every_metric(result: BenchmarkResult) -> None:
    by_context = (
        *("time_to_first_token_ms", "time_per_output_token_ms"),
        *("tokens_per_second", "prefill_tokens_per_second"),
        *("speedup_time_to_first_token", "speedup_time_per_output_token"),
    )
    for model in ("baseline", "artifact"):
        assert {r.metric for r in result.measurements if r.model == model} == {
            *(f"{name}_context_{context}" for name in by_context for context in (8, 256)),
            *("peak_memory_bytes", "startup_ms", "session_load_ms", "runtime_memory_bytes"),
        }
    assert {r.metric for r in result.measurements if r.model == "machine"} == {
        "reference_matmul_ms",
        "reference_copy_ms",
    }


def test_values_and_intervals_follow_from_raw_samples(result: BenchmarkResult) -> None:
    launches, rounds, slowed = (result.environment[name] for name in ("launches", "rounds", "slowed_rounds"))
    assert launches >= QUICK.launches
    for context in (8, 256):
        count = rounds[f"context_{context}"]
        assert count + slowed[f"context_{context}"] >= launches
        for metric, samples in (
            ("time_to_first_token_ms", count),
            ("time_per_output_token_ms", count * QUICK.tokens),
            ("tokens_per_second", count),
            ("prefill_tokens_per_second", count),
        ):
            one = row(result, "baseline", f"{metric}_context_{context}")
            assert one.raw is not None and one.low is not None and one.high is not None
            assert one.n == len(one.raw) == samples and one.value == np.median(one.raw)
            assert min(one.raw) <= one.low <= one.value <= one.high <= max(one.raw)


def test_longer_prompts_and_larger_models_are_slower(result: BenchmarkResult) -> None:
    """The long prompt has 32 times the tokens of the short one, and the heavy model about 256 times the weights."""
    times = {c: row(result, "baseline", f"time_to_first_token_ms_context_{c}").value for c in (8, 256)}
    assert times[256] > 4 * times[8]
    speedup = row(result, "artifact", "speedup_time_to_first_token_context_256")
    assert speedup.low is not None
    assert speedup.low > 2


def test_token_without_cache_costs_as_much_as_the_sequence(result: BenchmarkResult) -> None:
    def ratio(model: str) -> float:
        step, first = (
            row(result, model, f"{name}_ms_context_256").value
            for name in ("time_per_output_token", "time_to_first_token")
        )
        return step / first

    assert ratio("baseline") < 0.5 < ratio("artifact")
    assert result.environment["cached"] == {"baseline": True, "artifact": False}
    (note,) = [note for note in result.notes if "has no KV cache" in note]
    assert note.startswith("artifact ")


def test_notes_and_environment_describe_the_measurement(result: BenchmarkResult) -> None:
    assert result.notes[0].startswith("noise: ")
    assert any("token ids drawn at random" in note for note in result.notes)
    assert result.environment["prompts"] == "random"
    assert (result.environment["tokens"], result.environment["threads"]) == (6, 1)
    assert result.environment["runtime_settings"]["artifact"]["intra_op_threads"] == 1


def test_single_model_uses_its_text_and_has_no_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[tuple[int, ...]] = []
    genuine = WorkerProcess.generate

    def spy(self: WorkerProcess, ids: list[int], tokens: int, timeout: float, untimed: int = 0) -> GenerationTimes:
        prompts.append(tuple(ids))
        return genuine(self, ids, tokens, timeout, untimed)

    monkeypatch.setattr(WorkerProcess, "generate", spy)
    settings = Benchmark(contexts=(3, 2, 3), tokens=2, threads=1, seconds=0.01, launches=2)
    text = [11, 12, 13, 14]
    result = measure({"baseline": LIGHT.write(tmp_path / "m")}, settings, {"baseline": text})
    # The first prompt of each process is a single token.
    assert set(prompts) == {(0,), (11, 12), (11, 12, 13)}
    assert not [r for r in result.measurements if r.metric.startswith("speedup")]
    assert not [note for note in result.notes if "drawn" in note]
    assert list(result.environment["rounds"]) == ["context_2", "context_3"]


def test_dead_baseline_process_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = WorkerProcess.generate
    answers = iter(range(1_000_000))

    def dying(self: WorkerProcess, ids: list[int], tokens: int, timeout: float, untimed: int = 0) -> GenerationTimes:
        if self.label == "baseline" and next(answers) == 8:
            os.kill(self.pid, signal.SIGKILL)
        return genuine(self, ids, tokens, timeout, untimed)

    monkeypatch.setattr(WorkerProcess, "generate", dying)
    folders = {name: LIGHT.write(tmp_path / name) for name in ("baseline", "artifact")}
    with pytest.raises(StageError, match="was killed by SIGKILL"):
        measure(folders, Benchmark(contexts=(8,), tokens=2, threads=1, seconds=0.01, launches=2))


def test_invalid_generation_inputs_are_rejected(tmp_path: Path) -> None:
    folder = LIGHT.write(tmp_path / "m")
    (folder / "config.json").write_text('{"max_position_embeddings": 260}')
    with pytest.raises(InputError, match="256 and 5 tokens after it are more than"):
        measure({"baseline": folder}, Benchmark(contexts=(256,), tokens=5))
    with pytest.raises(DataError, match="The text has 3 tokens"):
        measure({"baseline": folder}, Benchmark(contexts=(4,)), {"baseline": [1, 2, 3]})
    with pytest.raises(ModelError, match="logits have the shape"):
        measure({"baseline": write_classifier(tmp_path / "classifier", 8, 1)})
