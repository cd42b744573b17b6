"""Report in the terminal at the end of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compress.benchmark.profile import CauseDifference, OperatorDifference
from compress.report.headline import verdict
from compress.report.profile_formatting import time_text
from compress.report.rows import limit_bound, limit_result, limit_state, run_line
from compress.results.formatting import format_improvement, format_value
from compress.results.metrics import Metric, context_of, describe_metric, main_metrics, shortest_context
from compress.results.report import BASELINE, FINAL, Report
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_FIRST = ("size_bytes", "speedup", "latency_ms", "agreement", "parameters")
"""Metrics that follow those with limits and the task's own, the most important first."""
_WRITING = {
    "perplexity": "Perplexity",
    "agreement": "Agreement",
    "size_bytes": "Size",
    "bits_per_parameter": "Bits",
    "tokens_per_second": "Tokens/s",
    "speedup_time_per_output_token": "Speed-up",
}
"""Metrics of a language model in order, with headings that fit into a narrow terminal."""
_STYLES = {"passed": "green", "missed": "bold red", "skipped": "yellow", "unknown": "yellow", "none": "dim"}
_SIGNS = {"passed": "\u2713", "missed": "\u2717", "skipped": "\u2013", "unknown": "?"}


def console_table(report: Report) -> RenderableType:
    """Return every model's main metrics and ratios to the baseline, the limits, skipped targets and the verdict."""
    parts: list[RenderableType] = []
    for target in report.targets:
        units = report.metrics(target)
        limited_metrics = list(dict.fromkeys(limit.metric for limit in report.limits if limit.target == target))
        generates_text = shortest_context(units) is not None
        task_metrics = [
            metric.name for metric in main_metrics(units) if metric.quality or metric.name in ("agreement", "rms_error")
        ]
        # Of the many things that a language model is judged by, those not named above come behind size and speed.
        order = [
            *limited_metrics,
            *(_WRITING if generates_text else task_metrics),
            *(task_metrics if generates_text else _FIRST),
        ]
        columns_by_name = {metric.name: metric for metric in main_metrics(units)}
        columns_by_name |= {name: describe_metric(name, units[name]) for name in limited_metrics if name in units}
        metrics = [metric for metric in columns_by_name.values() if {metric.name, _bare(metric)} & set(order)]
        ranks = [
            1 + min(order.index(name) for name in (metric.name, _bare(metric)) if name in order) for metric in metrics
        ]
        headings = [_WRITING.get(_bare(metric), metric.title) if generates_text else metric.title for metric in metrics]
        columns = [TableColumn(heading, right=True, rank=rank) for heading, rank in zip(headings, ranks, strict=True)]
        table = ResponsiveTable(f"{report.recipe} on {target}", [TableColumn("Model"), *columns], "in the report")
        for model in report.models:
            cells = [_cell(report, model, metric, target) for metric in metrics]
            if any(cells):
                table.add(model, *cells, style="bold" if model == FINAL else "dim" if model == BASELINE else "")
        parts.append(table)
    for limit in report.limits:
        state = limit_state(limit)
        requirement = f"{_SIGNS[state]} {limit.metric} on {limit.target} {limit_bound(limit)}"
        parts.append(Text(f"{requirement}: {limit_result(report, limit)}", style=_STYLES[state]))
    parts += [Text(f"Skipped target {skip.target}: {skip.reason}", style="yellow") for skip in report.skipped]
    parts += [Text(note, style="yellow") for note in report.notes]
    status, sentence = verdict(report)
    timing = run_line(report)
    parts.append(Text(f"{sentence}." + (f" Run {timing}." if timing else ""), style=_STYLES[status]))
    return Group(*parts)


def _bare(metric: Metric) -> str:
    """Return the metric's name without the context that it was measured at."""
    context = context_of(metric.name)
    return metric.name if context is None else context[0]


def _cell(report: Report, model: str, metric: Metric, target: str) -> str:
    row, baseline = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None:
        return ""
    value = format_value(metric, row.value).removesuffix(" tokens/s").removesuffix(" bits")
    change = format_improvement(metric, row.value, baseline.value) if baseline and model != BASELINE else ""
    ratio = change.partition(" ")[0] if change.endswith((metric.gain, "%")) else change
    return f"{value}\n{ratio}" if ratio and ratio != "same" else value


def closing_line(report: Report, folder: Path, name: str, app: bool = True) -> str:
    """Return the folder of a run's report and model, and a next step.

    Args:
        report: Report of the run.
        folder: Folder of the run.
        name: Name that finds the run again in other commands.
        app: Whether the task of the model has an app.
    """
    contents = f"{folder} has report.html and model/."
    if report.unmeasured:
        reasons = "; ".join(f"{skip.target}: {skip.reason}" for skip in report.skipped)
        cause = f" ({reasons})" if reasons else ""
        if report.stand_in:
            measured = f"{report.stand_in} measured its weights in place, in float32"
            summary = f"No target of the recipe could run the model here{cause}; {measured}."
            return f"{summary} {contents} Next: compress targets"
        return f"Nothing could be run here{cause}; sizes are measured all the same. {contents} Next: compress targets"
    if report.missed:
        return f"{contents} Next: compress compare {name}, to see what changed against the baseline"
    bundle = f"compress bundle {name} --target desktop --output app, or " if app else ""
    return f"{contents} Next: {bundle}compress compare OTHER-RUN {name}"


_MOST = 12
_NAMED = 3
_LEAST = 0.002
"""Share of a call below which a cause is left out."""


def verdict_text(difference: OperatorDifference) -> str:
    """Return `INT8 is slower than float: 0.42x as fast (0.41-0.43), 7.1 ms a call for 3 ms`."""
    word = {"faster": "faster than", "slower": "slower than", "can't tell": "not proven faster than"}
    ratio = f"{difference.faster:.2f}x as fast ({difference.low:.2f}-{difference.high:.2f})"
    times = f"{time_text(difference.int8_ms)} a call for {time_text(difference.float_ms)}"
    return f"INT8 is {word[difference.verdict]} float: {ratio}, {times}"


def cause_text(cause: CauseDifference, difference: OperatorDifference) -> str:
    """Return the time of a cause with its operators and layers.

    Example: `3.9 ms more, 130% of the float file's time (MatMul in encoder.layer.0.attention and 5 more): why`.
    """
    layers = ", ".join(cause.layers[:_NAMED])
    more = len(cause.layers) - _NAMED
    layer_names = f"{layers} and {more} more" if more > 0 else layers
    operators = ", ".join(dict.fromkeys(cause.operators[:_NAMED]))
    share = cause.more_ms / difference.float_ms
    return (
        f"{cause.more_ms:.3g} ms more, {share:.0%} of the float file's time ({operators} in {layer_names}): {cause.why}"
    )


def console_difference(difference: OperatorDifference) -> RenderableType:
    """Return two tables. Times of layers and causes were measured with the profiler on."""
    columns = [TableColumn("Time", right=True), TableColumn("Layers", right=True, rank=1)]
    columns += [TableColumn("Why"), TableColumn("What helps")]
    table = ResponsiveTable("What it spends and saves", columns)
    for cause in difference.causes:
        if abs(cause.more_ms) >= _LEAST * difference.float_ms:
            why = f"{cause.why} ({', '.join(dict.fromkeys(cause.operators))})"
            table.add(_signed(cause.more_ms), str(len(cause.layers)), why, cause.help)
    # The layers that lose most come first, and the last three gain most.
    layers = difference.layers
    shown = layers if len(layers) <= _MOST else (*layers[: _MOST - 3], *layers[-3:])
    columns = [TableColumn("Layer"), TableColumn("Float", right=True), TableColumn("INT8", right=True)]
    columns += [TableColumn("Difference"), TableColumn("Operators", rank=2), TableColumn("Mostly", rank=1)]
    title = "By layer, the slowest against float first" + ("" if shown is layers else "; the last three gain most")
    by_layer = ResponsiveTable(title, columns)
    for layer in shown:
        difference_text = f"{_signed(layer.more_ms)} ({layer.low_ms:+.3g} to {layer.high_ms:+.3g})"
        times = (time_text(layer.float_ms), time_text(layer.int8_ms), difference_text)
        by_layer.add(layer.layer, *times, ", ".join(layer.operators), layer.why)
    return Group(Text(""), table, by_layer)


def _signed(milliseconds: float) -> str:
    return f"{'+' if milliseconds > 0 else '-'}{time_text(abs(milliseconds))}"
