"""Profile of an artifact: the time of each operator, and the limits of the machine."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from compress.benchmark.machine import last_level_cache_bytes, memory_buffer_bytes
from compress.benchmark.noise import Usage, judge_noise, load_average
from compress.benchmark.profile import MachineLimits, OperatorProfile, ProfileRow, total
from compress.benchmark.profile_worker import FEWEST_PASSES, SETTLE_SECONDS, ProfiledProcess
from compress.benchmark.profiled_calls import ProfiledCalls
from compress.formats.onnx.costs import GraphCost, count_graph
from compress.formats.onnx.runtimes.profile import CPU, CallRun, original_name, shapes_of
from compress.formats.runtime import refuse_unavailable, why_unavailable
from compress.formats.target_profile import Target
from compress.inspection.layers import node_layers
from compress.numerics.roofline import Roof, least_time
from compress.numerics.statistics import bootstrap_interval
from compress.utils.environment import environment, granted_cores, spread_cores
from compress.utils.errors import InputError
from compress.utils.progress import Progress


def node_rows(
    graph: ir.Graph,
    runs: Sequence[Sequence[CallRun]],
    costs: Sequence[GraphCost],
    layers: Mapping[str, str],
    roof: Roof,
) -> tuple[ProfileRow, ...]:
    """Return one row for each node of ``graph`` that ran, in its order.

    Args:
        graph: Graph that the runtime ran.
        runs: Times of nodes, [passes][calls]. A node's time is the `typical_time`.
        costs: Operations and bytes of nodes, [calls].
        layers: Layer of each node.
        roof: Limits of the machine.
    """
    rows, calls = [], len(costs)
    for name, operator in ((str(node.name), node.op_type) for node in graph):
        # Nodes that the runtime fused or folded away have no times.
        if not all(name in run for run in runs[0]):
            continue
        time_ms = typical_time([[run[name].microseconds for run in pass_runs] for pass_runs in runs]) / 1e3
        known_costs = [cost for cost in (graph_cost.nodes[name] for graph_cost in costs) if cost is not None]
        # A sum over some of the calls would look like the cost of all of them.
        if len(known_costs) < calls:
            known_costs = []
        limits = [least_time(roof, *cost.operations, cost.total_bytes) for cost in known_costs]
        row = ProfileRow(
            name=original_name(name),
            operators=(operator,),
            layer=layers[name],
            nodes=1,
            time_ms=time_ms,
            uncounted_ms=0.0 if known_costs else time_ms,
            fp32_operations=sum(cost.operations.fp32 for cost in known_costs) / calls,
            int8_operations=sum(cost.operations.int8 for cost in known_costs) / calls,
            weight_bytes=sum(cost.weight_bytes for cost in known_costs) / calls,
            activation_bytes=sum(cost.activation_bytes for cost in known_costs) / calls,
            compute_bound_ms=1e3 * sum(bound.seconds for bound in limits if bound.compute_s >= bound.memory_s) / calls,
            memory_bound_ms=1e3 * sum(bound.seconds for bound in limits if bound.compute_s < bound.memory_s) / calls,
        )
        rows.append(row)
    return tuple(rows)


def typical_time(times: ArrayLike) -> float:
    """Return the median over passes of each call, then the mean over calls, of times [passes, calls].

    A disturbance affects some passes of a call, and does not change its median.
    """
    return float(np.median(np.asarray(times, dtype=np.float64), axis=0).mean())


def operator_ms(call: CallRun) -> float:
    """Return the time during which an operator ran in one call, in ms."""
    return sum(run.microseconds for run in call.values()) / 1e3


def whole_row(rows: Sequence[ProfileRow], time_ms: float) -> ProfileRow:
    """Return the sum of all nodes, with the time that a call takes without profiling.

    Operators without known costs have the same share of it as of the profiled time.
    """
    summed = total("whole model", rows)
    share = summed.uncounted_ms / summed.time_ms if summed.time_ms else 0.0
    return summed.model_copy(update={"time_ms": time_ms, "uncounted_ms": share * time_ms, "layer": None})


_LIMITS_EVERY = 5
"""Number of passes after which the machine is measured again, so that a drift affects its limits too."""


def profile_operators(
    artifact: Path,
    calls: ProfiledCalls,
    target: Target,
    threads: int,
    seconds: float,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
) -> OperatorProfile:
    """Profile ``artifact`` on ``calls`` for about ``seconds``, at least `FEWEST_PASSES` times each.

    A decoder keeps its keys and values as it does in generation.

    Args:
        artifact: Model folder or file.
        calls: Batches, prompts or tokens that are profiled.
        target: Target on the processor.
        threads: Number of threads.
        seconds: Time for all passes.
        progress: Progress display.
        seed: Seed of the bootstrap.
        timeout_seconds: Longest wait for one answer of the process.

    Raises:
        InputError: The target is not the processor.
        StageError: The process died or hung.
    """
    refuse_other_devices(target)
    refuse_unavailable(target, why_unavailable(target))
    with (
        tempfile.TemporaryDirectory(prefix="compress-profile-") as scratch,
        ProfiledProcess(artifact, calls, Path(scratch), timeout_seconds) as child,
    ):
        return _Session(child, calls, threads, seconds, progress, seed).profile(artifact, target)


def refuse_other_devices(target: Target) -> None:
    """Raise `InputError` for a target other than ONNX Runtime on the processor, whose limits are measured."""
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

    def profile(self, artifact: Path, target: Target) -> OperatorProfile:
        """Open the model, warm up, run passes with and without profiling alternately, and return the profile."""
        cores, load = spread_cores(self.threads), load_average()
        self.child.open_twice(target, self.threads, cores)
        usage = self._run_passes()
        node_profile = self.child.end()
        graph, costs = node_profile.graph, []
        for call, run in enumerate(node_profile.runs[0]):
            shapes = self.work.shapes(graph, call)
            costs.append(count_graph(graph, {**shapes_of(graph, run, shapes), **shapes}))
        limits = self._limits(max(cost.working_set_bytes for cost in costs))
        rows = node_rows(graph, node_profile.runs, costs, node_layers(node_profile.optimized), limits.roof)
        unprofiled = np.array(self.child.unprofiled_ms)
        # The profiler slows the model, so the total comes from passes without it.
        low_ms, high_ms = bootstrap_interval(unprofiled, typical_time, self.seed)
        relative_rounds = np.median(unprofiled / np.median(unprofiled, axis=0), axis=1)
        noise = judge_noise(usage, {"the artifact": relative_rounds}, load)
        notes = [str(noise)]
        if self.threads > (granted := len(granted_cores())):
            notes.append(f"{self.threads} threads share the {granted} available cores")
        return OperatorProfile(
            artifact=str(artifact),
            target=target.name,
            threads=self.threads,
            batch_size=self.work.batch_size,
            calls=len(self.work),
            lengths=tuple(map(self.work.length, range(len(self.work)))),
            phase=self.work.phase,
            context=self.work.context,
            passes=len(unprofiled),
            whole=whole_row(rows, typical_time(unprofiled)),
            low_ms=low_ms,
            high_ms=high_ms,
            profiled_ms=typical_time(self.child.profiled_ms),
            operators_ms=typical_time([[operator_ms(call) for call in calls] for calls in node_profile.runs]),
            rows=rows,
            limits=limits,
            notes=tuple(notes),
            environment={
                **environment(),
                "target": asdict(target),
                "pinned_cores": list(cores),
                "runtime_settings": self.child.settings,
                "noise": {**asdict(noise), "reasons": list(noise.reasons)},
            },
            raw={
                "unprofiled_ms": tuple(map(tuple, self.child.unprofiled_ms)),
                "profiled_ms": tuple(map(tuple, self.child.profiled_ms)),
            },
        )

    def _run_passes(self) -> Usage:
        """Run passes with and without profiling alternately, and return the change of the machine's counters."""
        self.child.warm_up()
        most = self.child.most_passes
        usage_before, began = Usage.now(self.child.cpu_seconds), time.perf_counter()
        for number in self.progress.track(range(most), "Profiling", most):
            if number % _LIMITS_EVERY == 0:
                self._measure([self.buffer])
            self.child.run_pass(profiled_first=number % 2 == 1)
            if number + 1 >= FEWEST_PASSES and time.perf_counter() - began >= self.seconds:
                break
        return Usage.now(self.child.cpu_seconds) - usage_before

    def _measure(self, buffers: list[int]) -> None:
        time.sleep(SETTLE_SECONDS)
        reply = self.child.ask({"do": "limits", "buffers": buffers})
        for name in ("fp32_per_s", "int8_per_s"):
            self.rates.setdefault(name, []).extend(reply[name])
        for size, samples in reply["bytes_per_s"].items():
            name = "memory_bytes_per_s" if int(size) == self.buffer else "working_set_bytes_per_s"
            self.rates.setdefault(name, []).extend(samples)

    def _limits(self, working_set_bytes: int) -> MachineLimits:
        """Return the best of all samples. Beyond the caches, bandwidth is that of memory for any size."""
        # The working set decides which cache level limits the model.
        size = min(working_set_bytes, self.buffer - 1)
        for _ in range(math.ceil(len(self.child.unprofiled_ms) / _LIMITS_EVERY)):
            self._measure([size])
        rates = self.rates
        return MachineLimits(
            **{name: max(samples) for name, samples in rates.items()},
            memory_buffer_bytes=self.buffer,
            working_set_bytes=working_set_bytes,
            last_level_cache_bytes=last_level_cache_bytes(),
            raw={name: tuple(samples) for name, samples in rates.items()},
        )
