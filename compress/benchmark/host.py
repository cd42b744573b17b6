"""Hosts of a timing session: this machine, or another one that returns the same record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from compress.benchmark.noise import load_average
from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import TimingSession, Workload
from compress.formats.runtime import prepare_runtime, why_unavailable
from compress.formats.target_profile import Target
from compress.plugins import explain_missing, find_extensions, load_extension
from compress.utils.environment import environment, spread_cores
from compress.utils.errors import InputError, StageError
from compress.utils.progress import Progress

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
        reason = prepare_runtime(conditions.target, progress)
        if reason is not None:
            raise StageError(f"The target {conditions.target.name!r} is not to be had here: {reason}")
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
    extensions = find_extensions("hosts").values()
    for extension in extensions:
        finder: HostFinder | None = load_extension(extension, lambda value: value)
        if finder is not None:
            return finder(names, inventory, folders)
    raise InputError(
        f"No plug-in reaches other machines, such as {names[0]!r}.", expected=explain_missing("hosts", "ssh")
    )
