"""What makes an 8-bit file slower or faster than its float file, layer by layer: both profiled in turns."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
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
    Cause,
    Part,
    conversion_cause,
    part_of,
    product_cause,
)
from compress.inspection.layers import layers_of
from compress.inspection.node_layers import UNNAMED, node_modules, origins_in
from compress.numerics.statistics import bootstrap_interval, geometric_interval
from compress.utils.environment import environment, spread_cores
from compress.utils.progress import Progress

_MOST_LAYERS = 200
_RESAMPLES = 300
Times = np.ndarray
"""ms, [passes, calls]"""


@dataclass(frozen=True)
class _File:
    """One file's nodes by layer, and every node's times."""

    nodes: Mapping[str, list[ir.Node]]
    times: Mapping[str, Times]

    def sum(self, nodes: list[ir.Node], shape: tuple[int, ...]) -> Times:
        return sum((self.times[str(node.name)] for node in nodes if str(node.name) in self.times), np.zeros(shape))

    def typical_time(self, node: ir.Node) -> float:
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
    """Profile two files on the same ``calls``, in turns, for about ``seconds``; at least `FEWEST_PASSES` times each.

    Raises what `profile_operators` raises.
    """
    refuse_other_devices(target)
    cores, load = spread_cores(threads), load_average()
    with (
        tempfile.TemporaryDirectory(prefix="compress-compare-") as first,
        tempfile.TemporaryDirectory(prefix="compress-compare-") as second,
        ProfiledProcess(float_file, calls, Path(first), timeout_seconds) as before,
        ProfiledProcess(int8_file, calls, Path(second), timeout_seconds) as after,
    ):
        children = (before, after)

        def numbers(most: int) -> Iterable[int]:
            return progress.track(range(most), "Profiling both files", most)

        usage = run_interleaved(children, target, threads, cores, seconds, numbers)
        notes = (before.end(), after.end())
        layers = _layers(float_file, notes)
        files = [_file(noted, layers[place]) for place, noted in enumerate(notes)]
        plain = [np.array(child.plain) for child in children]
        # The graphs' weights lie in the folders.
        found, causes = _differences(files[0], files[1], plain[0].shape, seed)
    rounds = {name: np.median(each / np.median(each, axis=0), axis=1) for name, each in zip("ab", plain, strict=True)}
    faster = geometric_interval(np.median(plain[0] / plain[1], axis=1))
    return OperatorDifference(
        float_file=str(float_file),
        int8_file=str(int8_file),
        target=target.name,
        threads=threads,
        batch_size=calls.batch_size,
        calls=len(calls),
        lengths=tuple(map(calls.length, range(len(calls)))),
        passes=len(plain[0]),
        float_ms=typical_time(plain[0]),
        int8_ms=typical_time(plain[1]),
        faster=faster.value,
        low=faster.low,
        high=faster.high,
        layers=found,
        causes=causes,
        notes=(str(judge_noise(usage, rounds, load)),),
        environment={**environment(), "target": asdict(target), "pinned_cores": list(cores)},
    )


def _layers(float_file: Path, notes: tuple[NodeProfile, NodeProfile]) -> list[dict[str, str]]:
    """Of each file: node's name -> layer, in the same words."""
    origins = origins_in(find_graph(float_file))
    modules = [node_modules(noted.optimized, origins) for noted in notes]
    named = layers_of(dict.fromkeys(name for each in modules for name in each.values() if name), _MOST_LAYERS)
    return [{node: named.get(module, UNNAMED) for node, module in each.items()} for each in modules]


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
    before: _File, after: _File, shape: tuple[int, ...], seed: int
) -> tuple[tuple[LayerDifference, ...], tuple[CauseDifference, ...]]:
    layers = []
    totals: dict[Cause, float] = defaultdict(float)
    places: dict[Cause, dict[str, None]] = defaultdict(dict)
    operators: dict[Cause, dict[str, None]] = defaultdict(dict)
    for layer in dict.fromkeys((*before.nodes, *after.nodes)):
        old, new = before.nodes.get(layer, []), after.nodes.get(layer, [])
        paired = after.sum(new, shape) - before.sum(old, shape)
        low, high = bootstrap_interval(paired, typical_time, seed, resamples=_RESAMPLES)
        shares = _shares(before, after, old, new, shape)
        for cause, (more, names) in shares.items():
            totals[cause] += more
            places[cause][layer] = None
            operators[cause] |= dict.fromkeys(names)
        mostly = (max if typical_time(paired) > 0 else min)(shares, key=lambda cause: shares[cause][0]) if shares else OTHER
        layers.append(
            LayerDifference(
                layer=layer,
                float_ms=typical_time(before.sum(old, shape)),
                int8_ms=typical_time(after.sum(new, shape)),
                more_ms=typical_time(paired),
                low_ms=low,
                high_ms=high,
                operators=_costliest(after, new),
                why=mostly.why,
                help=mostly.help,
            )
        )
    causes = [
        CauseDifference(
            why=cause.why, help=cause.help, more_ms=more, layers=tuple(places[cause]), operators=tuple(operators[cause])
        )
        for cause, more in totals.items()
    ]
    return (
        tuple(sorted(layers, key=lambda each: -each.more_ms)),
        tuple(sorted(causes, key=lambda each: -each.more_ms)),
    )


def _shares(
    before: _File, after: _File, old: list[ir.Node], new: list[ir.Node], shape: tuple[int, ...]
) -> dict[Cause, tuple[float, list[str]]]:
    """Cause -> the ms that it adds to a layer, and its operators. Conversions have no counterpart in float."""
    found: dict[Cause, tuple[float, list[str]]] = {}

    def add(cause: Cause, more: float, names: list[str]) -> None:
        known, others = found.get(cause, (0.0, []))
        found[cause] = (known + more, [*others, *names])

    for node in _of(new, "conversions"):
        add(conversion_cause(node), after.typical(node), [node.op_type])
    for part in ("products", "rest"):
        ours, theirs = _of(new, part), _of(old, part)
        if not ours and not theirs:
            continue
        more = typical_time(after.sum(ours, shape) - before.sum(theirs, shape))
        names = list(_costliest(after, ours))
        if part == "products":
            costly = max(ours, key=after.typical, default=None)
            if more <= 0 or costly is None:
                add(FASTER, more, names)
            else:
                add(product_cause(costly), more, [costly.op_type])
        else:
            add(APART if more > 0 and len(ours) > len(theirs) else OTHER, more, names)
    return found


def _of(nodes: list[ir.Node], part: Part) -> list[ir.Node]:
    return [node for node in nodes if part_of(node) == part]


def _costliest(file: _File, nodes: list[ir.Node], most: int = 3) -> tuple[str, ...]:
    """Operator types, those that take longest first."""
    times: dict[str, float] = defaultdict(float)
    for node in nodes:
        times[node.op_type] += file.typical(node)
    return tuple(sorted(times, key=lambda operator: -times[operator])[:most])
