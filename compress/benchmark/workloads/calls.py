"""Workload of calls on batches of examples: one example at a time, in batches, and as requests to a server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, ClassVar

import numpy as np

from compress.benchmark.record import BATCHED_MEMORY, PEAK_MEMORY, TimingConditions, TimingRecord
from compress.benchmark.restarts import SETTLE_SECONDS, UNTIMED_CALLS, Launch, naming_lost_model, record_peak_memory
from compress.benchmark.rounds import (
    RoundTimes,
    Run,
    WarmUp,
    evenly_spaced,
    interleave,
    mixed_rounds,
    request_gaps_ms,
    round_order,
    warm_up,
)
from compress.benchmark.subprocess_client import WorkerProcess
from compress.formats.target_profile import Target

SINGLE, BATCHED = "single", "batched"
_FIRST_CALL = "first_call_ms"
"""Figure of the sessions in other processes."""
_WARM_UP_CALLS = 8
_COMPILING_SECONDS = 1.5
"""Least warm-up of WebAssembly, which is compiled again while it runs: a small encoder was fastest after 1.2 s."""
_TURN_MS = 30.0
"""Length of a model's part of a round: long compared with a process switch, short compared with other disturbances."""
_FEWEST_CALLS, _MOST_CALLS = 4, 64


@dataclass(frozen=True)
class CallPlan:
    """`WorkloadPlan` of calls, as numbers of batches: of one example, of several, and of one of each length."""

    singles: Sequence[int]
    batches: Sequence[int]
    single_shapes: Sequence[int]

    timings = (SINGLE, BATCHED)
    deciding_timings = (SINGLE,)
    reported: ClassVar[Mapping[str, str | None]] = {SINGLE: "", BATCHED: None}

    def target(self, model: str, usual: Target) -> Target:
        """See `WorkloadPlan`."""
        return usual

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> _CallTiming:
        """See `WorkloadPlan`."""
        return _CallTiming(self, conditions, record)


class _CallTiming:
    """`WorkloadTimer` of calls."""

    def __init__(self, plan: CallPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record
        self._schedules: dict[str, Iterator[list[int]]] = {}

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`."""
        first = child.round([0], self._conditions.timeout_seconds)
        if opened["start_up"]:
            opened["start_up"][_FIRST_CALL] = first.latencies_ms[0]

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`."""
        calls = evenly_spaced(list(self._plan.singles), _WARM_UP_CALLS)
        run = partial(child.round, timeout=self._conditions.timeout_seconds)
        compiling = _COMPILING_SECONDS if _FIRST_CALL in self._record.figures[child.label] else 0.0
        return warm_up(run, self._plan.single_shapes, calls, seconds, compiling)

    def sample(self, launch: Launch) -> None:
        """Time rounds of each scenario; see `WorkloadTimer`."""
        conditions, record, reference = self._conditions, self._record, launch.reference
        runs: dict[str, Run] = {name: partial(self._run, child) for name, child in launch.children.items()}
        if not self._schedules:
            # The rounds of each scenario.
            singles, batches = self._plan.singles, self._plan.batches
            call_ms = [float(np.median(run([singles[len(singles) // 2]] * 3).latencies_ms)) for run in runs.values()]
            slice_ms = 1000 * conditions.seconds / conditions.max_launches
            sizes = round(_TURN_MS / min(call_ms)), int(slice_ms / max(call_ms))
            size = min(max(_FEWEST_CALLS, min(sizes)), _MOST_CALLS, len(singles))
            rounds = mixed_rounds(len(singles), size, conditions.seed)
            self._schedules[SINGLE] = ([singles[i] for i in calls] for calls in rounds)
            if conditions.batched:
                slowest = max(float(run([batches[len(batches) // 2]]).latencies_ms[0]) for run in runs.values())
                self._schedules[BATCHED] = repeat(evenly_spaced(list(batches), max(1, int(slice_ms / slowest))))
        scenarios = len(self._schedules) + (conditions.rate is not None)
        seconds = launch.left(scenarios) / scenarios
        memories = {SINGLE: PEAK_MEMORY, BATCHED: BATCHED_MEMORY}
        for name, schedule in self._schedules.items():
            timed = record.timings[name], reference.time_small_product
            for _ in interleave(runs, schedule, launch.number, seconds, *timed):
                reference.measure_periodically()
            record_peak_memory(launch.children, record, memories[name])
        if conditions.rate is not None:
            self._serve(launch, conditions.rate, seconds / len(launch.children))

    def _run(self, child: WorkerProcess, calls: Sequence[int]) -> RoundTimes:
        with naming_lost_model(child.label):
            return child.round(calls, self._conditions.timeout_seconds, UNTIMED_CALLS)

    def _serve(self, launch: Launch, rate: float, seconds: float) -> None:
        """Send requests at random times, the same ones to every model."""
        singles, seed = self._plan.singles, self._conditions.seed + launch.number
        count = max(1, round(rate * seconds))
        gaps = request_gaps_ms(count, rate, seed)
        calls = [singles[i] for i in np.random.default_rng(seed).integers(0, len(singles), count)]
        for name in round_order(list(launch.children), launch.number):
            time.sleep(SETTLE_SECONDS)
            with naming_lost_model(name):
                latencies = launch.children[name].serve_requests(calls, gaps, self._conditions.timeout_seconds)
            self._record.server_ms.setdefault(name, []).append(latencies)
