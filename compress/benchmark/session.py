"""Models measured together: one session, one machine, each in processes of its own, taking turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.host import LOCAL_HOST, BenchmarkHost, TimingResult
from compress.benchmark.noise import judge_noise
from compress.benchmark.record import TimingConditions
from compress.benchmark.restarts import Workload, WorkloadPlan
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import slowed_rounds_note
from compress.benchmark.scenarios import batches_by_length, one_of_each_length, sample_by_length
from compress.benchmark.worker import write_batches
from compress.benchmark.workloads.calls import CallPlan
from compress.formats.target_profile import Target
from compress.recipe.recipe import Benchmark
from compress.results.measurement import MACHINE, Measurement
from compress.tasks.task import Examples
from compress.utils.digests import digest_directory
from compress.utils.errors import DataError, InputError, StageError
from compress.utils.progress import Progress

TIMING_VERSION = 5
"""Of what is measured and how; kept timings of another version are not used."""
PRECISION = 0.01
"""Half the width of the 95% interval of a ratio of latencies at which sampling may stop."""
_EVALUATION_SHARE = 0.05
"""The part of a time budget that is kept for the statistics."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The rows, what a reader must know about them, and where they were taken."""

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
    """Time every artifact at ``place``, on the same rows, and compare each with ``artifacts[baseline]``.

    ``examples[label]`` are those rows as that artifact's own processor encodes them; rows are drawn, and told apart
    by length, as the baseline's processor encodes them.

    Fresh sets of processes are launched, ``settings.launches`` at least and twice as many at most, until the ratio of
    every model to the baseline is known within ``precision`` at ``confidence``; each launch samples its part of
    ``settings.seconds`` for each model and scenario. With ``settings.budget_seconds`` the session ends by then
    instead, launches that no longer fit left out. Equal artifacts are measured once and reported under each label.
    ``timeout_seconds`` bounds one answer of a process: a model whose process dies or hangs has no rows, a note says
    why, and the others go on. Raises `StageError` where that is the baseline or the target is not to be had, and what
    opening a model raises.
    """
    began = time.perf_counter()
    check_host(artifacts, baseline, [target], host)
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"The models' examples differ in number: {sorted(counts)}.", expected="the same rows for each")
    if counts == {0}:
        raise DataError("There is no example to time.", expected="at least one row in the test split")
    settings, unbatched = _batched_if_possible(settings, [examples[label] for label in artifacts])
    timed_as = find_equal_artifacts(artifacts)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        lengths = examples[baseline].lengths()
        drawn = sample_by_length(lengths, settings.examples, seed)
        names = list(dict.fromkeys(timed_as.values()))
        workload = _write_workload(
            {name: artifacts[name] for name in names}, examples, lengths, drawn, settings, scratch
        )
        conditions = TimingConditions(
            target=host.target(target),
            baseline=timed_as[baseline],
            threads=settings.threads,
            launches=settings.launches,
            seconds=settings.seconds,
            precision=precision,
            confidence=confidence,
            seed=seed,
            timeout_seconds=timeout_seconds,
            batched=settings.batched,
            rate=settings.rate,
            seconds_left=seconds_left(settings.budget_seconds, began),
        )
        timed = host.time(workload, conditions, progress)
    heard = examples[baseline].seconds
    seconds = None if heard is None else heard[drawn]
    record, rows = timed.record.undisturbed(), []
    for label, name in timed_as.items():
        if name not in record.lost_models:
            writer = MeasurementWriter(label, conditions.target.name, seed)
            rows += writer.all(record, name, timed_as[baseline], lengths[drawn], settings, seconds)
    precise = "ratios of latencies", "raise benchmark.seconds or quieten the machine"
    notes = [*_notes(timed, settings), *unbatched]
    return build_result(timed, workload.plan, conditions, rows, notes, precise, timed_as)


def _batched_if_possible(settings: Benchmark, examples: Sequence[Examples]) -> tuple[Benchmark, list[str]]:
    """Without batches where the models' examples can share none, and what is to be said of that."""
    if not settings.batched:
        return settings, []
    alone = settings.model_copy(update={"batched": False})
    if any(each.whole for each in examples):
        return alone, []
    unlike = next((name for each in examples if (name := each.unlike) is not None), None)
    if unlike is None:
        return settings, []
    return alone, [f"batches are not timed: {unlike} differ in shape from example to example, and can't be padded"]


def check_host(artifacts: Mapping[str, Path], baseline: str, targets: Sequence[Target], host: BenchmarkHost) -> None:
    """Raises `InputError` for a baseline that isn't there, `StageError` for a target that can't be had at ``place``."""
    if baseline not in artifacts:
        raise InputError(f"The baseline {baseline!r} is not among the models.", expected=", ".join(artifacts))
    for target in targets:
        reason = host.why_unavailable(target)
        if reason is not None:
            raise StageError(f"The target {target.name!r} is not to be had here: {reason}")


def seconds_left(budget_seconds: float | None, began: float) -> float | None:
    """What is left of a budget for launches, the session having begun at ``began``."""
    return None if budget_seconds is None else began + (1 - _EVALUATION_SHARE) * budget_seconds - time.perf_counter()


def build_result(
    timed: TimingResult,
    plan: WorkloadPlan,
    conditions: TimingConditions,
    rows: Sequence[Measurement],
    own_notes: Sequence[str],
    precise: tuple[str, str],
    timed_as: Mapping[str, str],
    **own_environment: Any,
) -> BenchmarkResult:
    """``rows`` of all models with those of the machine, and how it was all measured.

    ``precise``: what is known so well, and what would make it better known. ``timed_as``: label -> name in the record.
    """
    whole, record = timed.record, timed.record.undisturbed()
    decisive = [record.timings[name] for name in plan.deciding_timings]
    noise = judge_noise(
        record.usage,
        {model: np.concatenate([rounds.relative_rounds(model) for rounds in decisive]) for model in decisive[0].times},
        timed.load,
        np.concatenate([rounds.product_ms for rounds in decisive]),
        record.frequencies_mhz,
        timed.environment["cores"],
        timed.environment["cores_granted"],
    )
    slowed = [
        slowed_rounds_note(whole.timings[name], record.timings[name], words)
        for name, words in plan.reported.items()
        if words is not None
    ]
    notes = [str(noise), *filter(None, slowed), *own_notes, *_shared_notes(timed, conditions, precise)]
    lost = [label for label, name in timed_as.items() if name in record.lost_models]
    notes += [f"{label} was not timed to the end: {record.lost[timed_as[label]]}" for label in lost]
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
        "warm_up_rounds": {name: [warm.rounds for warm in warms] for name, warms in record.warm_ups.items()},
        "noise": {**asdict(noise), "reasons": list(noise.reasons)},
        **own_environment,
    }
    reference = MeasurementWriter(MACHINE, conditions.target.name, conditions.seed).reference(record.reference)
    return BenchmarkResult([*rows, *reference], notes, environment)


def _shared_notes(timed: TimingResult, conditions: TimingConditions, precise: tuple[str, str]) -> list[str]:
    record, granted, notes = timed.record, timed.environment["cores_granted"], []
    if conditions.threads > granted:
        notes.append(f"{conditions.threads} threads share the {granted} cores that are granted")
    restless = [name for name, warm in record.warm_ups.items() if 2 * sum(each.steady for each in warm) < len(warm)]
    if restless:
        notes.append(f"not steady after most warm-ups: {', '.join(restless)}")
    if timed.precision > conditions.precision:
        what, hint = precise
        known = "from one launch only" if timed.precision == float("inf") else f"within {timed.precision:.1%}"
        notes.append(
            f"after {record.launches} launches {what} are known {known}, not within the {conditions.precision:.1%} "
            f"aimed at; {hint}"
        )
    return notes


def _write_workload(
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    lengths: np.ndarray,
    drawn: list[int],
    settings: Benchmark,
    scratch: str,
) -> Workload:
    """Put the batches of every model on disk, the same rows for each."""
    batches = batches_by_length(len(drawn), settings.batch_size) if settings.batched else []
    middle = drawn[len(drawn) // 2]
    everything, first = {}, {}
    for number, name in enumerate(artifacts):
        own = examples[name]
        everything[name] = Path(scratch) / f"{number}.npz"
        first[name] = Path(scratch) / f"{number}-first.npz"
        write_batches(first[name], [own.batch([middle])])
        write_batches(
            everything[name],
            [own.batch([i]) for i in drawn] + [own.batch([drawn[i] for i in batch]) for batch in batches],
        )
    plan = CallPlan(
        singles=list(range(len(drawn))),
        batches=list(range(len(drawn), len(drawn) + len(batches))),
        single_shapes=one_of_each_length(lengths[drawn]),
    )
    return Workload(artifacts, first, everything, plan)


def _notes(timed: TimingResult, settings: Benchmark) -> list[str]:
    record, notes = timed.record, []
    fewer = {name: told["intra_op_threads"] for name, told in record.settings.items() if "intra_op_threads" in told}
    fewer = {name: count for name, count in fewer.items() if count < settings.threads}
    if fewer:
        threads = next(iter(fewer.values()))
        notes.append(f"{settings.threads} threads were asked for; the runtime has {threads}: {', '.join(fewer)}")
    if record.energy_unavailable is not None:
        notes.append(f"energy: skipped, {record.no_energy}")
    if settings.rate is not None:
        late = [name for name, found in record.server_ms.items() if _falls_behind(found, settings.rate)]
        if late:
            notes.append(f"{settings.rate:g} requests a second are more than it can answer: {', '.join(late)}")
    return notes


def _falls_behind(launches: Sequence[Sequence[float]], rate: float) -> bool:
    """Whether the queue grows: in most launches the last quarter waits longer than ten arrivals take, and longest."""
    growing = 0
    for latencies in launches:
        quarter = max(1, len(latencies) // 4)
        first, last = np.median(latencies[:quarter]), np.median(latencies[-quarter:])
        growing += bool(last > 2 * first and last > 10_000 / rate)
    return 2 * growing > len(launches)


def find_equal_artifacts(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """label -> the first label whose folder holds the same bytes, or that names the same file."""
    first: dict[str, str] = {}
    timed_as = {}
    for label, path in artifacts.items():
        # A graph file may have its weights in another file, so that its own bytes decide nothing.
        key = digest_directory(path) if path.is_dir() else str(path.resolve())
        timed_as[label] = first.setdefault(key, label)
    return timed_as
