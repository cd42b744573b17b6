"""The timing itself: sets of fresh processes, one set after the other, and the models of a set in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat

import numpy as np

from compress.bench.child import Child
from compress.bench.noise import Snapshot, frequency_mhz
from compress.bench.record import Conditions, Record, Workload
from compress.bench.reference import SINGLE_THREADED, ReferenceTimes
from compress.bench.rounds import Pulse, Run, Turn, in_turn, interleave, warm_up
from compress.bench.scenarios import arrival_gaps_ms, evenly_spaced, mixed_rounds
from compress.errors import StageError
from compress.numerics.statistics import geometric_interval

FEWEST_LAUNCHES = 6
"""With fewer sets of processes the interval over them is too wide to be of use, and a median has none at 95%."""
SETTLE_SECONDS = 0.02
"""Pause after a model's turn: its threads spin for some milliseconds after their last call."""
_UNTIMED = 2
_WARM_UP_CALLS = 8
_COMPILING_SECONDS = 1.5
"""WebAssembly is compiled in haste first and well while it runs: a small encoder's best came after 175 calls, 1.2 s."""
_TURN_MS = 30.0
"""Long against what a change of process costs, short against what else comes and goes on a machine."""
_FEWEST_CALLS, _MOST_CALLS = 4, 64
_REFERENCE_EVERY_SECONDS = 0.25
_CAUTION = 1.2
"""The starts and warm-ups of a launch may take so much longer than the longest before."""
_SHARE_OF_STARTS = 0.4
"""The part of a time budget that starts and warm-ups may have, as long as there are enough launches."""


class LostError(Exception):
    """A model's process died or hung."""

    def __init__(self, model: str, error: StageError) -> None:
        super().__init__(model)
        self.model = model
        self.error = error


class Launches:
    """One session: launches are made until what they tell is precise enough, or time is up."""

    def __init__(self, workload: Workload, conditions: Conditions, baseline: str) -> None:
        self._workload, self._conditions, self._baseline = workload, conditions, baseline
        self._names = list(workload.artifacts)
        self._single_schedule: Iterator[list[int]] | None = None
        self._batched_schedule: Iterator[list[int]] | None = None
        self._longest_start = 0.0
        self.record = Record()

    def __iter__(self) -> Iterator[int]:
        """Make the launches, yielding the number of each that is done.

        A model whose process dies or hangs is left out from then on, with the reason in ``record.lost``. Raises
        `StageError` if that is the baseline, and what opening a model raises.
        """
        conditions = self._conditions
        with Child("machine", variables=SINGLE_THREADED) as machine:
            reference = Reference(machine, conditions, self.record.reference)
            while not self._is_enough():
                try:
                    self._launch(self.record.launches, machine, reference)
                except LostError as lost:
                    if lost.model == self._baseline:
                        raise lost.error from None
                    self.record.lost[lost.model] = str(lost.error)
                    self.record.forget(lost.model)
                    self._names.remove(lost.model)
                self.record.launches += 1
                yield self.record.launches

    def precision(self) -> float:
        """Half the width of the widest interval, as a share: of ratios to the baseline, or of the baseline alone."""
        if self.record.launches < 2:
            return float("inf")
        rounds = self.record.single.undisturbed()
        others = [name for name in self._names if name != self._baseline]
        samples = [rounds.ratios(self._baseline, name) for name in others] or [rounds.relative_launches(self._baseline)]
        intervals = [geometric_interval(ratios, self._conditions.confidence) for ratios in samples]
        return max(found.high / found.value - 1 for found in intervals)

    def _is_enough(self) -> bool:
        done, deadline = self.record.launches, self._conditions.deadline
        # A launch in which a model was lost may have brought no round.
        if (
            deadline is not None
            and self.record.single.calls
            and time.perf_counter() + _CAUTION * self._longest_start > deadline
        ):
            return True
        if done < self._conditions.launches:
            return False
        if deadline is None and done >= self._conditions.most_launches:
            return True
        return self.precision() <= self._conditions.precision

    def _seconds(self, began: float) -> float:
        """Sampling time of one scenario in this launch, all models together."""
        conditions = self._conditions
        scenarios = 1 + conditions.batched + (conditions.rate is not None)
        if conditions.deadline is None:
            return conditions.seconds * len(self._names) / conditions.most_launches
        now = time.perf_counter()
        self._longest_start = max(self._longest_start, now - began)
        left = conditions.deadline - began
        fitting = self.record.launches + int(left * _SHARE_OF_STARTS / self._longest_start)
        planned = min(max(conditions.launches, fitting), conditions.most_launches) - self.record.launches
        return max(0.0, left / max(1, planned) - (now - began)) / scenarios

    def _launch(self, number: int, machine: Child, reference: Reference) -> None:
        record, workload, limit = self.record, self._workload, self._conditions.timeout_seconds
        began = time.perf_counter()
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            for name in in_turn(self._names, number):
                children[name] = stack.enter_context(Child(name))
                with losing(name):
                    self._start(children[name], name)
            for name, child in children.items():
                with losing(name):
                    record.no_energy = child.load(workload.all[name], limit)
            # Named anew, since the processes were started in alternating order and rounds alternate by themselves.
            runs = {name: self._run(children[name]) for name in self._names}
            for child in children.values():
                self._warm_up(child, number)
            before = Snapshot.take(own_seconds(children, machine))
            self._plan(runs)
            assert self._single_schedule is not None
            seconds = self._seconds(began)
            for _ in interleave(runs, self._single_schedule, number, seconds, record.single, reference.pulse):
                reference.now_and_then()
            self._keep(children, record.single_bytes, "peak_bytes")
            if self._batched_schedule is not None:
                for _ in interleave(runs, self._batched_schedule, number, seconds, record.batched, reference.pulse):
                    reference.now_and_then()
                self._keep(children, record.batched_bytes, "peak_bytes")
            if self._conditions.rate is not None:
                self._serve(children, self._conditions.rate, seconds / len(children), number)
            reference.now()
            record.usage += Snapshot.take(own_seconds(children, machine)).since(before)
            frequency = frequency_mhz()
            record.frequencies_mhz += [] if frequency is None else [frequency]

    def _start(self, child: Child, name: str) -> None:
        """From the start of the process to its first answer. The files are in the system's cache, or soon are."""
        record, conditions, workload = self.record, self._conditions, self._workload
        opened = child.open(
            workload.artifacts[name],
            conditions.target,
            conditions.threads,
            conditions.cores,
            workload.first[name],
            conditions.timeout_seconds,
        )
        first = child.round([0], conditions.timeout_seconds)
        record.startup_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - child.began))
        record.session_load_ms.setdefault(name, []).append(opened["session_load_ms"])
        record.runtime_bytes.setdefault(name, []).append(float(opened["before_bytes"]))
        record.settings[name] = opened["settings"]
        told = opened["start_up"]
        if told:
            told = {**told, "first_call_ms": first.latencies_ms[0]}
        for figure, value in told.items():
            record.start_up.setdefault(name, {}).setdefault(figure, []).append(value)

    def _run(self, child: Child) -> Run:
        def run(calls: Sequence[int]) -> Turn:
            with losing(child.label):
                return child.round(calls, self._conditions.timeout_seconds, _UNTIMED)

        return run

    def _warm_up(self, child: Child, number: int) -> None:
        workload, conditions = self._workload, self._conditions
        seconds = conditions.seconds
        if conditions.deadline is not None:
            left = conditions.deadline - time.perf_counter()
            seconds = max(0.0, left / max(1, conditions.launches - number) / 3 / len(self._names))
        calls = evenly_spaced(list(workload.singles), _WARM_UP_CALLS)
        with losing(child.label):
            run = partial(child.round, timeout=conditions.timeout_seconds)
            compiling = _COMPILING_SECONDS if child.label in self.record.start_up else 0.0
            warmed = warm_up(run, workload.single_shapes, calls, seconds, compiling)
        self.record.warm_ups.setdefault(child.label, []).append(warmed)

    def _plan(self, runs: Mapping[str, Run]) -> None:
        """Choose the rounds, once: long enough for the fastest model, and several in a launch for the slowest."""
        if self._single_schedule is not None:
            return
        middle = self._workload.singles[len(self._workload.singles) // 2]
        took = [float(np.median(run([middle] * 3).latencies_ms)) for run in runs.values()]
        slice_ms = 1000 * self._conditions.seconds / self._conditions.most_launches
        size = min(max(_FEWEST_CALLS, round(_TURN_MS / min(took))), max(_FEWEST_CALLS, int(slice_ms / max(took))))
        size = min(size, _MOST_CALLS, len(self._workload.singles))
        rounds = mixed_rounds(len(self._workload.singles), size, self._conditions.seed)
        self._single_schedule = ([self._workload.singles[i] for i in calls] for calls in rounds)
        if not self._conditions.batched:
            return
        batch = self._workload.batches[len(self._workload.batches) // 2]
        slowest = max(float(run([batch]).latencies_ms[0]) for run in runs.values())
        fitting = max(1, int(slice_ms / slowest))
        self._batched_schedule = repeat(evenly_spaced(list(self._workload.batches), fitting))

    def _serve(self, children: Mapping[str, Child], rate: float, seconds: float, number: int) -> None:
        """Requests that arrive at random, the same ones for every model."""
        count = max(1, round(rate * seconds))
        seed = self._conditions.seed + number
        gaps = arrival_gaps_ms(count, rate, seed)
        calls = [
            self._workload.singles[i]
            for i in np.random.default_rng(seed).integers(0, len(self._workload.singles), count)
        ]
        for name in in_turn(list(children), number):
            time.sleep(SETTLE_SECONDS)
            with losing(name):
                latencies = children[name].arrivals(calls, gaps, self._conditions.timeout_seconds)
            self.record.server_ms.setdefault(name, []).append(latencies)

    def _keep(self, children: Mapping[str, Child], kept: dict[str, list[float]], field_name: str) -> None:
        for name, child in children.items():
            with losing(name):
                kept.setdefault(name, []).append(float(child.memory()[field_name]))


class Reference:
    """Times the reference kernels a few times a second between rounds, and a small product around all turns."""

    def __init__(self, child: Child, conditions: Conditions, times: list[ReferenceTimes]) -> None:
        cores, timeout = conditions.cores, conditions.timeout_seconds
        self._ask: Callable[[], ReferenceTimes] = lambda: child.reference(cores, timeout)
        self._pulse: Pulse = lambda: child.pulse(cores, timeout)
        self._settle = SETTLE_SECONDS if conditions.threads > 1 else 0.0
        self._times = times
        # The first answer comes after the kernels' arrays were made.
        self._ask()
        self._last = time.perf_counter()

    def pulse(self) -> float:
        """Milliseconds of the small product on the slowest core, once the threads of the last turn are idle."""
        time.sleep(self._settle)
        return self._pulse()

    def now(self) -> None:
        """Time them at once."""
        self._times.append(self._ask())
        self._last = time.perf_counter()

    def now_and_then(self) -> None:
        """Time them if the last time was a while ago."""
        if time.perf_counter() - self._last >= _REFERENCE_EVERY_SECONDS:
            self.now()


@contextmanager
def losing(model: str) -> Iterator[None]:
    """Say whose process it was that ended."""
    try:
        yield
    except StageError as error:
        raise LostError(model, error) from error


def own_seconds(children: Mapping[str, Child], machine: Child) -> float:
    """Processor time of all measured processes so far."""
    return sum(float(child.memory()["cpu_seconds"]) for child in (*children.values(), machine))
