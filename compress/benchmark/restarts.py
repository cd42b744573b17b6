"""The timing itself: sets of fresh processes, one set after the other, and the models of a set in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from compress.benchmark.noise import Usage, frequency_mhz
from compress.benchmark.record import Conditions, Record
from compress.benchmark.reference_timing import SINGLE_THREADED, ReferenceTimes
from compress.benchmark.rounds import Pulse, Rounds, WarmUp, in_turn
from compress.benchmark.subprocess_client import Child
from compress.formats.target_profile import Target
from compress.numerics.statistics import geometric_interval
from compress.utils.errors import StageError

SETTLE_SECONDS = 0.02
"""Pause after a model's turn: its threads spin for some milliseconds after their last call."""
UNTIMED = 2
"""Calls or tokens before those that are timed in a turn, since another process has just used the caches."""
_REFERENCE_EVERY_SECONDS = 0.25
_CAUTION = 1.2
"""The least work of a launch may take so much longer than the longest before."""
_SHARE_OF_STARTS = 0.4
"""The part of a time budget that starts and warm-ups may have, as long as there are enough launches."""


class Timing(Protocol):
    """How one kind of work is timed. A child's label is the name of its model."""

    def answer_first(self, child: Child, opened: dict[str, Any]) -> None:
        """Have it answer for the first time; what that tells of its start is added to ``opened``."""

    def warm_up(self, child: Child, seconds: float) -> WarmUp:
        """Run it until it is steady, for about so long at most."""

    def sample(
        self, children: Mapping[str, Child], number: int, left: Callable[[int], float], reference: Reference
    ) -> None:
        """Add one round at least of launch ``number`` to the record.

        ``left(kinds)`` are the seconds that are left of it for so many kinds of work. Raises `LostError`.
        """


class Plan(Protocol):
    """What each process is asked for: a data class of plain values, which may lie on another machine."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def timings(self) -> tuple[str, ...]:
        """The kinds of work in a record."""

    @property
    def decisive(self) -> tuple[str, ...]:
        """Those of them that say when the ratios of models are known well enough, and how noisy it was."""

    @property
    def counted(self) -> Mapping[str, str | None]:
        """Those whose rounds a report counts, with what a note calls them: None for those that no note is about."""

    def target(self, model: str, usual: Target) -> Target:
        """What a model runs on; ``usual`` is the session's target."""

    def timing(self, conditions: Conditions, record: Record) -> Timing:
        """What times it, and writes into ``record``."""


@dataclass(frozen=True)
class Workload:
    """What every process is given. ``first`` and ``all``: each model's file of batches to begin and to go on with.

    Numbers of batches in ``plan`` are positions in the latter.
    """

    artifacts: Mapping[str, Path]
    first: Mapping[str, Path]
    all: Mapping[str, Path]
    plan: Plan


class LostError(Exception):
    """A model's process died or hung."""

    def __init__(self, model: str, error: StageError) -> None:
        super().__init__(model)
        self.model = model
        self.error = error


class Launches:
    """One session: launches are made until what they tell is precise enough, or time is up."""

    def __init__(self, workload: Workload, conditions: Conditions) -> None:
        self._workload, self._conditions, self._baseline = workload, conditions, conditions.baseline
        self._names = list(workload.artifacts)
        self._longest = 0.0
        self.record = Record({name: Rounds() for name in workload.plan.timings})
        self._timing = workload.plan.timing(conditions, self.record)

    def __iter__(self) -> Iterator[int]:
        """Make the launches, yielding the number of each that is done.

        A model whose process dies or hangs is left out from then on, with the reason in ``record.lost``. Raises
        `StageError` if that is the baseline, and what opening a model raises.
        """
        record = self.record
        with Child("machine", variables=SINGLE_THREADED) as machine:
            reference = Reference(machine, self._conditions, record.reference)
            while not self._is_enough():
                try:
                    self._launch(record.launches, machine, reference)
                except LostError as lost:
                    if lost.model == self._baseline:
                        raise lost.error from None
                    record.lost[lost.model] = str(lost.error)
                    record.forget(lost.model)
                    self._names.remove(lost.model)
                record.launches += 1
                yield record.launches

    def precision(self) -> float:
        """Half the width of the widest interval, as a share: of ratios to the baseline, or of the baseline alone."""
        if any(len(set(rounds.launches)) < 2 for rounds in self._decisive(self.record)):
            return float("inf")
        others = [name for name in self._names if name != self._baseline]
        samples = [
            ratios
            for rounds in self._decisive(self.record.undisturbed())
            for ratios in (
                [rounds.ratios(self._baseline, name) for name in others] or [rounds.relative_launches(self._baseline)]
            )
        ]
        intervals = [geometric_interval(ratios, self._conditions.confidence) for ratios in samples]
        return max(found.high / found.value - 1 for found in intervals)

    def _decisive(self, record: Record) -> list[Rounds]:
        return [record.timings[name] for name in self._workload.plan.decisive]

    def _is_enough(self) -> bool:
        done, deadline = self.record.launches, self._conditions.deadline
        # A launch in which a model was lost may have brought no round.
        has_rounds = all(rounds.calls for rounds in self._decisive(self.record))
        if deadline is not None and has_rounds and time.perf_counter() + _CAUTION * self._longest > deadline:
            return True
        if done < self._conditions.launches:
            return False
        if deadline is None and done >= self._conditions.most_launches:
            return True
        return self.precision() <= self._conditions.precision

    def _left(self, began: float, kinds: int) -> float:
        """Sampling time that is left for so many kinds of work in this launch, all models together."""
        conditions = self._conditions
        if conditions.deadline is None:
            return conditions.seconds * len(self._names) * kinds / conditions.most_launches
        done, taken = self.record.launches, time.perf_counter() - began
        self._longest = max(self._longest, taken)
        left = conditions.deadline - began
        fitting = done + int(left * _SHARE_OF_STARTS / self._longest)
        planned = min(max(conditions.launches, fitting), conditions.most_launches) - done
        return max(0.0, left / max(1, planned) - taken)

    def _launch(self, number: int, machine: Child, reference: Reference) -> None:
        record, workload = self.record, self._workload
        began = time.perf_counter()
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            for name in in_turn(self._names, number):
                children[name] = stack.enter_context(Child(name))
                with losing(name):
                    self._start(children[name])
            for name, child in children.items():
                with losing(name):
                    record.no_energy = child.load(workload.all[name], self._conditions.timeout_seconds)
            for child in children.values():
                self._warm_up(child, number)
            before = Usage.now(_own_seconds(children, machine))
            # Named anew, since the processes were started in alternating order and rounds alternate by themselves.
            named = {name: children[name] for name in self._names}
            self._timing.sample(named, number, lambda kinds: self._left(began, kinds), reference)
            reference.now()
            record.usage += Usage.now(_own_seconds(children, machine)) - before
            frequency = frequency_mhz()
            record.frequencies_mhz += [] if frequency is None else [frequency]

    def _start(self, child: Child) -> None:
        """From the start of the process to its first answer. The files are in the system's cache, or soon are."""
        record, conditions, workload, name = self.record, self._conditions, self._workload, child.label
        opened = child.open(
            workload.artifacts[name],
            workload.plan.target(name, conditions.target),
            conditions.threads,
            conditions.cores,
            workload.first[name],
            conditions.timeout_seconds,
        )
        self._timing.answer_first(child, opened)
        record.startup_ms.setdefault(name, []).append(1e3 * (time.perf_counter() - child.began))
        record.session_load_ms.setdefault(name, []).append(opened["session_load_ms"])
        record.runtime_bytes.setdefault(name, []).append(float(opened["before_bytes"]))
        record.settings[name] = opened["settings"]
        for figure, value in opened["start_up"].items():
            record.start_up.setdefault(name, {}).setdefault(figure, []).append(value)

    def _warm_up(self, child: Child, number: int) -> None:
        conditions = self._conditions
        seconds = conditions.seconds
        if conditions.deadline is not None:
            left = conditions.deadline - time.perf_counter()
            seconds = max(0.0, left / max(1, conditions.launches - number) / 3 / len(self._names))
        with losing(child.label):
            warmed = self._timing.warm_up(child, seconds)
        self.record.warm_ups.setdefault(child.label, []).append(warmed)


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


def repeat_rounds(run: Callable[[int], None], left: Callable[[], float], deadline: float | None) -> None:
    """Call ``run`` with 0, 1 and so on, once at least, until a launch's share of the time is over.

    ``left`` tells that share's seconds once the first round is done. A round is begun only where half of it fits into
    them, and all of it before ``deadline``, by what the first took.
    """
    start = time.perf_counter()
    run(0)
    took = time.perf_counter() - start
    last = time.perf_counter() + left() - took / 2
    if deadline is not None:
        last = min(last, deadline - took)
    count = 1
    while time.perf_counter() < last:
        run(count)
        count += 1


def keep_memory(children: Mapping[str, Child], kept: dict[str, list[float]]) -> None:
    """Add the peak memory of each process. Raises `LostError`."""
    for name, child in children.items():
        with losing(name):
            kept.setdefault(name, []).append(float(child.memory()["peak_bytes"]))


def _own_seconds(children: Mapping[str, Child], machine: Child) -> float:
    """Processor time of all measured processes so far."""
    return sum(float(child.memory()["cpu_seconds"]) for child in (*children.values(), machine))
