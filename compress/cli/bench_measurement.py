"""Benchmarks of text generation without a recipe, and benchmarks on several other machines at once.

They serve `compress bench ARTIFACT --context N` and `compress bench ARTIFACT --device NAME`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from compress.benchmark.generation import encode_text, measure_generation
from compress.benchmark.restarts import BenchmarkHost, find_hosts
from compress.benchmark.session import BenchmarkResult
from compress.formats.model_file import format_of
from compress.formats.quiet_output import quiet_libraries
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS, find_target
from compress.recipe.recipe import Benchmark
from compress.report.progress import ConsoleProgress
from compress.report.run_folder import model_folder
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
    # One host may use the progress bars.
    if len(hosts) == 1:
        ((name, host),) = hosts.items()
        outcome.results[name] = measure(host, console)
        return outcome

    def measure_on(name: str) -> BenchmarkResult:
        return measure(hosts[name], _HostProgress(console, name, stopped))

    with ThreadPoolExecutor(len(hosts)) as pool:
        # Measure on all hosts at the same time, each in a thread that mostly waits.
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
            # Two lines for each bar keep the output of several hosts readable.
            if done in (steps // 2, steps):
                self._console.note(f"{self._name}: {description}: {done} of {steps}")

    def note(self, message: str) -> None:
        """Print one line; hosts put their own name into it."""
        self._console.note(message)

    def detail(self, message: str) -> None:
        """Print one line if `--verbose` was given."""
        self._console.detail(message)


def refuse_together(context: list[int] | None, **options: object) -> None:
    """Raise `InputError` for options that have no effect with ``--context``, or without it."""
    idle = ("recipe", "batch_size", "rate", "steps", "size") if context else ("tokens", "text")
    names = ", ".join(f"--{name.replace('_', '-')}" for name in idle if options[name] is not None)
    if names and context:
        raise InputError(
            f"{names} and --context don't go together.",
            expected="--context with --tokens, --text, --baseline, --target, --threads, --seconds or --budget",
        )
    if names:
        raise InputError(
            f"{names} without --context.",
            expected="--context N, the tokens of a prompt, to time text generation",
        )


def generation_bench(
    artifact: Path, baseline: Path | None, text: Path | None, target: str, settings: Benchmark
) -> Measure:
    """Return a function that times one artifact, or two interleaved, on a host. Raises the errors of `encode_text`.

    Args:
        artifact: Artifact that is timed.
        baseline: Artifact to compare with.
        text: File whose text is the prompt, or None for random tokens.
        target: Name of the target.
        settings: Benchmark settings.
    """
    runtime_target = find_target(target)
    quiet_libraries()
    artifacts = {"artifact": artifact} if baseline is None else {"baseline": baseline, "artifact": artifact}
    folders = {label: model_folder(path) or path for label, path in artifacts.items()}
    # A file in another format runs on the first target that opens it.
    other_targets = targets_of_other_formats(folders, runtime_target)
    longest = max(settings.contexts)
    texts = {} if text is None else {label: encode_text(folder, text, longest) for label, folder in folders.items()}
    progress = ConsoleProgress()
    for label, other in other_targets.items():
        progress.note(
            f"{label} is {other.format.upper()}, which {runtime_target.name} does not open; it runs on {other.name}"
        )
    reference = next(iter(folders))

    def measure(where: BenchmarkHost, shown: Progress) -> BenchmarkResult:
        return measure_generation(
            folders, texts, runtime_target, settings, reference, shown, seed=0, other_targets=other_targets, host=where
        )

    return measure


def targets_of_other_formats(folders: Mapping[str, Path], target: Target) -> dict[str, Target]:
    """Return the first target that can open the artifact, for each artifact that ``target`` cannot open."""
    formats = {label: format_of(folder) for label, folder in folders.items()}
    return {
        label: next(other for other in TARGETS.values() if other.format == form)
        for label, form in formats.items()
        if form != target.format
    }
