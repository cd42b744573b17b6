"""Where a session's launches are made: on this machine, or on another one that answers with the same record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from compress.benchmark.noise import load_average
from compress.benchmark.record import Conditions, Record
from compress.benchmark.restarts import TimingSession, Workload
from compress.formats.runtimes import make_ready, why_unavailable
from compress.formats.target_profile import Target
from compress.plugins import explain_missing, find_extensions, load_extension
from compress.utils.environment import environment, spread_cores
from compress.utils.errors import InputError, StageError
from compress.utils.progress import Progress

TRACKED = "Timing, launches of all models"


@dataclass(frozen=True)
class Timed:
    """What the launches brought in, and what the machine was that made them.

    ``precision`` is that of `TimingSession.precision`; ``cores`` are those that processes were pinned to; ``load`` is the
    load average before the start.
    """

    record: Record
    precision: float
    cores: tuple[int, ...]
    load: float | None
    environment: dict[str, Any]


class LaunchHost(Protocol):
    """A machine that makes launches."""

    def target(self, target: Target) -> Target:
        """How rows name that target at this place."""

    def why_unavailable(self, target: Target) -> str | None:
        """Why nothing can run on ``target`` there, or ``None``."""

    def time(self, workload: Workload, conditions: Conditions, progress: Progress) -> Timed:
        """Make the launches of `TimingSession`; raises what those raise."""


class Here:
    """This machine."""

    def target(self, target: Target) -> Target:
        """See `LaunchHost.target`: as it stands."""
        return target

    def why_unavailable(self, target: Target) -> str | None:
        """See `LaunchHost.why_unavailable`."""
        return why_unavailable(target)

    def time(self, workload: Workload, conditions: Conditions, progress: Progress) -> Timed:
        """See `LaunchHost.time`; what the runtime is missing is fetched first."""
        reason = make_ready(conditions.target, progress)
        if reason is not None:
            raise StageError(f"The target {conditions.target.name!r} is not to be had here: {reason}")
        left = conditions.seconds_left
        deadline = None if left is None else time.perf_counter() + left
        cores = spread_cores(conditions.threads)
        launches = TimingSession(workload, replace(conditions, cores=cores, deadline=deadline))
        load = load_average()
        for _ in progress.track(launches, TRACKED, conditions.max_launches):
            pass
        return Timed(launches.record, launches.interval_half_width(), tuple(cores), load, environment())


HERE = Here()
HostFinder = Callable[[Sequence[str], Path | None, Sequence[Path]], Mapping[str, LaunchHost]]
"""Signature of a plug-in's function for the extension point `hosts`, with the parameters of `find_hosts`."""


def find_hosts(names: Sequence[str], inventory: Path | None, folders: Sequence[Path]) -> Mapping[str, LaunchHost]:
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
    raise InputError(f"No plug-in reaches other machines, such as {names[0]!r}.", hint=explain_missing("hosts", "ssh"))
