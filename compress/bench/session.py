"""Models measured together: one session, one machine, each in processes of its own, taking turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.noise import Noise, judge
from compress.bench.place import HERE, LaunchHost, Timed
from compress.bench.record import Conditions, Record, Workload
from compress.bench.results import Writer
from compress.bench.rounds import WarmUp, count, note_on
from compress.bench.scenarios import batches_by_length, draw_by_length, one_of_each_length
from compress.bench.worker import write_batches
from compress.digests import digest_directory
from compress.errors import DataError, InputError, StageError
from compress.measurement import MACHINE, Measurement
from compress.progress import Progress
from compress.recipe.recipe import Benchmark
from compress.targets import Target
from compress.tasks.task import Examples

TIMING_VERSION = 4
"""Of what is measured and how; kept timings of another version are not used."""
PRECISION = 0.01
"""Half the width of the 95% interval of a ratio of latencies at which sampling may stop."""
_EVALUATION_SHARE = 0.05
"""The part of a time budget that is kept for the statistics."""


@dataclass(frozen=True)
class BenchResult:
    """The rows, what a reader must know about them, and where they were taken."""

    measurements: list[Measurement]
    notes: list[str]
    environment: dict[str, Any]


def measure_together(
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
    place: LaunchHost = HERE,
) -> BenchResult:
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
    budget = settings.budget_seconds
    deadline = None if budget is None else time.perf_counter() + (1 - _EVALUATION_SHARE) * budget
    if baseline not in artifacts:
        raise InputError(f"The baseline {baseline!r} is not among the models.", expected=", ".join(artifacts))
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"The models' examples differ in number: {sorted(counts)}.", expected="the same rows for each")
    if counts == {0}:
        raise DataError("There is no example to time.", expected="at least one row in the test split")
    reason = place.why_unavailable(target)
    if reason is not None:
        raise StageError(f"The target {target.name!r} is not to be had here: {reason}")
    timed_as = _equal_artifacts(artifacts)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        lengths = examples[baseline].lengths()
        drawn = draw_by_length(lengths, settings.examples, seed)
        names = list(dict.fromkeys(timed_as.values()))
        workload = _write_workload(
            {name: artifacts[name] for name in names}, examples, lengths, drawn, settings, scratch
        )
        conditions = Conditions(
            target=place.target(target),
            threads=settings.threads,
            launches=settings.launches,
            cores=(),
            seconds=settings.seconds,
            deadline=None,
            batched=settings.batched,
            rate=settings.rate,
            precision=precision,
            confidence=confidence,
            seed=seed,
            timeout_seconds=timeout_seconds,
        )
        left = None if deadline is None else deadline - time.perf_counter()
        timed = place.time(workload, conditions, timed_as[baseline], left, progress)
    heard = examples[baseline].seconds
    seconds = None if heard is None else heard[drawn]
    return _result(timed, timed_as, timed_as[baseline], lengths[drawn], seconds, settings, conditions)


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
    return Workload(
        artifacts=artifacts,
        first=first,
        all=everything,
        singles=range(len(drawn)),
        batches=range(len(drawn), len(drawn) + len(batches)),
        single_shapes=one_of_each_length(lengths[drawn]),
    )


def _result(
    timed: Timed[Record],
    timed_as: Mapping[str, str],
    baseline: str,
    lengths: np.ndarray,
    seconds: np.ndarray | None,
    settings: Benchmark,
    conditions: Conditions,
) -> BenchResult:
    record, seed = timed.record.undisturbed(), conditions.seed
    rows: list[Measurement] = []
    for label, name in timed_as.items():
        if name not in record.lost:
            rows += Writer(label, conditions.target.name, seed).all(record, name, baseline, lengths, settings, seconds)
    rows += Writer(MACHINE, conditions.target.name, seed).reference(record.reference)
    noise = judge(
        record.usage,
        {name: record.single.relative_rounds(name) for name in record.single.turns},
        timed.load,
        np.array(record.single.pulses_ms),
        record.frequencies_mhz,
        timed.environment["cores"],
        timed.environment["cores_granted"],
    )
    left_out = note_on(timed.record.single, record.single)
    notes = [str(noise), *([left_out] if left_out else []), *_notes(timed, settings, conditions)]
    lost = [label for label, name in timed_as.items() if name in record.lost]
    notes += [f"{label} was not timed to the end: {record.lost[timed_as[label]]}" for label in lost]
    rounds = count(timed.record.rounds(), record.rounds())
    return BenchResult(rows, notes, _environment(timed, rounds, noise, conditions))


def _notes(timed: Timed[Record], settings: Benchmark, conditions: Conditions) -> list[str]:
    record = timed.record
    notes = []
    granted = timed.environment["cores_granted"]
    if settings.threads > granted:
        notes.append(f"{settings.threads} threads share the {granted} cores that are granted")
    fewer = {name: told["intra_op_threads"] for name, told in record.settings.items() if "intra_op_threads" in told}
    fewer = {name: count for name, count in fewer.items() if count < settings.threads}
    if fewer:
        threads = next(iter(fewer.values()))
        notes.append(f"{settings.threads} threads were asked for; the runtime has {threads}: {', '.join(fewer)}")
    restless = [name for name, warm in record.warm_ups.items() if not _steady(warm)]
    if restless:
        notes.append(f"not steady after most warm-ups: {', '.join(restless)}")
    if timed.precision > conditions.precision:
        notes.append(
            f"after {record.launches} launches ratios of latencies are known within {timed.precision:.1%}, not within "
            f"the {conditions.precision:.1%} aimed at; raise benchmark.seconds or quieten the machine"
        )
    if record.no_energy is not None:
        notes.append(f"energy: skipped, {record.no_energy}")
    if settings.rate is not None:
        late = [name for name, found in record.server_ms.items() if _falls_behind(found, settings.rate)]
        if late:
            notes.append(f"{settings.rate:g} requests a second are more than it can answer: {', '.join(late)}")
    return notes


def _steady(warm_ups: Sequence[WarmUp]) -> bool:
    return 2 * sum(warm.steady for warm in warm_ups) >= len(warm_ups)


def _falls_behind(launches: Sequence[Sequence[float]], rate: float) -> bool:
    """Whether the queue grows: in most launches the last quarter waits longer than ten arrivals take, and longest."""
    growing = 0
    for latencies in launches:
        quarter = max(1, len(latencies) // 4)
        first, last = np.median(latencies[:quarter]), np.median(latencies[-quarter:])
        growing += bool(last > 2 * first and last > 10_000 / rate)
    return 2 * growing > len(launches)


def _environment(
    timed: Timed[Record], rounds: Mapping[str, Any], noise: Noise, conditions: Conditions
) -> dict[str, Any]:
    record = timed.record
    return {
        **timed.environment,
        "target": asdict(conditions.target),
        "threads": conditions.threads,
        "pinned_cores": list(timed.cores),
        "runtime_settings": record.settings,
        "launches": record.launches,
        **rounds,
        "warm_up_rounds": {name: [warm.rounds for warm in warms] for name, warms in record.warm_ups.items()},
        "noise": {**asdict(noise), "reasons": list(noise.reasons)},
    }


def _equal_artifacts(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """label -> the first label whose folder holds the same bytes, or that names the same file."""
    first: dict[str, str] = {}
    timed_as = {}
    for label, path in artifacts.items():
        # A graph file may have its weights in another file, so that its own bytes decide nothing.
        key = digest_directory(path) if path.is_dir() else str(path.resolve())
        timed_as[label] = first.setdefault(key, label)
    return timed_as
