"""Where an artifact's time goes, operator by operator, against what this machine can do at best."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.bench.child import Child
from compress.bench.machine import last_level_cache_bytes, memory_buffer_bytes
from compress.bench.node_rows import busy_ms, node_rows, typical, whole_row
from compress.bench.noise import Snapshot, judge, load_average
from compress.bench.profile import MachineLimits, Profile
from compress.bench.profiled_calls import Calls
from compress.bench.worker import write_batches
from compress.environment import environment, granted_cores, spread_cores
from compress.errors import InputError, StageError
from compress.inspect.node_layers import node_layers
from compress.models.onnx_costs import GraphCost, count_graph
from compress.numerics.statistics import bootstrap_interval
from compress.progress import Progress
from compress.runtimes import why_unavailable
from compress.runtimes.onnxruntime_profile import CPU, CallRun, read_profile, shapes_of
from compress.targets import Target

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from compress.bench.profile_worker import main; main()"
)
FEWEST_PASSES = 7
_WARM_UP_PASSES = 3
_UNTIMED = 2
_SETTLE_SECONDS = 0.02
_MOST_EVENTS = 60_000
"""ONNX Runtime keeps every event until the end, and each is a kilobyte of JSON."""
_LIMITS_EVERY = 5
"""Passes after which the machine is measured again, so that a drift hits its limits too."""


@dataclass
class _Taken:
    """What the process answered: ms by pass and call, and the rates of the machine."""

    plain: list[list[float]] = field(default_factory=list)
    profiled: list[list[float]] = field(default_factory=list)
    order: list[int | None] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: float = 0.0


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
    command = [sys.executable, "-P", "-c", _START, json.dumps(sys.path)]
    with (
        tempfile.TemporaryDirectory(prefix="compress-profile-") as scratch,
        Child(artifact.name, command) as child,
    ):
        session = _Session(child, Path(scratch), calls, threads, seconds, progress, timeout_seconds, seed)
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
        child: Child,
        scratch: Path,
        calls: Calls,
        threads: int,
        seconds: float,
        progress: Progress,
        timeout_seconds: float,
        seed: int,
    ) -> None:
        self._child, self._scratch, self._work = child, scratch, calls
        self._threads, self._seconds = threads, seconds
        self._progress, self._timeout, self._seed = progress, timeout_seconds, seed
        self._calls = list(range(len(calls)))
        self._buffer = memory_buffer_bytes()
        self._taken = _Taken()

    def profile(self, artifact: Path, target: Target) -> Profile:
        """Open, warm up, take passes without and with notes in turn, and put it all together."""
        cores = spread_cores(self._threads)
        opened = self._open(artifact, target, cores)
        load = load_average()
        self._warm_up()
        before = Snapshot.take(self._taken.cpu_seconds)
        self._passes(opened["nodes"])
        usage = Snapshot.take(self._taken.cpu_seconds).since(before)
        ended = self._child.ask({"do": "end"}, self._timeout)
        optimized = Path(ended["optimized"])
        runs = self._runs(read_profile(Path(ended["profile"])))
        graph = ir.load(optimized).graph
        costs = [self._cost(graph, runs[0][call], call) for call in self._calls]
        limits = self._limits(max(cost.working_set_bytes for cost in costs))
        rows = node_rows(graph, runs, costs, node_layers(optimized), limits.roof)
        plain = np.array(self._taken.plain)
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
            profiled_ms=typical(self._taken.profiled),
            operators_ms=typical([[busy_ms(call) for call in calls] for calls in runs]),
            rows=rows,
            limits=limits,
            notes=(str(noise), *self._notes()),
            environment={
                **environment(),
                **{"target": asdict(target), "pinned_cores": list(cores), "runtime_settings": opened["settings"]},
                "noise": {**asdict(noise), "reasons": list(noise.reasons)},
            },
            raw={
                "unprofiled_ms": tuple(map(tuple, self._taken.plain)),
                "profiled_ms": tuple(map(tuple, self._taken.profiled)),
            },
        )

    def _open(self, artifact: Path, target: Target, cores: Sequence[int]) -> dict[str, Any]:
        path = self._scratch / "batches.npz"
        write_batches(path, self._work.batches)
        message = {"do": "open", "artifact": str(artifact.absolute()), "target": asdict(target)}
        own = {"threads": self._threads, "cores": list(cores), "batches": str(path), "folder": str(self._scratch)}
        own["text"] = None if self._work.phase == "batch" else self._work.prompt
        return self._child.ask({**message, **own}, self._timeout)

    def _turn(self, profiled: bool) -> list[float]:
        time.sleep(_SETTLE_SECONDS)
        begin = bool(self._work.prompt)
        untimed = 0 if begin else min(_UNTIMED, len(self._calls))
        message = {"do": "turn", "profiled": profiled, "calls": self._calls, "begin": begin, "untimed": untimed}
        reply = self._child.ask(message, self._timeout)
        self._taken.cpu_seconds = reply["cpu_seconds"]
        latencies: list[float] = reply["latencies_ms"]
        if profiled:
            self._taken.order += [None] * (begin + untimed) + list(self._calls)
        return latencies

    def _warm_up(self) -> None:
        for _ in range(_WARM_UP_PASSES):
            self._turn(False)
            self._turn(True)
        self._taken.order = [None] * len(self._taken.order)

    def _passes(self, nodes: int) -> None:
        """Pairs of turns until the time is over; which of the two is first alternates."""
        began = time.perf_counter()
        most = max(FEWEST_PASSES, _MOST_EVENTS // (nodes * (len(self._calls) + _UNTIMED)))
        for number in self._progress.track(range(most), "Profiling", most):
            if number % _LIMITS_EVERY == 0:
                self._measure([self._buffer])
            for profiled in (False, True) if number % 2 == 0 else (True, False):
                (self._taken.profiled if profiled else self._taken.plain).append(self._turn(profiled))
            if number + 1 >= FEWEST_PASSES and time.perf_counter() - began >= self._seconds:
                return

    def _measure(self, buffers: list[int]) -> None:
        time.sleep(_SETTLE_SECONDS)
        reply = self._child.ask({"do": "limits", "buffers": buffers}, self._timeout)
        self._taken.cpu_seconds = reply["cpu_seconds"]
        for name in ("fp32_per_s", "int8_per_s"):
            self._taken.rates.setdefault(name, []).extend(reply[name])
        for size, samples in reply["bytes_per_s"].items():
            name = "memory_bytes_per_s" if int(size) == self._buffer else "working_set_bytes_per_s"
            self._taken.rates.setdefault(name, []).extend(samples)

    def _runs(self, calls: list[CallRun]) -> list[list[CallRun]]:
        """[passes][calls], without the calls that warmed up."""
        order = self._taken.order
        if len(calls) != len(order):
            raise StageError(f"ONNX Runtime noted {len(calls)} calls of {len(order)}.", where="its profile")
        kept = [run for run, index in zip(calls, order, strict=True) if index is not None]
        size = len(self._calls)
        return [kept[start : start + size] for start in range(0, len(kept), size)]

    def _cost(self, graph: ir.Graph, run: CallRun, call: int) -> GraphCost:
        known = self._work.shapes(graph, call)
        return count_graph(graph, {**shapes_of(graph, run, known), **known})

    def _limits(self, working_set_bytes: int) -> MachineLimits:
        """The best of all samples. What lies beyond the caches is as fast as memory, whatever its size."""
        size = min(working_set_bytes, self._buffer - 1)
        for _ in range(math.ceil(len(self._taken.plain) / _LIMITS_EVERY)):
            self._measure([size])
        rates = self._taken.rates
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
