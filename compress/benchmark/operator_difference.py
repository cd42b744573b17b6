"""Comparison of an 8-bit file with its float file, layer by layer: both are profiled in interleaved passes."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.benchmark.noise import judge_noise, load_average
from compress.benchmark.operators import refuse_other_devices, typical_time
from compress.benchmark.profile import CauseDifference, LayerDifference, OperatorDifference
from compress.benchmark.profile_worker import NodeProfile, ProfiledProcess, run_interleaved
from compress.benchmark.profiled_calls import ProfiledCalls
from compress.formats.onnx.model import find_graph
from compress.formats.target_profile import Target
from compress.inspection.integer_kernels import (
    APART,
    FASTER,
    OTHER,
    Part,
    SlowdownCause,
    conversion_cause,
    part_of,
    product_cause,
)
from compress.inspection.layers import UNNAMED, layers_of, node_modules, origins_in
from compress.numerics.statistics import bootstrap_interval, geometric_interval
from compress.utils.environment import environment, spread_cores
from compress.utils.progress import Progress

_MOST_LAYERS = 200
_RESAMPLES = 300
Times = np.ndarray
"""Times in ms, [passes, calls]."""


@dataclass(frozen=True)
class _File:
    """Nodes of one file by layer, and every node's times."""

    nodes: Mapping[str, list[ir.Node]]
    times: Mapping[str, Times]

    def sum(self, nodes: list[ir.Node], shape: tuple[int, ...]) -> Times:
        # Nodes that did not run have no times.
        return sum((self.times[str(node.name)] for node in nodes if str(node.name) in self.times), np.zeros(shape))

    def typical(self, node: ir.Node) -> float:
        times = self.times.get(str(node.name))
        return 0.0 if times is None else typical_time(times)


def compare_operators(
    float_file: Path,
    int8_file: Path,
    calls: ProfiledCalls,
    target: Target,
    threads: int,
    seconds: float,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
) -> OperatorDifference:
    """Profile two files on the same ``calls``, interleaved, for about ``seconds``; at least `FEWEST_PASSES` times each.

    Args:
        float_file: Float model.
        int8_file: Model of 8-bit integers.
        calls: Batches, prompts or tokens that are profiled.
        target: Target on the processor.
        threads: Number of threads.
        seconds: Time for all passes.
        progress: Progress display.
        seed: Seed of the bootstrap.
        timeout_seconds: Longest wait for one answer of a process.

    Raises:
        InputError: The target is not the processor.
        StageError: A process died or hung.
    """
    refuse_other_devices(target)
    cores, load = spread_cores(threads), load_average()
    with (
        tempfile.TemporaryDirectory(prefix="compress-compare-") as float_scratch,
        tempfile.TemporaryDirectory(prefix="compress-compare-") as int8_scratch,
        ProfiledProcess(float_file, calls, Path(float_scratch), timeout_seconds) as float_process,
        ProfiledProcess(int8_file, calls, Path(int8_scratch), timeout_seconds) as int8_process,
    ):
        children = (float_process, int8_process)

        def numbers(most: int) -> Iterable[int]:
            return progress.track(range(most), "Profiling both files", most)

        usage = run_interleaved(children, target, threads, cores, seconds, numbers)
        profiles = [child.end() for child in children]
        files = [_file(*pair) for pair in zip(profiles, _layers(float_file, profiles), strict=True)]
        unprofiled = [np.array(child.unprofiled_ms) for child in children]
        # The graphs' weights lie in the folders.
        layer_differences, causes = _differences(files[0], files[1], unprofiled[0].shape, seed)
    rounds = {
        name: np.median(times / np.median(times, axis=0), axis=1) for name, times in zip("ab", unprofiled, strict=True)
    }
    # Each pass times both files one after the other, so the ratio within a pass is less noisy than the times.
    speedup = geometric_interval(np.median(unprofiled[0] / unprofiled[1], axis=1))
    return OperatorDifference(
        float_file=str(float_file),
        int8_file=str(int8_file),
        target=target.name,
        threads=threads,
        batch_size=calls.batch_size,
        calls=len(calls),
        lengths=tuple(map(calls.length, range(len(calls)))),
        passes=len(unprofiled[0]),
        float_ms=typical_time(unprofiled[0]),
        int8_ms=typical_time(unprofiled[1]),
        faster=speedup.value,
        low=speedup.low,
        high=speedup.high,
        layers=layer_differences,
        causes=causes,
        notes=(str(judge_noise(usage, rounds, load)),),
        environment={**environment(), "target": asdict(target), "pinned_cores": list(cores)},
    )


def _layers(float_file: Path, profiles: Sequence[NodeProfile]) -> list[dict[str, str]]:
    """Return node -> layer of each file, with the same layer names."""
    origins = origins_in(find_graph(float_file))
    files = [node_modules(profile.optimized, origins) for profile in profiles]
    named = layers_of(dict.fromkeys(name for file in files for name in file.values() if name), _MOST_LAYERS)
    return [{node: named.get(module, UNNAMED) for node, module in file.items()} for file in files]


def _file(noted: NodeProfile, layers: Mapping[str, str]) -> _File:
    nodes: dict[str, list[ir.Node]] = defaultdict(list)
    times = {}
    for node in noted.graph:
        name = str(node.name)
        nodes[layers[name]].append(node)
        if all(name in call for call in noted.runs[0]):
            times[name] = np.array([[call[name].microseconds for call in calls] for calls in noted.runs]) / 1e3
    return _File(nodes, times)


def _differences(
    float_file: _File, int8_file: _File, shape: tuple[int, ...], seed: int
) -> tuple[tuple[LayerDifference, ...], tuple[CauseDifference, ...]]:
    """Return the difference of each layer and of each cause.

    Args:
        float_file: Float file.
        int8_file: 8-bit file.
        shape: [passes, calls].
        seed: Seed of the bootstrap.
    """
    layers = []
    totals: dict[SlowdownCause, float] = defaultdict(float)
    layers_by_cause: dict[SlowdownCause, dict[str, None]] = defaultdict(dict)
    operators: dict[SlowdownCause, dict[str, None]] = defaultdict(dict)
    for layer in dict.fromkeys((*float_file.nodes, *int8_file.nodes)):
        old, new = float_file.nodes.get(layer, []), int8_file.nodes.get(layer, [])
        paired = int8_file.sum(new, shape) - float_file.sum(old, shape)
        low, high = bootstrap_interval(paired, typical_time, seed, resamples=_RESAMPLES)
        shares = _shares(float_file, int8_file, old, new, shape)
        for cause, (more, names) in shares.items():
            totals[cause] += more
            layers_by_cause[cause][layer] = None
            operators[cause] |= dict.fromkeys(names)
        difference = {cause: more for cause, (more, _) in shares.items()}
        extreme = max if typical_time(paired) > 0 else min
        main_cause = extreme(difference, key=difference.__getitem__) if shares else OTHER
        layers.append(
            LayerDifference(
                layer=layer,
                float_ms=typical_time(float_file.sum(old, shape)),
                int8_ms=typical_time(int8_file.sum(new, shape)),
                more_ms=typical_time(paired),
                low_ms=low,
                high_ms=high,
                operators=_costliest(int8_file, new),
                why=main_cause.why,
                help=main_cause.help,
            )
        )
    causes = []
    for cause, more in totals.items():
        places = {"layers": tuple(layers_by_cause[cause]), "operators": tuple(operators[cause])}
        causes.append(CauseDifference(why=cause.why, help=cause.help, more_ms=more, **places))
    layers.sort(key=lambda layer: -layer.more_ms)
    causes.sort(key=lambda cause: -cause.more_ms)
    return tuple(layers), tuple(causes)


def _shares(
    float_file: _File, int8_file: _File, old: list[ir.Node], new: list[ir.Node], shape: tuple[int, ...]
) -> dict[SlowdownCause, tuple[float, list[str]]]:
    """Return cause -> the ms that it adds to a layer, and its operators. Conversions have no counterpart in float.

    Args:
        float_file: Float file.
        int8_file: 8-bit file.
        old: Nodes of the layer in the float file.
        new: Nodes of the layer in the 8-bit file.
        shape: [passes, calls].
    """
    shares: dict[SlowdownCause, tuple[float, list[str]]] = {}

    def add(cause: SlowdownCause, more: float, names: list[str]) -> None:
        added, operators = shares.get(cause, (0.0, []))
        shares[cause] = (added + more, [*operators, *names])

    for node in _of(new, "conversions"):
        add(conversion_cause(node), int8_file.typical(node), [node.op_type])
    for part in ("products", "rest"):
        int8_nodes, float_nodes = _of(new, part), _of(old, part)
        if not int8_nodes and not float_nodes:
            continue
        more = typical_time(int8_file.sum(int8_nodes, shape) - float_file.sum(float_nodes, shape))
        names, costly = list(_costliest(int8_file, int8_nodes)), max(int8_nodes, key=int8_file.typical, default=None)
        if part == "rest":
            add(APART if more > 0 and len(int8_nodes) > len(float_nodes) else OTHER, more, names)
        elif more <= 0 or costly is None:
            add(FASTER, more, names)
        else:
            add(product_cause(costly), more, [costly.op_type])
    return shares


def _of(nodes: list[ir.Node], part: Part) -> list[ir.Node]:
    return [node for node in nodes if part_of(node) == part]


def _costliest(file: _File, nodes: list[ir.Node], most: int = 3) -> tuple[str, ...]:
    """Return operator types, the ones that take longest first."""
    times: dict[str, float] = defaultdict(float)
    for node in nodes:
        times[node.op_type] += file.typical(node)
    return tuple(sorted(times, key=lambda operator: -times[operator])[:most])
