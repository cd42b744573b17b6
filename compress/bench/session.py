"""Models measured together: one session, one machine, each in a process of its own, taking turns."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.child import Child
from compress.bench.noise import Noise, Snapshot, judge
from compress.bench.results import Memory, Starts, Writer
from compress.bench.rounds import (
    MINIMUM_ROUNDS,
    NARROW,
    Rounds,
    Run,
    WarmUp,
    in_turn,
    interleave,
    warm_up,
)
from compress.bench.scenarios import batches_by_length, draw_by_length, evenly_spaced, stratified_rounds
from compress.bench.worker import write_batches
from compress.environment import environment, granted_cores, spread_cores
from compress.errors import DataError, InputError, StageError
from compress.measurement import Measurement
from compress.models.model import digest_directory
from compress.progress import Progress
from compress.recipe import Benchmark
from compress.runtimes import why_unavailable
from compress.targets import Target
from compress.tasks.task import Examples

STARTS = 6
"""Fresh processes for the start-up time: the fewest with an exact 95% interval of the median."""
_LARGEST_ROUND = 32
_ROUNDS_AIMED_AT = 24
SETTLE_SECONDS = 0.02
"""Pause before a model's turn: the threads of the one before it spin for some milliseconds after their last call."""
_UNTIMED = 2


@dataclass(frozen=True)
class BenchResult:
    """The rows, what a reader must know about them, and where they were taken."""

    measurements: list[Measurement]
    notes: list[str]
    environment: dict[str, Any]


@dataclass(frozen=True)
class _Timed:
    """A scenario's rounds and how each model got warm before them."""

    rounds: Rounds
    warm_ups: dict[str, WarmUp]


def measure_together(
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    target: Target,
    settings: Benchmark,
    baseline: str,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
) -> BenchResult:
    """Time every artifact on the same rows and compare each with ``artifacts[baseline]``.

    ``examples[label]`` are those rows as that artifact's own processor encodes them; rows are drawn, and told apart
    by length, as the baseline's processor encodes them.

    A scenario (single calls, batches) ends when the median of every model is known within 2%, at the latest
    when it has taken ``settings.seconds`` for each model. Equal artifacts are measured once and reported
    under each label. ``timeout_seconds`` bounds one answer of a process. Raises `StageError` where a process
    dies or hangs or the target is not to be had, and what opening a model raises.
    """
    if baseline not in artifacts:
        raise InputError(f"The baseline {baseline!r} is not among the models.", expected=", ".join(artifacts))
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"The models' examples differ in number: {sorted(counts)}.", expected="the same rows for each")
    if counts == {0}:
        raise DataError("There is no example to time.", expected="at least one row in the test split")
    reason = why_unavailable(target)
    if reason is not None:
        raise StageError(f"The target {target.name!r} is not to be had here: {reason}")
    timed_as = _equal_artifacts(artifacts)
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        names = list(dict.fromkeys(timed_as.values()))
        own = {name: examples[name] for name in names}
        lengths = examples[baseline].lengths()
        bench = _Bench(own, lengths, target, settings, progress, seed, timeout_seconds, Path(scratch))
        return bench.measure({name: artifacts[name] for name in names}, timed_as, baseline)


class _Bench:
    """One session: the batches on disk, and the settings that every process shares."""

    def __init__(
        self,
        examples: Mapping[str, Examples],
        lengths: np.ndarray,
        target: Target,
        settings: Benchmark,
        progress: Progress,
        seed: int,
        timeout: float,
        scratch: Path,
    ) -> None:
        self._target, self._settings, self._progress = target, settings, progress
        self._seed, self._timeout = seed, timeout
        self._cores = spread_cores(settings.threads)
        drawn = draw_by_length(lengths, settings.examples, seed)
        self._lengths = lengths[drawn]
        batches = batches_by_length(len(drawn), settings.batch_size)
        self._singles = list(range(len(drawn)))
        self._batches = list(range(len(drawn), len(drawn) + len(batches)))
        middle = drawn[len(drawn) // 2]
        self._all: dict[str, Path] = {}
        self._first: dict[str, Path] = {}
        for number, (name, own) in enumerate(examples.items()):
            self._all[name], self._first[name] = scratch / f"{number}.npz", scratch / f"{number}-first.npz"
            write_batches(self._first[name], [own.batch([middle])])
            write_batches(
                self._all[name],
                [own.batch([i]) for i in drawn] + [own.batch([drawn[i] for i in batch]) for batch in batches],
            )

    def measure(self, artifacts: Mapping[str, Path], timed_as: Mapping[str, str], baseline: str) -> BenchResult:
        """Every scenario of every artifact; rows are written for each label of ``timed_as``."""
        budget = self._settings.seconds * len(artifacts)
        with ExitStack() as stack:
            children = {name: stack.enter_context(Child(name)) for name in artifacts}
            opened = {name: self._open(children[name], artifacts[name], self._all[name]) for name in artifacts}
            before = Snapshot.take(_own_seconds(children))
            single = self._time(children, self._single_schedule(children), budget, "Timing single examples")
            peaks = {name: child.memory()["peak_bytes"] for name, child in children.items()}
            batched = self._time(children, self._batched_schedule(children), budget, "Timing batches")
            after = Snapshot.take(_own_seconds(children))
            memory = {
                name: Memory(opened[name]["before_bytes"], peaks[name], child.memory()["peak_bytes"])
                for name, child in children.items()
            }
        starts = self._starts(artifacts)
        noise = judge(before, after, {name: single.rounds.medians(name) for name in artifacts})
        rows = []
        for label, name in timed_as.items():
            writer = Writer(label, self._target.name, self._seed)
            rows += writer.single(single.rounds, name, self._lengths)
            rows += writer.batched(batched.rounds, name, self._settings.batch_size)
            rows += [writer.speedup(single.rounds, name, timed_as[baseline])]
            rows += writer.starts(starts[name]) + writer.memory(memory[name], self._settings.batch_size)
        own = [row for row in rows if row.model in artifacts]
        notes = [str(noise), *self._notes(own, single, batched)]
        settings = {name: opened[name]["settings"] for name in artifacts}
        return BenchResult(rows, notes, self._environment(noise, settings, single, batched))

    def _open(self, child: Child, artifact: Path, batches: Path) -> dict[str, Any]:
        return child.open(artifact, self._target, self._settings.threads, self._cores, batches, self._timeout)

    def _run(self, child: Child) -> Run:
        def run(calls: Sequence[int]) -> list[float]:
            time.sleep(SETTLE_SECONDS)
            return child.round(calls, self._timeout, _UNTIMED)

        return run

    def _probe_seconds(self, children: Mapping[str, Child], batch: int) -> float:
        """What one call takes the slowest model, roughly."""
        calls = [batch] * 3
        return max(float(np.median(child.round(calls, self._timeout, 1))) for child in children.values()) / 1e3

    def _single_schedule(self, children: Mapping[str, Child]) -> list[list[int]]:
        """Rounds short enough for two dozen of them in the slowest model's time."""
        call = self._probe_seconds(children, self._singles[len(self._singles) // 2])
        size = min(_LARGEST_ROUND, max(1, int(self._settings.seconds / _ROUNDS_AIMED_AT / call)))
        return stratified_rounds(len(self._singles), size, self._seed)

    def _batched_schedule(self, children: Mapping[str, Child]) -> list[list[int]]:
        """All batches in every round, or some of all lengths if the slowest model is too slow for that."""
        call = self._probe_seconds(children, self._batches[len(self._batches) // 2])
        return [evenly_spaced(self._batches, max(1, int(self._settings.seconds / MINIMUM_ROUNDS / call)))]

    def _time(
        self, children: Mapping[str, Child], schedule: list[list[int]], budget: float, description: str
    ) -> _Timed:
        runs = {name: self._run(child) for name, child in children.items()}
        warm_ups = {
            name: warm_up(runs[name], schedule, self._settings.seconds)
            for name in self._progress.track(runs, f"{description}: warming up", len(runs))
        }
        began = time.perf_counter()
        for run in runs.values():
            run(schedule[0])
        expected = math.ceil(budget / (time.perf_counter() - began))
        rounds = Rounds()
        steps = interleave(runs, schedule, budget, rounds)
        for _ in self._progress.track(steps, description, max(MINIMUM_ROUNDS, expected)):
            pass
        return _Timed(rounds, warm_ups)

    def _starts(self, artifacts: Mapping[str, Path]) -> dict[str, Starts]:
        """Start fresh processes in turn. The files are in the system's cache by now, the same for each."""
        starts = {name: Starts([], []) for name in artifacts}
        plan = [name for number in range(STARTS) for name in in_turn(list(artifacts), number)]
        for name in self._progress.track(plan, "Timing the start", len(plan)):
            with Child(name) as child:
                load_ms = self._open(child, artifacts[name], self._first[name])["session_load_ms"]
                child.round([0], self._timeout)
                starts[name].startup_ms.append(1e3 * (time.perf_counter() - child.began))
                starts[name].session_load_ms.append(load_ms)
        return starts

    def _notes(self, rows: Sequence[Measurement], single: _Timed, batched: _Timed) -> list[str]:
        notes = []
        granted = len(granted_cores())
        if self._settings.threads > granted:
            notes.append(f"{self._settings.threads} threads share the {granted} cores that are granted")
        for scenario, timed in (("single examples", single), ("batches", batched)):
            restless = [name for name, warm in timed.warm_ups.items() if not warm.steady]
            if restless:
                notes.append(f"not steady after the warm-up on {scenario}: {', '.join(restless)}")
        watched = ("latency_ms", f"latency_ms_batch_{self._settings.batch_size}")
        for metric in watched:
            widths = {
                row.model: (row.high - row.low) / row.value
                for row in rows
                if row.metric == metric and row.low is not None and row.high is not None
            }
            wide = [f"{model} ({width:.1%})" for model, width in widths.items() if width > NARROW]
            if wide:
                notes.append(
                    f"{metric}: the interval is wider than {NARROW:.0%} of the median for {', '.join(wide)}; "
                    "raise benchmark.seconds or quieten the machine"
                )
        return notes

    def _environment(self, noise: Noise, settings: dict[str, Any], single: _Timed, batched: _Timed) -> dict[str, Any]:
        return {
            **environment(),
            "target": asdict(self._target),
            "threads": self._settings.threads,
            "pinned_cores": list(self._cores),
            "runtime_settings": settings,
            "rounds": {"single": len(single.rounds.calls), "batched": len(batched.rounds.calls)},
            "warm_up": {
                "single": {name: asdict(warm) for name, warm in single.warm_ups.items()},
                "batched": {name: asdict(warm) for name, warm in batched.warm_ups.items()},
            },
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


def _own_seconds(children: Mapping[str, Child]) -> float:
    return sum(float(child.memory()["cpu_seconds"]) for child in children.values())
