"""Timing sessions: repeated launches of fresh processes, and interleaved rounds of the models within each launch."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from compress.benchmark.noise import Usage, frequency_mhz, load_average
from compress.benchmark.record import PEAK_MEMORY, TimingConditions, TimingRecord
from compress.benchmark.reference_timing import SINGLE_THREADED, ReferenceTimes
from compress.benchmark.rounds import TimedRounds, WarmUp, round_order, run_round
from compress.benchmark.subprocess_client import WorkerProcess
from compress.formats.runtime import prepare_runtime, refuse_unavailable, why_unavailable
from compress.formats.target_profile import Target
from compress.numerics.statistics import geometric_interval
from compress.plugins import explain_missing, find_extensions, load_extension
from compress.utils.environment import environment, spread_cores
from compress.utils.errors import InputError, StageError
from compress.utils.progress import Progress

SETTLE_SECONDS = 0.02
"""Pause after a model's calls in seconds: its threads spin for some milliseconds after their last call."""
UNTIMED_CALLS = 2
"""Calls or tokens before the timed ones in each round, because another process has just used the caches."""
_REFERENCE_EVERY_SECONDS = 0.25
_CAUTION = 1.2
"""Factor by which the smallest work of a launch may take longer than the longest launch so far."""
_SHARE_OF_STARTS = 0.4
"""Share of a time budget that process starts and warm-ups may take, once there are enough launches."""


Setting = TypeVar("Setting")
Generated = TypeVar("Generated")


class WorkloadTimer(Protocol):
    """Timer of one kind of work. The label of a worker process is the name of its model."""

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """Let the process answer for the first time.

        Args:
            child: Process with the model.
            opened: Its reply to `open`. Start-up times that the first answer shows are added to it.
        """

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """Run the model until its times are steady, for about ``seconds`` at most."""

    def sample(self, launch: Launch) -> None:
        """Add one round or more of a launch to the record.

        Raises:
            ProcessLostError: A model's process died or hung.
        """


@dataclass(frozen=True)
class Launch:
    """Set of fresh processes that take turns.

    Attributes:
        children: Processes by model.
        number: Number of the launch.
        left: Function that returns the seconds left in this launch for a number of kinds of work.
        reference: Timer of the reference work.
    """

    children: Mapping[str, WorkerProcess]
    number: int
    left: Callable[[int], float]
    reference: ReferenceTimer


class WorkloadPlan(Protocol):
    """Work of each process: a data class of plain values, which can be sent to another machine."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def timings(self) -> tuple[str, ...]:
        """Return the kinds of work, as names in `TimingRecord.timings`."""

    @property
    def deciding_timings(self) -> tuple[str, ...]:
        """Return the kinds of work that decide when ratios are precise enough, and how noisy the machine was."""

    @property
    def reported(self) -> Mapping[str, str | None]:
        """Return the kinds of work whose rounds a report counts.

        Each has the phrase that a note uses for it, or None if no note mentions it.
        """

    def target(self, model: str, usual: Target) -> Target:
        """Return the target that a model runs on; ``usual`` is the target of the session."""

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> WorkloadTimer:
        """Return the timer of this work, which writes into ``record``."""


@dataclass(frozen=True)
class Workload:
    """Input of every process: models, batches and the plan.

    ``first_batches`` has each model's file with one batch to open with, ``all_batches`` the file with all batches. The
    plan refers to batches by their position in the latter.
    """

    artifacts: Mapping[str, Path]
    first_batches: Mapping[str, Path]
    all_batches: Mapping[str, Path]
    plan: WorkloadPlan


class ProcessLostError(Exception):
    """Death or hang of a model's process."""

    def __init__(self, model: str, error: StageError) -> None:
        super().__init__(model)
        self.model = model
        self.error = error


class TimingSession:
    """Timing session of several models: launches are made until the ratios are precise enough or time is up."""

    def __init__(self, workload: Workload, conditions: TimingConditions) -> None:
        self._workload, self._conditions, self._baseline = workload, conditions, conditions.baseline
        self._names = list(workload.artifacts)
        self._longest = 0.0
        self.record = TimingRecord({name: TimedRounds() for name in workload.plan.timings})
        self._timing = workload.plan.timer(conditions, self.record)

    def __iter__(self) -> Iterator[int]:
        """Make the launches, and yield the number of launches after each.

        A model whose process dies or hangs is left out from then on, with the reason in ``record.lost_models``. Raises
        `StageError` if it is the baseline, and the errors of opening a model.
        """
        record = self.record
        with WorkerProcess("machine", variables=SINGLE_THREADED) as machine:
            reference = ReferenceTimer(machine, self._conditions, record.reference)
            while not self._is_enough():
                try:
                    self._launch(record.launches, machine, reference)
                except ProcessLostError as lost:
                    if lost.model == self._baseline:
                        raise lost.error from None
                    record.lost_models[lost.model] = str(lost.error)
                    record.drop_model(lost.model)
                    self._names.remove(lost.model)
                record.launches += 1
                yield record.launches

    def interval_half_width(self) -> float:
        """Return half the width of the widest interval, as a share.

        The intervals are those of the ratios to the baseline, or of the baseline itself if it is the only model.
        """
        if any(len(set(rounds.launches)) < 2 for rounds in self._decisive(self.record)):
            return float("inf")
        # A single model has no ratio, so the spread of its launches decides.
        others, samples = [name for name in self._names if name != self._baseline], []
        for rounds in self._decisive(self.record.undisturbed()):
            ratios = [rounds.ratios(self._baseline, name) for name in others]
            samples += ratios or [rounds.relative_launches(self._baseline)]
        intervals = [geometric_interval(sample, self._conditions.confidence) for sample in samples]
        return max(interval.high / interval.value - 1 for interval in intervals)

    def _decisive(self, record: TimingRecord) -> list[TimedRounds]:
        return [record.timings[name] for name in self._workload.plan.deciding_timings]

    def _is_enough(self) -> bool:
        done, deadline = self.record.launches, self._conditions.deadline
        # A launch in which a model was lost may have brought no round.
        has_rounds = all(rounds.calls for rounds in self._decisive(self.record))
        # The longest launch so far, with a margin, must fit before the deadline.
        if deadline is not None and has_rounds and time.perf_counter() + _CAUTION * self._longest > deadline:
            return True
        if done < self._conditions.launches:
            return False
        # Without a deadline the number of launches is bounded, so that a noisy machine does not run forever.
        if deadline is None and done >= self._conditions.max_launches:
            return True
        return self.interval_half_width() <= self._conditions.precision

    def _left(self, began: float, kinds: int) -> float:
        """Return the sampling seconds that are left in this launch for ``kinds`` kinds of work of all models."""
        conditions = self._conditions
        if conditions.deadline is None:
            return conditions.seconds * len(self._names) * kinds / conditions.max_launches
        # With a deadline, the time that is left is divided among as many launches as should still fit.
        done, elapsed = self.record.launches, time.perf_counter() - began
        self._longest = max(self._longest, elapsed)
        left = conditions.deadline - began
        fitting = done + int(left * _SHARE_OF_STARTS / self._longest)
        planned = min(max(conditions.launches, fitting), conditions.max_launches) - done
        return max(0.0, left / max(1, planned) - elapsed)

    def _launch(self, number: int, machine: WorkerProcess, reference: ReferenceTimer) -> None:
        record, workload, conditions, began = self.record, self._workload, self._conditions, time.perf_counter()
        with ExitStack() as stack:
            children: dict[str, WorkerProcess] = {}
            for name in round_order(self._names, number):
                # Start-up is measured first, one process after the other.
                children[name] = stack.enter_context(WorkerProcess(name))
                with naming_lost_model(name):
                    self._start(children[name])
            for name, child in children.items():
                with naming_lost_model(name):
                    # All processes stay alive from here on, and take turns.
                    record.energy_unavailable = child.load(workload.all_batches[name], conditions.timeout_seconds)
            for child in children.values():
                # With a deadline, warm-up gets a third of the launch's time, shared by the models.
                seconds = conditions.seconds
                if conditions.deadline is not None:
                    left = conditions.deadline - time.perf_counter()
                    seconds = max(0.0, left / max(1, conditions.launches - number) / 3 / len(self._names))
                with naming_lost_model(child.label):
                    record.warm_ups.setdefault(child.label, []).append(self._timing.warm_up(child, seconds))
            usage_before = Usage.now(_processor_seconds(children, machine))
            # Named anew, since the processes were started in alternating order and rounds alternate by themselves.
            ordered = {name: children[name] for name in self._names}
            self._timing.sample(Launch(ordered, number, partial(self._left, began), reference))
            # One measurement at the end, so that each launch has at least one.
            reference.measure()
            record.usage += Usage.now(_processor_seconds(children, machine)) - usage_before
            frequency = frequency_mhz()
            record.frequencies_mhz += [] if frequency is None else [frequency]

    def _start(self, child: WorkerProcess) -> None:
        """Measure one process from its start to its first answer."""
        record, conditions, workload, name = self.record, self._conditions, self._workload, child.label
        opened = child.open(
            workload.artifacts[name],
            workload.plan.target(name, conditions.target),
            conditions.threads,
            conditions.cores,
            workload.first_batches[name],
            conditions.timeout_seconds,
        )
        self._timing.time_first_answer(child, opened)
        figures = {
            "startup_ms": 1e3 * (time.perf_counter() - child.began),
            "session_load_ms": opened["session_load_ms"],
            "runtime_memory_bytes": float(opened["before_bytes"]),
        }
        record.add_figures(name, {**figures, **opened["start_up"]})
        record.settings[name] = opened["settings"]


class ReferenceTimer:
    """Timer of the reference work: the kernels a few times a second, and a small product around all calls."""

    def __init__(self, child: WorkerProcess, conditions: TimingConditions, times: list[ReferenceTimes]) -> None:
        self._child, self._times = child, times
        self._limits = conditions.cores, conditions.timeout_seconds
        self._settle = SETTLE_SECONDS if conditions.threads > 1 else 0.0
        # The first answer comes after the kernels' arrays were made.
        child.reference(*self._limits)
        self._last = time.perf_counter()

    def time_small_product(self) -> float:
        """Return the time of the small product on the slowest core in ms, once the last call's threads are idle."""
        time.sleep(self._settle)
        return self._child.time_small_product(*self._limits)

    def measure(self) -> None:
        """Time the kernels now."""
        self._times.append(self._child.reference(*self._limits))
        self._last = time.perf_counter()

    def measure_periodically(self) -> None:
        """Time the kernels if the last time was a while ago."""
        if time.perf_counter() - self._last >= _REFERENCE_EVERY_SECONDS:
            self.measure()


@contextmanager
def naming_lost_model(model: str) -> Iterator[None]:
    """Add the name of the model to the error of its process.

    Raises:
        ProcessLostError: The code in the block raised `StageError`.
    """
    try:
        yield
    except StageError as error:
        raise ProcessLostError(model, error) from error


def repeat_rounds(run: Callable[[int], None], left: Callable[[], float], deadline: float | None) -> None:
    """Call ``run`` with 0, 1 and so on, at least once, until the launch's share of the time is over.

    A round begins only if half of it fits into that share and all of it fits before ``deadline``, judged by the first
    round.

    Args:
        run: Function that runs the round of that number.
        left: Function that returns the seconds left, called after the first round.
        deadline: Time of `time.perf_counter` by which all must end, or None.
    """
    start = time.perf_counter()
    run(0)
    round_seconds = time.perf_counter() - start
    # A round that would end after the deadline is not begun. Half a round may exceed the launch's share.
    latest_start = time.perf_counter() + left() - round_seconds / 2
    if deadline is not None:
        latest_start = min(latest_start, deadline - round_seconds)
    count = 1
    while time.perf_counter() < latest_start:
        run(count)
        count += 1


def record_peak_memory(children: Mapping[str, WorkerProcess], record: TimingRecord, metric: str = PEAK_MEMORY) -> None:
    """Add the peak memory of each process to the figures of ``record``. Raises `ProcessLostError`."""
    for name, child in children.items():
        with naming_lost_model(name):
            record.add_figures(name, {metric: float(child.memory()["peak_bytes"])})


class GenerationTimer(ABC, Generic[Setting, Generated]):
    """Base class of a `WorkloadTimer` whose rounds let each model generate something in each of ``settings``."""

    def __init__(self, settings: Sequence[Setting], conditions: TimingConditions, record: TimingRecord) -> None:
        self.settings, self.conditions, self.record = settings, conditions, record

    @abstractmethod
    def generate(self, child: WorkerProcess, setting: Setting, number: int) -> Generated:
        """Time one generation; ``number`` is different in each round. Raises `ProcessLostError`."""

    @abstractmethod
    def add_round(self, setting: Setting, launch: int, generated: Mapping[str, Generated], product_ms: float) -> None:
        """Add one round of all models to the record.

        Args:
            setting: Setting of the round.
            launch: Number of the set of processes.
            generated: Times of each model.
            product_ms: Longest time of the reference product during the round.
        """

    def sample(self, launch: Launch) -> None:
        """Time rounds of all settings until the launch's share of the time is over; see `WorkloadTimer`."""
        repeat_rounds(partial(self._round, launch), partial(launch.left, len(self.settings)), self.conditions.deadline)
        record_peak_memory(launch.children, self.record)

    def _round(self, launch: Launch, count: int) -> None:
        # Each order comes equally often.
        number, reference = launch.number + count, launch.reference
        order = round_order(list(launch.children), number)
        for setting in self.settings:
            runs = {name: partial(self.generate, launch.children[name], setting, number) for name in order}
            self.add_round(setting, launch.number, *run_round(runs, reference.time_small_product))
            reference.measure_periodically()


def _processor_seconds(children: Mapping[str, WorkerProcess], machine: WorkerProcess) -> float:
    """Return the processor time of all measured processes so far."""
    return sum(float(child.memory()["cpu_seconds"]) for child in (*children.values(), machine))


PROGRESS_LABEL = "Timing, launches of all models"


@dataclass(frozen=True)
class TimingResult:
    """Record of a timing session, and the machine that made it.

    ``precision`` is `TimingSession.interval_half_width`. ``cores`` are the cores that processes were bound to. ``load``
    is the load average before the start.
    """

    record: TimingRecord
    precision: float
    cores: tuple[int, ...]
    load: float | None
    environment: dict[str, Any]


class BenchmarkHost(Protocol):
    """Machine that runs timing sessions."""

    def target(self, target: Target) -> Target:
        """Return the target with the name that measurement rows use on this host."""

    def why_unavailable(self, target: Target) -> str | None:
        """Return why nothing can run on ``target`` there, or None if it can."""

    def time(self, workload: Workload, conditions: TimingConditions, progress: Progress) -> TimingResult:
        """Run a `TimingSession`, and raise its errors."""


class LocalHost:
    """This machine as a host."""

    def target(self, target: Target) -> Target:
        """Return the target unchanged; see `BenchmarkHost.target`."""
        return target

    def why_unavailable(self, target: Target) -> str | None:
        """Return why nothing can run on ``target`` here; see `BenchmarkHost.why_unavailable`."""
        return why_unavailable(target)

    def time(self, workload: Workload, conditions: TimingConditions, progress: Progress) -> TimingResult:
        """Install what the runtime lacks, then run the session; see `BenchmarkHost.time`."""
        refuse_unavailable(conditions.target, prepare_runtime(conditions.target, progress))
        seconds = conditions.seconds_left
        deadline = None if seconds is None else time.perf_counter() + seconds
        cores = spread_cores(conditions.threads)
        session = TimingSession(workload, replace(conditions, cores=cores, deadline=deadline))
        load = load_average()
        for _ in progress.track(session, PROGRESS_LABEL, conditions.max_launches):
            pass
        return TimingResult(session.record, session.interval_half_width(), tuple(cores), load, environment())


LOCAL_HOST = LocalHost()
HostFinder = Callable[[Sequence[str], Path | None, Sequence[Path]], Mapping[str, BenchmarkHost]]
"""Signature of a plug-in's function for the extension point `hosts`, with the parameters of `find_hosts`."""


def find_hosts(names: Sequence[str], inventory: Path | None, folders: Sequence[Path]) -> Mapping[str, BenchmarkHost]:
    """Return other machines by name, through the plug-in that reaches them. Nothing is connected yet.

    Args:
        names: Names of machines, or "all".
        inventory: File that describes the machines; None looks for the usual file name in ``folders``.
        folders: Folders in which the inventory may lie, the first one that has it counts.

    Raises:
        InputError: No plug-in reaches other machines, or it knows no machine of a name.
    """
    for extension in find_extensions("hosts").values():
        finder: HostFinder | None = load_extension(extension, lambda value: value)
        if finder is not None:
            return finder(names, inventory, folders)
    what = f"No plug-in reaches other machines, such as {names[0]!r}."
    raise InputError(what, expected=explain_missing("hosts", "ssh"))
