"""Where an artifact's time goes, operator by operator, against what this machine can do at best."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from compress.benchmark.machine import last_level_cache_bytes, memory_buffer_bytes
from compress.benchmark.noise import judge_noise, load_average
from compress.benchmark.profile import MachineLimits, Profile, ProfileRow, total
from compress.benchmark.profile_worker import SETTLE_SECONDS, ProfiledProcess, run_interleaved
from compress.benchmark.profiled_calls import ProfiledCalls
from compress.formats.onnx.costs import Cost, GraphCost, count_graph
from compress.formats.onnx.runtimes.profile import CPU, CallRun, own_name, shapes_of
from compress.formats.runtimes import why_unavailable
from compress.formats.target_profile import Target
from compress.inspection.node_layers import node_layers
from compress.numerics.roofline import Roof, limit
from compress.numerics.statistics import bootstrap_interval
from compress.utils.environment import environment, granted_cores, spread_cores
from compress.utils.errors import InputError, StageError
from compress.utils.progress import Progress


def node_rows(
    graph: ir.Graph,
    runs: Sequence[Sequence[CallRun]],
    costs: Sequence[GraphCost],
    layers: Mapping[str, str],
    roof: Roof,
) -> tuple[ProfileRow, ...]:
    """One row for each node of ``graph`` that ran, in its order.

    ``runs`` are [passes][calls] and ``costs`` [calls]. A node's time is that of `typical_time`.
    """
    ran = [node for node in graph if all(str(node.name) in run for run in runs[0])]
    return tuple(
        _row(
            str(node.name),
            node.op_type,
            layers[str(node.name)],
            [[run[str(node.name)].microseconds for run in calls] for calls in runs],
            [cost.nodes[str(node.name)] for cost in costs],
            roof,
        )
        for node in ran
    )


def typical_time(times: ArrayLike) -> float:
    """Median over passes of each call, then the mean over calls, of [passes, calls].

    A disturbance hits some passes of a call and so leaves its median alone.
    """
    return float(np.median(np.asarray(times, dtype=np.float64), axis=0).mean())


def operator_ms(call: CallRun) -> float:
    """How long an operator was at work in one call."""
    return sum(run.microseconds for run in call.values()) / 1e3


def whole_row(rows: Sequence[ProfileRow], time_ms: float) -> ProfileRow:
    """All nodes together, in the ``time_ms`` that a call takes without profiling.

    The operators that are not counted take the share of it that they have of the profiled time.
    """
    summed = total("whole model", rows)
    share = summed.uncounted_ms / summed.time_ms if summed.time_ms else 0.0
    return summed.model_copy(update={"time_ms": time_ms, "uncounted_ms": share * time_ms, "layer": None})


def _row(
    name: str,
    operator: str,
    layer: str,
    microseconds: Sequence[Sequence[int]],
    costs: Sequence[Cost | None],
    roof: Roof,
) -> ProfileRow:
    time_ms = typical_time(microseconds) / 1e3
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        known = []
    limits = [limit(roof, *cost.operations, cost.moved_bytes) for cost in known]
    calls = len(costs)
    return ProfileRow(
        name=own_name(name),
        operators=(operator,),
        layer=layer,
        nodes=1,
        time_ms=time_ms,
        uncounted_ms=0.0 if known else time_ms,
        fp32_operations=sum(cost.operations.fp32 for cost in known) / calls,
        int8_operations=sum(cost.operations.int8 for cost in known) / calls,
        weight_bytes=sum(cost.weight_bytes for cost in known) / calls,
        activation_bytes=sum(cost.activation_bytes for cost in known) / calls,
        compute_bound_ms=1e3 * sum(each.seconds for each in limits if each.compute_s >= each.memory_s) / calls,
        memory_bound_ms=1e3 * sum(each.seconds for each in limits if each.compute_s < each.memory_s) / calls,
    )


_LIMITS_EVERY = 5
"""Passes after which the machine is measured again, so that a drift hits its limits too."""


def profile_operators(
    artifact: Path,
    calls: ProfiledCalls,
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
        ProfiledProcess(artifact, calls, Path(scratch), timeout_seconds) as child,
    ):
        session = _Session(child, calls, threads, seconds, progress, seed)
        return session.profile(artifact, target)


def refuse_other_devices(target: Target) -> None:
    """Raises `InputError` for a target other than ONNX Runtime on the processor, whose limits are measured."""
    if target.provider != CPU:
        raise InputError(
            f"The target {target.name!r} cannot be profiled.",
            expected="a target that runs ONNX graphs on the processor, such as cpu",
            hint="`compress bench` times any target, though as a whole",
        )


@dataclass
class _Session:
    child: ProfiledProcess
    work: ProfiledCalls
    threads: int
    seconds: float
    progress: Progress
    seed: int
    buffer: int = field(default_factory=memory_buffer_bytes)
    rates: dict[str, list[float]] = field(default_factory=dict)

    def profile(self, artifact: Path, target: Target) -> Profile:
        """Open, warm up, take passes without and with notes in turn, and put it all together."""
        cores = spread_cores(self.threads)
        load = load_average()
        usage = run_interleaved([self.child], target, self.threads, cores, self.seconds, self._numbers)
        noted = self.child.end()
        costs = [self._cost(noted.graph, noted.runs[0][call], call) for call in range(len(self.work))]
        limits = self._limits(max(cost.working_set_bytes for cost in costs))
        rows = node_rows(noted.graph, noted.runs, costs, node_layers(noted.optimized), limits.roof)
        plain = np.array(self.child.plain)
        low, high = bootstrap_interval(plain, typical_time, self.seed)
        noise = judge_noise(usage, {"the artifact": np.median(plain / np.median(plain, axis=0), axis=1)}, load)
        return Profile(
            artifact=str(artifact),
            target=target.name,
            threads=self.threads,
            batch_size=self.work.batch_size,
            calls=len(self.work),
            lengths=tuple(map(self.work.length, range(len(self.work)))),
            phase=self.work.phase,
            context=self.work.context,
            passes=len(plain),
            whole=whole_row(rows, typical_time(plain)),
            low_ms=low,
            high_ms=high,
            profiled_ms=typical_time(self.child.profiled),
            operators_ms=typical_time([[operator_ms(call) for call in calls] for calls in noted.runs]),
            rows=rows,
            limits=limits,
            notes=(str(noise), *self._notes()),
            environment={
                **environment(),
                "target": asdict(target),
                "pinned_cores": list(cores),
                "runtime_settings": self.child.settings,
                "noise": {**asdict(noise), "reasons": list(noise.reasons)},
            },
            raw={
                "unprofiled_ms": tuple(map(tuple, self.child.plain)),
                "profiled_ms": tuple(map(tuple, self.child.profiled)),
            },
        )

    def _numbers(self, most: int) -> Iterator[int]:
        """Of the passes, with the machine measured now and then before one."""
        for number in self.progress.track(range(most), "Profiling", most):
            if number % _LIMITS_EVERY == 0:
                self._measure([self.buffer])
            yield number

    def _measure(self, buffers: list[int]) -> None:
        time.sleep(SETTLE_SECONDS)
        reply = self.child.request({"do": "limits", "buffers": buffers})
        self.child.cpu_seconds = reply["cpu_seconds"]
        for name in ("fp32_per_s", "int8_per_s"):
            self.rates.setdefault(name, []).extend(reply[name])
        for size, samples in reply["bytes_per_s"].items():
            name = "memory_bytes_per_s" if int(size) == self.buffer else "working_set_bytes_per_s"
            self.rates.setdefault(name, []).extend(samples)

    def _cost(self, graph: ir.Graph, run: CallRun, call: int) -> GraphCost:
        known = self.work.shapes(graph, call)
        return count_graph(graph, {**shapes_of(graph, run, known), **known})

    def _limits(self, working_set_bytes: int) -> MachineLimits:
        """The best of all samples. What lies beyond the caches is as fast as memory, whatever its size."""
        size = min(working_set_bytes, self.buffer - 1)
        for _ in range(math.ceil(len(self.child.plain) / _LIMITS_EVERY)):
            self._measure([size])
        rates = self.rates
        return MachineLimits(
            **{name: max(samples) for name, samples in rates.items()},
            memory_buffer_bytes=self.buffer,
            working_set_bytes=working_set_bytes,
            last_level_cache_bytes=last_level_cache_bytes(),
            raw={name: tuple(samples) for name, samples in rates.items()},
        )

    def _notes(self) -> list[str]:
        granted = len(granted_cores())
        return [f"{self.threads} threads share the {granted} cores that are granted"] if self.threads > granted else []
