"""Timing session of models on the same examples, each model in its own processes, with interleaved rounds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.benchmark.noise import judge_noise
from compress.benchmark.record import TimingConditions
from compress.benchmark.restarts import LOCAL_HOST, BenchmarkHost, TimingResult, Workload, WorkloadPlan
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import batches_by_length, one_of_each_length, sample_by_length, slowed_rounds_note
from compress.benchmark.worker import write_batches
from compress.benchmark.workloads.calls import CallPlan
from compress.formats.runtime import refuse_unavailable
from compress.formats.target_profile import Target
from compress.recipe.recipe import Benchmark
from compress.results.report import MACHINE, Measurement
from compress.tasks.task import Examples
from compress.utils.errors import DataError, InputError
from compress.utils.progress import Progress
from compress.utils.storage import digest_directory

TIMING_VERSION = 5
"""Version of the measurements and their method. Cached timings of another version are not used."""
PRECISION = 0.01
"""Half the width of the 95% interval of a ratio of latencies at which sampling may stop."""
_EVALUATION_SHARE = 0.05
"""Share of a time budget that is reserved for the statistics."""


class SamplingLimits(NamedTuple):
    """Seed and limits of a session, by their names in `TimingConditions`."""

    seed: int
    timeout_seconds: float
    precision: float
    confidence: float


@dataclass(frozen=True)
class BenchmarkResult:
    """Measurements, notes for the reader, and the environment that they were taken in."""

    measurements: list[Measurement]
    notes: list[str]
    environment: dict[str, Any]


def measure_side_by_side(
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    target: Target,
    settings: Benchmark,
    baseline: str,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
    precision: float = PRECISION,
    confidence: float = 0.95,
    host: BenchmarkHost = LOCAL_HOST,
) -> BenchmarkResult:
    """Time every artifact on ``host`` on the same rows, and compare each with ``artifacts[baseline]``.

    Sets of fresh processes are launched, at least ``settings.launches`` and at most twice as many, until the ratio of
    every model to the baseline is known within ``precision`` at ``confidence``. Each launch samples its part of
    ``settings.seconds`` for each model and scenario. With ``settings.budget_seconds`` the session ends by then instead,
    and leaves out launches that no longer fit. Equal artifacts are measured once and reported under each label. A model
    whose process dies or hangs has no rows; a note says why, and the session goes on.

    Args:
        artifacts: Model folder or file by label.
        examples: The rows as each artifact's own processor encodes them, by label. Rows are sampled, and grouped by
            length, as the baseline's processor encodes them.
        target: Target that all models run on.
        settings: Benchmark settings of the recipe.
        baseline: Label of the baseline.
        progress: Progress display.
        seed: Seed of the random choices.
        timeout_seconds: Longest wait for one answer of a process.
        precision: Half the width of the interval of a ratio at which sampling stops.
        confidence: Confidence of that interval.
        host: Machine that the processes run on.

    Raises:
        InputError: The models have different numbers of examples, or the baseline is missing.
        DataError: There is no example.
        StageError: The target is unavailable, or the baseline's process died or hung.
    """
    began = time.perf_counter()
    check_host(artifacts, baseline, [target], host)
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"Different numbers of examples: {sorted(counts)}.", expected="the same rows for each")
    if counts == {0}:
        raise DataError("There is no example to time.", expected="at least one row in the test split")
    settings, unbatched = _batched_if_possible(settings, [examples[label] for label in artifacts])
    # Equal files would differ by noise only, so they share their times.
    timed_as = find_equal_artifacts(artifacts)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        lengths = examples[baseline].lengths()
        sampled = sample_by_length(lengths, settings.examples, seed)
        timed_artifacts = {name: artifacts[name] for name in timed_as.values()}
        workload = _write_workload(timed_artifacts, examples, lengths, sampled, settings, scratch)
        limits = SamplingLimits(seed, timeout_seconds, precision, confidence)
        timed, conditions = time_workload(workload, host, target, settings, timed_as[baseline], limits, began, progress)
    recording_seconds = examples[baseline].seconds
    seconds = None if recording_seconds is None else recording_seconds[sampled]
    # Rounds in which other work slowed the machine do not count. A note states how many.
    record, rows = timed.record.undisturbed(), []
    for label, name in timed_as.items():
        if name not in record.lost_models:
            writer = MeasurementWriter(label, conditions.target.name, seed)
            rows += writer.all(record, name, timed_as[baseline], lengths[sampled], settings, seconds)
    precise = "ratios of latencies", more_precise(settings)
    return build_result(
        timed, workload.plan, conditions, rows, [*_notes(timed, settings), *unbatched], precise, timed_as
    )


def more_precise(settings: Benchmark) -> str:
    """Return the advice on times whose intervals are too wide. It names the field that ended the session."""
    field = "seconds" if settings.budget_seconds is None else "budget_seconds"
    return f"raise benchmark.{field} or reduce other load on the machine"


def _batched_if_possible(settings: Benchmark, examples: Sequence[Examples]) -> tuple[Benchmark, list[str]]:
    """Return the settings without batches if the models' examples cannot be batched, and a note that says so."""
    unpaddable = [encoded.unpaddable_input for encoded in examples if encoded.unpaddable_input is not None]
    full_call = any(encoded.full_call for encoded in examples)
    if not settings.batched or not (full_call or unpaddable):
        return settings, []
    reason = "differ in shape from example to example, and can't be padded"
    notes = [] if full_call else [f"batches are not timed: {unpaddable[0]} {reason}"]
    return settings.model_copy(update={"batched": False}), notes


def check_host(artifacts: Mapping[str, Path], baseline: str, targets: Sequence[Target], host: BenchmarkHost) -> None:
    """Raise `InputError` for a missing baseline, and `StageError` for a target that is unavailable on ``host``."""
    if baseline not in artifacts:
        raise InputError(f"The baseline {baseline!r} is not among the models.", expected=", ".join(artifacts))
    for target in targets:
        refuse_unavailable(target, host.why_unavailable(target))


def time_workload(
    workload: Workload,
    host: BenchmarkHost,
    target: Target,
    settings: Benchmark,
    baseline: str,
    limits: SamplingLimits,
    began: float,
    progress: Progress,
) -> tuple[TimingResult, TimingConditions]:
    """Time a workload whose files are written, and return the result with the conditions.

    Args:
        workload: Models, batches and plan.
        host: Machine that the processes run on.
        target: Target of the session.
        settings: Benchmark settings of the recipe.
        baseline: Name of the baseline in the workload.
        limits: Seed and limits of the sampling.
        began: Time of `time.perf_counter` at which the session's time budget began.
        progress: Progress display.
    """
    budget = settings.budget_seconds
    conditions = TimingConditions(
        target=host.target(target),
        baseline=baseline,
        threads=settings.threads,
        launches=settings.launches,
        seconds=settings.seconds,
        batched=settings.batched,
        rate=settings.rate,
        seconds_left=None if budget is None else began + (1 - _EVALUATION_SHARE) * budget - time.perf_counter(),
        **limits._asdict(),
    )
    return host.time(workload, conditions, progress), conditions


def build_result(
    timed: TimingResult,
    plan: WorkloadPlan,
    conditions: TimingConditions,
    rows: Sequence[Measurement],
    own_notes: Sequence[str],
    precise: tuple[str, str],
    timed_as: Mapping[str, str],
    **own_environment: object,
) -> BenchmarkResult:
    """Return the measurements of all models and of the machine, and the conditions in which they were taken.

    Args:
        timed: Result of the session.
        plan: Plan of the session.
        conditions: Conditions of the session.
        rows: Measurements of the models.
        own_notes: Notes of this kind of session.
        precise: Name of what the session measures, and advice to measure it more precisely.
        timed_as: Label -> name of the model in the record.
        **own_environment: Further entries of the environment.
    """
    whole, record = timed.record, timed.record.undisturbed()
    deciding = [record.timings[name] for name in plan.deciding_timings]
    # The verdict uses all rounds that count, of all models together.
    noise = judge_noise(
        record.usage,
        {model: np.concatenate([rounds.relative_rounds(model) for rounds in deciding]) for model in deciding[0].times},
        timed.load,
        np.concatenate([rounds.product_ms for rounds in deciding]),
        record.frequencies_mhz,
        timed.environment["cores"],
        timed.environment["cores_granted"],
    )
    reported = {name: words for name, words in plan.reported.items() if words is not None}
    slowed = (slowed_rounds_note(whole.timings[name], record.timings[name], words) for name, words in reported.items())
    notes = [str(noise), *filter(None, slowed), *own_notes, *_shared_notes(timed, conditions, precise)]
    lost = [label for label, name in timed_as.items() if name in record.lost_models]
    notes += [f"{label} could not be timed completely: {record.lost_models[timed_as[label]]}" for label in lost]
    counted = {name: len(rounds.calls) for name, rounds in record.timings.items() if name in plan.reported}
    environment = {
        **timed.environment,
        "target": asdict(conditions.target),
        "threads": conditions.threads,
        "pinned_cores": list(timed.cores),
        "runtime_settings": record.settings,
        "launches": record.launches,
        "rounds": counted,
        "slowed_rounds": {name: len(whole.timings[name].calls) - count for name, count in counted.items()},
        "warm_up_rounds": {name: [one.rounds for one in warm_ups] for name, warm_ups in record.warm_ups.items()},
        "noise": {**asdict(noise), "reasons": list(noise.reasons)},
        **own_environment,
    }
    reference = MeasurementWriter(MACHINE, conditions.target.name, conditions.seed).reference(record.reference)
    return BenchmarkResult([*rows, *reference], notes, environment)


def _shared_notes(timed: TimingResult, conditions: TimingConditions, precise: tuple[str, str]) -> list[str]:
    record, granted, notes = timed.record, timed.environment["cores_granted"], []
    if conditions.threads > granted:
        notes.append(f"{conditions.threads} threads share the {granted} available cores")
    steadiness = {name: np.mean([one.steady for one in warm_ups]) for name, warm_ups in record.warm_ups.items()}
    if unsteady := [name for name, share in steadiness.items() if share < 0.5]:
        notes.append(f"times were not stable after most warm-ups: {', '.join(unsteady)}")
    if timed.precision > conditions.precision:
        quantity, hint = precise
        launches = f"{record.launches} launch{'es' if record.launches > 1 else ''}"
        target = f"above the target of {conditions.precision:.1%}"
        reached = f"the interval of {quantity} is {timed.precision:.1%}, {target}"
        if timed.precision == float("inf"):
            reached = f"{quantity} have no interval yet"
        notes.append(f"after {launches} {reached}; {hint}")
    return notes


def _write_workload(
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    lengths: np.ndarray,
    sampled: list[int],
    settings: Benchmark,
    scratch: str,
) -> Workload:
    """Write the batches of every model to disk, the same rows for each.

    Args:
        artifacts: Models that are timed.
        examples: Examples of each model.
        lengths: Lengths of the baseline's examples in tokens, [examples].
        sampled: Examples that are timed, in the order of their lengths.
        settings: Benchmark settings of the recipe.
        scratch: Folder for the files.
    """
    batches = batches_by_length(len(sampled), settings.batch_size) if settings.batched else []
    # Start-up is measured with the example of median length.
    middle = sampled[len(sampled) // 2]
    all_batches, first_batches = {}, {}
    for number, name in enumerate(artifacts):
        encoded = examples[name]
        all_batches[name] = Path(scratch) / f"{number}.npz"
        first_batches[name] = Path(scratch) / f"{number}-first.npz"
        write_batches(first_batches[name], [encoded.batch([middle])])
        groups = [[i] for i in sampled] + [[sampled[i] for i in batch] for batch in batches]
        write_batches(all_batches[name], [encoded.batch(group) for group in groups])
    singles, numbers = range(len(sampled)), range(len(sampled), len(sampled) + len(batches))
    plan = CallPlan(list(singles), list(numbers), one_of_each_length(lengths[sampled]))
    return Workload(artifacts, first_batches, all_batches, plan)


def _notes(timed: TimingResult, settings: Benchmark) -> list[str]:
    record, notes = timed.record, []
    # A runtime may reduce the number of threads, for example to the number of cores.
    counts = {name: one.get("intra_op_threads", settings.threads) for name, one in record.settings.items()}
    fewer = {name: count for name, count in counts.items() if count < settings.threads}
    if fewer:
        runtime = f"the runtime uses {next(iter(fewer.values()))}: {', '.join(fewer)}"
        notes.append(f"{settings.threads} threads were requested; {runtime}")
    if record.energy_unavailable is not None:
        notes.append(f"energy: skipped, {record.energy_unavailable}")
    if settings.rate is not None:
        overloaded = [name for name, latencies in record.server_ms.items() if _falls_behind(latencies, settings.rate)]
        if overloaded:
            notes.append(f"{settings.rate:g} requests per second exceed the throughput of: {', '.join(overloaded)}")
    return notes


def _falls_behind(launches: Sequence[Sequence[float]], rate: float) -> bool:
    """Return whether the queue grows.

    It grows if in most launches the last quarter waits longer than ten arrivals take, and twice as long as the first.
    """
    growing = 0
    for latencies in launches:
        quarter = max(1, len(latencies) // 4)
        first, last = np.median(latencies[:quarter]), np.median(latencies[-quarter:])
        growing += bool(last > 2 * first and last > 10_000 / rate)
    return 2 * growing > len(launches)


def find_equal_artifacts(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Return label -> the first label whose folder holds the same bytes, or that names the same file."""
    labels: dict[str, str] = {}
    timed_as = {}
    for label, path in artifacts.items():
        # A graph file may have its weights in another file, so that its own bytes decide nothing.
        key = digest_directory(path) if path.is_dir() else str(path.resolve())
        timed_as[label] = labels.setdefault(key, label)
    return timed_as
