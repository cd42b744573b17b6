"""What a report says where INT8 came out slower than float, or runs on a processor that is not made for it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from compress.environment import processor_class
from compress.formats.onnx.model import OnnxModel, find_graphs
from compress.measurement import Measurement
from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import Recipe
from compress.report.schema import BASELINE, FINAL
from compress.targets import find_processor
from compress.tasks.capability import GENERATES, READS_ROWS

CPU = "CPUExecutionProvider"
_KINDS = ("fp32", "int8")
_SECONDS = 3.0
_NAMED = 3
_SHORT_MS = 0.5


def slow_int8_notes(session: TargetSession, rows: Sequence[Measurement]) -> list[str]:
    """Lines for a final model with integers that is slower than the baseline beyond doubt; both are profiled then.

    Models of two graphs, and devices other than the processor, can't be profiled and get none. A call that is over in
    half a millisecond is mostly the runtime's own work, which no operator answers for.
    """
    figures = {row.metric: row for row in rows if row.model == FINAL}
    speed, latency = figures.get("speedup"), figures.get("latency_ms")
    task, recipe = session.road.task, session.road.recipe
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
    from compress.bench.operator_difference import compare_operators
    from compress.bench.profiled_calls import batch_calls
    from compress.report.difference_console import cause_text, verdict_text

    difference = compare_operators(
        *files,
        batch_calls(session.examples(FINAL), 1, recipe.seed),
        session.target,
        session.benchmark.threads,
        _SECONDS,
        session.road.progress,
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
        or not has_integers(session.road.recipe)
    ):
        return []
    from compress.bench.machine import PRODUCTS, product_rates

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
    floats = (label for label, stage in stages if not stage.integer_graph and issubclass(stage.gives(), OnnxModel))
    return next(floats, None)
