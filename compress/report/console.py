"""Report in the terminal at the end of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compress.report.headline import verdict
from compress.report.rows import (
    approximate_mark,
    has_app,
    limit_bound,
    limit_result,
    limit_state,
    models_of,
    run_line,
    speedup_notes,
)
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
_HIDDEN = "not shown at this width, see report.html"
_STYLES = {"passed": "green", "missed": "bold red", "skipped": "yellow", "unknown": "yellow", "none": "dim"}
_SIGNS = {"passed": "\u2713", "missed": "\u2717", "skipped": "\u2013", "unknown": "?"}


def console_table(report: Report, shown_notes: Collection[str] = ()) -> RenderableType:
    """Return every model's main metrics and ratios to the baseline, the limits, skipped targets and the verdict.

    Args:
        report: Report of the run.
        shown_notes: Notes of the report that the user has seen already, which are left out.
    """
    parts: list[RenderableType] = []
    for target in report.headed:
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
        table = ResponsiveTable(f"{report.recipe} on {target}", [TableColumn("Model"), *columns], _HIDDEN)
        for model, name in models_of(report, target, metrics).items():
            cells = [_cell(report, model, metric, target) for metric in metrics]
            style = "bold" if model == FINAL else "dim" if model == BASELINE else ""
            table.add(name, *(value for value, _ in cells), style=style)
            # The ratios have a row of their own, so that their label stays beside them where a name is wrapped.
            if any(ratio for _, ratio in cells):
                table.add("  of baseline", *(ratio for _, ratio in cells), style=style)
        parts.append(table)
    parts += [Text(note, style="dim") for note in speedup_notes(report)]
    for limit in report.limits:
        state = limit_state(limit)
        requirement = f"{_SIGNS[state]} {limit.metric} on {limit.target} {limit_bound(limit)}"
        parts.append(Text(f"{requirement}: {limit_result(report, limit)}", style=_STYLES[state]))
    parts += [Text(f"Skipped target {skip.target}: {skip.reason}", style="yellow") for skip in report.skipped]
    parts += [Text(note, style="yellow") for note in report.notes if note not in shown_notes]
    status, sentence = verdict(report)
    timing = run_line(report)
    parts.append(Text(f"{sentence}." + (f" Run {timing}." if timing else ""), style=_STYLES[status]))
    return Group(*parts)


def _bare(metric: Metric) -> str:
    """Return the metric's name without the context that it was measured at."""
    context = context_of(metric.name)
    return metric.name if context is None else context[0]


def _cell(report: Report, model: str, metric: Metric, target: str) -> tuple[str, str]:
    """Return the value and its ratio to the baseline's value, as texts that may be empty."""
    row, baseline = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None:
        return "", ""
    value = format_value(metric, row.value).removesuffix(" tokens/s").removesuffix(" bits")
    if metric.timed:
        # The speed-up has a column of its own, from pairs of calls. A ratio of two medians would be a second number.
        value = approximate_mark(report, row) + value
        if any(name.startswith("speedup") for name in report.metrics(target)):
            return value, ""
    if baseline is None or model == BASELINE or not format_improvement(metric, row.value, baseline.value):
        return value, ""
    return value, f"{row.value / baseline.value:.2%}"


def closing_line(report: Report, folder: Path, name: str) -> str:
    """Return the folder of a run's report and model, and a next step.

    Args:
        report: Report of the run.
        folder: Folder of the run.
        name: Name that finds the run again in other commands.
    """
    contents = f"{folder} has report.html and model/."
    if report.unmeasured:
        reasons = "; ".join(f"{skip.target}: {skip.reason}" for skip in report.skipped)
        cause = f" ({reasons})" if reasons else ""
        if report.stand_in:
            measured = f"{report.stand_in} measured its weights instead, in float32"
            summary = f"No target of the recipe could run the model here{cause}; {measured}."
            return f"{summary} {contents} Next: compress targets"
        return f"Nothing could be run here{cause}; only sizes are measured. {contents} Next: compress targets"
    offers_bundle = has_app(report) and not report.missed
    bundle = f"compress bundle {name} --target desktop --output app, or " if offers_bundle else ""
    return f"{contents} Next: {bundle}compress compare {name}, which shows what changed against the baseline"
