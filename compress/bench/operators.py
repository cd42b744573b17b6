"""Where an artifact's time goes, operator by operator, against what this machine can do at best."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.bench.machine import last_level_cache_bytes, memory_buffer_bytes
from compress.bench.node_rows import busy_ms, node_rows, typical, whole_row
from compress.bench.noise import Snapshot, judge, load_average
from compress.bench.profile import MachineLimits, Profile
from compress.bench.profiled_calls import Calls
from compress.bench.profiled_child import FEWEST_PASSES, SETTLE_SECONDS, ProfiledChild
from compress.environment import environment, granted_cores, spread_cores
from compress.errors import InputError, StageError
from compress.formats.onnx.costs import GraphCost, count_graph
from compress.formats.onnx.runtimes.profile import CPU, CallRun, shapes_of
from compress.formats.runtimes import why_unavailable
from compress.inspect.node_layers import node_layers
from compress.numerics.statistics import bootstrap_interval
from compress.progress import Progress
from compress.targets import Target

_LIMITS_EVERY = 5
"""Passes after which the machine is measured again, so that a drift hits its limits too."""


def profile_operators(
    artifact: Path,
    calls: Calls,
    target: Target,
    threads: int,
    seconds: float,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
) -> Profile:
    """Profile ``artifact`` on ``calls`` for about ``seconds``, at least `FEWEST_PASSES` times each.

    A decoder keeps its keys and values as it does when it generates. Raises `InputError` for a target other than the
    processor, `StageError` where the process dies or hangs, and what opening the model raises.
    """
    refuse_other_devices(target)
    reason = why_unavailable(target)
    if reason is not None:
        raise StageError(f"The target {target.name!r} is not to be had here: {reason}")
    with (
        tempfile.TemporaryDirectory(prefix="compress-profile-") as scratch,
        ProfiledChild(artifact, calls, Path(scratch), timeout_seconds) as child,
    ):
        session = _Session(child, calls, threads, seconds, progress, seed)
        return session.profile(artifact, target)


def refuse_other_devices(target: Target) -> None:
    """Raises `InputError` for a target other than ONNX Runtime on the processor, whose limits are measured."""
    if target.provider != CPU:
        raise InputError(
            f"The target {target.name!r} cannot be profiled.",
            expected="a target that runs ONNX graphs on the processor, such as cpu",
            mend="`compress bench` times any target, though as a whole",
        )


class _Session:
    def __init__(
        self,
        child: ProfiledChild,
        calls: Calls,
        threads: int,
        seconds: float,
        progress: Progress,
        seed: int,
    ) -> None:
        self._child, self._work = child, calls
        self._threads, self._seconds = threads, seconds
        self._progress, self._seed = progress, seed
        self._calls = range(len(calls))
        self._buffer = memory_buffer_bytes()
        self._rates: dict[str, list[float]] = {}

    def profile(self, artifact: Path, target: Target) -> Profile:
        """Open, warm up, take passes without and with notes in turn, and put it all together."""
        cores = spread_cores(self._threads)
        self._child.open(target, self._threads, cores)
        load = load_average()
        self._child.warm_up()
        before = Snapshot.take(self._child.cpu_seconds)
        self._passes()
        usage = Snapshot.take(self._child.cpu_seconds).since(before)
        noted = self._child.end()
        costs = [self._cost(noted.graph, noted.runs[0][call], call) for call in self._calls]
        limits = self._limits(max(cost.working_set_bytes for cost in costs))
        rows = node_rows(noted.graph, noted.runs, costs, node_layers(noted.optimized), limits.roof)
        plain = np.array(self._child.plain)
        low, high = bootstrap_interval(plain, typical, self._seed)
        noise = judge(usage, {"the artifact": np.median(plain / np.median(plain, axis=0), axis=1)}, load)
        return Profile(
            artifact=str(artifact),
            target=target.name,
            threads=self._threads,
            batch_size=self._work.batch_size,
            calls=len(self._calls),
            lengths=tuple(map(self._work.length, self._calls)),
            phase=self._work.phase,
            context=self._work.context,
            passes=len(plain),
            whole=whole_row(rows, typical(plain)),
            low_ms=low,
            high_ms=high,
            profiled_ms=typical(self._child.profiled),
            operators_ms=typical([[busy_ms(call) for call in calls] for calls in noted.runs]),
            rows=rows,
            limits=limits,
            notes=(str(noise), *self._notes()),
            environment={
                **environment(),
                **{
                    "target": asdict(target),
                    "pinned_cores": list(cores),
                    "runtime_settings": self._child.settings,
                },
                "noise": {**asdict(noise), "reasons": list(noise.reasons)},
            },
            raw={
                "unprofiled_ms": tuple(map(tuple, self._child.plain)),
                "profiled_ms": tuple(map(tuple, self._child.profiled)),
            },
        )

    def _passes(self) -> None:
        """Pairs of turns until the time is over; which of the two is first alternates."""
        began = time.perf_counter()
        most = self._child.most_passes
        for number in self._progress.track(range(most), "Profiling", most):
            if number % _LIMITS_EVERY == 0:
                self._measure([self._buffer])
            self._child.pass_(noted_first=number % 2 == 1)
            if number + 1 >= FEWEST_PASSES and time.perf_counter() - began >= self._seconds:
                return

    def _measure(self, buffers: list[int]) -> None:
        time.sleep(SETTLE_SECONDS)
        reply = self._child.ask({"do": "limits", "buffers": buffers})
        self._child.cpu_seconds = reply["cpu_seconds"]
        for name in ("fp32_per_s", "int8_per_s"):
            self._rates.setdefault(name, []).extend(reply[name])
        for size, samples in reply["bytes_per_s"].items():
            name = "memory_bytes_per_s" if int(size) == self._buffer else "working_set_bytes_per_s"
            self._rates.setdefault(name, []).extend(samples)

    def _cost(self, graph: ir.Graph, run: CallRun, call: int) -> GraphCost:
        known = self._work.shapes(graph, call)
        return count_graph(graph, {**shapes_of(graph, run, known), **known})

    def _limits(self, working_set_bytes: int) -> MachineLimits:
        """The best of all samples. What lies beyond the caches is as fast as memory, whatever its size."""
        size = min(working_set_bytes, self._buffer - 1)
        for _ in range(math.ceil(len(self._child.plain) / _LIMITS_EVERY)):
            self._measure([size])
        rates = self._rates
        return MachineLimits(
            **{name: max(samples) for name, samples in rates.items()},
            memory_buffer_bytes=self._buffer,
            working_set_bytes=working_set_bytes,
            last_level_cache_bytes=last_level_cache_bytes(),
            raw={name: tuple(samples) for name, samples in rates.items()},
        )

    def _notes(self) -> list[str]:
        granted = len(granted_cores())
        return (
            [f"{self._threads} threads share the {granted} cores that are granted"] if self._threads > granted else []
        )
