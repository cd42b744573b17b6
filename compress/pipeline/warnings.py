"""What a report says of files with many zeros, of INT8 that came out slower, and of processors not made for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from compress.formats.onnx.model import OnnxModel, find_graphs
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target, find_processor
from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import Recipe
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL
from compress.runtimes.runtime import Remarks
from compress.tasks.capability import GENERATES, READS_ROWS
from compress.utils.environment import processor_class

if TYPE_CHECKING:
    import onnx

CPU = "CPUExecutionProvider"
_KINDS = ("fp32", "int8")
_SECONDS = 3.0
_NAMED = 3
_SHORT_MS = 0.5


def run_remarks(session: TargetSession) -> list[str]:
    """What the runtime doesn't run as it is stored, each remark once with the models that it is about."""
    runtime = get_runtime(session.target.runtime)
    if not isinstance(runtime, Remarks):
        return []
    found: dict[str, list[str]] = {}
    for label, folder in session.artifacts.items():
        remark = runtime.remark(folder)
        if remark is not None:
            found.setdefault(remark, []).append(label)
    return [f"{', '.join(labels)}: {remark}" for remark, labels in found.items()]


def slow_int8_notes(session: TargetSession, rows: Sequence[Measurement]) -> list[str]:
    """Lines for a final model with integers that is slower than the baseline beyond doubt; both are profiled then.

    Models of two graphs, and devices other than the processor, can't be profiled and get none. A call that is over in
    half a millisecond is mostly the runtime's own work, which no operator answers for.
    """
    figures = {row.metric: row for row in rows if row.model == FINAL}
    speed, latency = figures.get("speedup"), figures.get("latency_ms")
    task, recipe = session.runner.inputs.task, session.runner.recipe
    rows_only = GENERATES not in task.capabilities and READS_ROWS in task.capabilities
    if not rows_only or not has_integers(recipe):
        return []
    if speed is None or speed.high is None or speed.high >= 1:
        return []
    if latency is None or latency.value < _SHORT_MS:
        return []
    if session.target.format != OnnxModel.kind or session.target.provider != CPU:
        return []
    label = float_label(recipe)
    measured = label if label in session.artifacts else None
    files = (session.artifacts[measured or BASELINE], session.artifacts[FINAL])
    if any(len(find_graphs(folder)) > 1 for folder in files):
        return []
    from compress.benchmark.operator_difference import compare_operators
    from compress.benchmark.profiled_calls import batch_calls
    from compress.report.difference_console import cause_text, verdict_text

    difference = compare_operators(
        *files,
        batch_calls(session.examples(FINAL), 1, recipe.seed),
        session.target,
        session.benchmark.threads,
        _SECONDS,
        session.runner.progress,
        recipe.seed,
    )
    lines = [verdict_text(difference)]
    for cause in difference.responsible[:_NAMED]:
        lines.append(f"{cause_text(cause, difference)}{f'; what helps: {cause.help}' if cause.help else ''}")
    return [f"{session.target.name}: {line}" for line in lines]


def processor_notes(session: TargetSession) -> list[str]:
    """What an x86 processor without VNNI costs a model with integers that was timed on it, as measured now."""
    saturates = not find_processor("cpu").sums_in_32_bits
    if (
        not saturates
        or session.profile.device
        or session.target.provider != CPU
        or not has_integers(session.runner.recipe)
    ):
        return []
    from compress.benchmark.machine import PRODUCTS, product_rates

    kinds = {kind: [product_rates(kind, *shape, session.benchmark.threads) for shape in PRODUCTS] for kind in _KINDS}
    faster = [fmean(rates) / fmean(floats) for rates, floats in zip(kinds["int8"], kinds["fp32"], strict=True)]
    return [
        f"{session.target.name}: {processor_class()} has no VNNI: products of 8-bit integers are {min(faster):.1f} to "
        f"{max(faster):.1f} times as fast as those of float there, and their sums may saturate "
        "(`reduce_range` of the stage avoids it)"
    ]


def has_integers(recipe: Recipe) -> bool:
    """Whether a stage of it puts integers into a graph."""
    return any(stage.integer_graph for stage in recipe.stages)


def float_label(recipe: Recipe) -> str | None:
    """The graph in float that a recipe exports, by its label, or ``None`` where it exports none."""
    stages = zip(recipe.labels(), recipe.stages, strict=True)
    floats = (
        label for label, stage in stages if not stage.integer_graph and issubclass(stage.output_type(), OnnxModel)
    )
    return next(floats, None)


_NOTABLE = 0.05
_SAME = 0.02
"""Within so much of the baseline's speed a file counts as no faster."""


def sparse_notes(
    recipe: Recipe, artifacts: Mapping[str, Path], rows: Sequence[Measurement], target: Target
) -> list[str]:
    """A line for each stage's float file of which a share of the weights is zero, with its measured speed.

    No runtime that `compress` knows has a kernel that skips zeros. Files are looked at only where a stage makes zeros.
    """
    if target.format != OnnxModel.kind or not any(stage.zeros_weights() for stage in recipe.stages):
        return []
    speeds = {row.model: row for row in rows if row.metric == "speedup"}
    lines = []
    for label in recipe.labels():
        if label not in artifacts or label == recipe.baseline:
            continue
        share = zero_share(OnnxModel.load(artifacts[label], recipe.task).graphs.values())
        if share >= _NOTABLE:
            words = f"{share:.0%} of the weights of {label} are zeros, which no kernel of {target.runtime} skips"
            lines.append(f"{target.name}: {words}{_speed(speeds.get(label))}")
    return lines


def zero_share(graphs: Iterable[onnx.ModelProto]) -> float:
    """The share of zeros among all float weights of two axes or more; 0 where there are none."""
    import numpy as np
    from onnx import numpy_helper

    zeros = of = 0
    for graph in graphs:
        for tensor in graph.graph.initializer:
            if len(tensor.dims) > 1:
                array = numpy_helper.to_array(tensor)
                if array.dtype.kind == "f":
                    zeros, of = zeros + int(array.size - np.count_nonzero(array)), of + array.size
    return zeros / of if of else 0.0


def _speed(row: Measurement | None) -> str:
    if row is None:
        return ""
    interval = "" if row.low is None or row.high is None else f", {row.low:.2f} to {row.high:.2f}"
    words = f"; it is {row.value:.2f} times as fast as the baseline{interval}"
    inside = row.low is not None and row.high is not None and row.low <= 1 <= row.high
    return f"{words}: they gain nothing" if inside or abs(row.value - 1) <= _SAME else words
