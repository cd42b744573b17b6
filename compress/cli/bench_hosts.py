"""Benchmarks on other machines for `compress bench ARTIFACT --device NAME`, on several machines at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from compress.benchmark.host import BenchmarkHost, find_hosts
from compress.benchmark.session import BenchmarkResult
from compress.cli.console_progress import ConsoleProgress
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress, Total, expected_steps

Item = TypeVar("Item")
Measure = Callable[[BenchmarkHost, Progress], BenchmarkResult]


@dataclass
class HostResults:
    """Results of a benchmark by the name of the machine, and the errors of the machines where it failed."""

    results: dict[str, BenchmarkResult] = field(default_factory=dict)
    failures: dict[str, CompressError] = field(default_factory=dict)


def choose_hosts(names: Sequence[str], inventory: Path | None, recipe: Path | None) -> Mapping[str, BenchmarkHost]:
    """Return the machines of these names; the inventory is looked for beside ``recipe`` and in the current folder.

    Raises `InputError` for an inventory without names, and whatever `find_hosts` raises.
    """
    if not names:
        if inventory is not None:
            raise InputError("--inventory without --device.", expected="--device NAME, or --device all")
        return {}
    return find_hosts(names, inventory, [Path()] if recipe is None else [recipe.parent, Path()])


def bench_on_hosts(hosts: Mapping[str, BenchmarkHost], measure: Measure) -> HostResults:
    """Measure on all machines at once; a machine that fails does not affect the results of the others."""
    console, stopped, outcome = ConsoleProgress(), threading.Event(), HostResults()
    if len(hosts) == 1:
        ((name, host),) = hosts.items()
        outcome.results[name] = measure(host, console)
        return outcome

    def measure_on(name: str) -> BenchmarkResult:
        return measure(hosts[name], _HostProgress(console, name, stopped))

    with ThreadPoolExecutor(len(hosts)) as pool:
        running: dict[str, Future[BenchmarkResult]] = {name: pool.submit(measure_on, name) for name in hosts}
        try:
            for name, future in running.items():
                try:
                    outcome.results[name] = future.result()
                except CompressError as error:
                    outcome.failures[name] = error
        finally:
            # After Ctrl-C each session ends at its next step.
            stopped.set()
    return outcome


class _StoppedError(Exception):
    """Interruption of the benchmarks on all machines."""


class _HostProgress:
    """Progress of one machine of several. It prints lines, because several bars cannot be drawn at once."""

    def __init__(self, console: Progress, name: str, stopped: threading.Event) -> None:
        self._console, self._name, self._stopped = console, name, stopped

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` and print a line after half of them and after the last."""
        for done, item in enumerate(items, 1):
            yield item
            if self._stopped.is_set():
                raise _StoppedError(self._name)
            steps = expected_steps(total)
            if done in (steps // 2, steps):
                self._console.note(f"{self._name}: {description}: {done} of {steps}")

    def note(self, message: str) -> None:
        """Print one line; hosts put their own name into it."""
        self._console.note(message)
