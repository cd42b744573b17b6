"""The report as a few lines for the end of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.metrics import Metric, context_of, format_value, improvement, main_metrics, shortest_context
from compress.report.headline import verdict
from compress.report.rows import limit_bound, limit_found, limit_state, run_line
from compress.report.schema import BASELINE, FINAL, Report

_COLUMNS = ("agreement", "size_bytes", "parameters", "latency_ms", "speedup")
_WRITING = {
    "perplexity": "Perplexity",
    "agreement": "Agreement",
    "size_bytes": "Size",
    "bits_per_parameter": "Bits",
    "tokens_per_second": "Tokens/s",
    "speedup_time_per_output_token": "Speed-up",
}
"""The columns of a language model, with names that leave room for each other in a narrow terminal."""
_STYLES = {"passed": "green", "missed": "bold red", "skipped": "yellow", "unknown": "yellow", "none": "dim"}
_SIGNS = {"passed": "\u2713", "missed": "\u2717", "skipped": "\u2013", "unknown": "?"}


def console_table(report: Report) -> RenderableType:
    """Every model's main figures and ratios to the baseline, the limits, skipped targets and the verdict."""
    parts: list[RenderableType] = [_measured(report, target) for target in report.targets]
    for limit in report.limits:
        state = limit_state(limit)
        wanted = f"{_SIGNS[state]} {limit.metric} on {limit.target} {limit_bound(limit)}"
        parts.append(Text(f"{wanted}: {limit_found(report, limit)}", style=_STYLES[state]))
    parts += [Text(f"Skipped target {skip.target}: {skip.reason}", style="yellow") for skip in report.skipped]
    parts += [Text(note, style="yellow") for note in report.notes]
    status, sentence = verdict(report)
    took = run_line(report)
    parts.append(Text(f"{sentence}." + (f" Run {took}." if took else ""), style=_STYLES[status]))
    return Group(*parts)


def _measured(report: Report, target: str) -> Table:
    units = report.metrics(target)
    writes = shortest_context(units) is not None
    metrics = [m for m in main_metrics(units) if (_bare(m) in _WRITING if writes else m.quality or m.name in _COLUMNS)]
    table = Table(title=Text(f"{report.recipe} on {target}"), title_justify="left", title_style="bold")
    table.add_column("Model", no_wrap=True)
    for metric in metrics:
        table.add_column(_WRITING[_bare(metric)] if writes else metric.title, justify="right")
    for model in report.models:
        cells = [_cell(report, model, metric, target) for metric in metrics]
        if any(cells):
            style = "bold" if model == FINAL else "dim" if model == BASELINE else ""
            table.add_row(Text(model), *map(Text, cells), style=style)
    return table


def _bare(metric: Metric) -> str:
    """The metric's name without the context that it was measured at."""
    generated = context_of(metric.name)
    return metric.name if generated is None else generated[0]


def _cell(report: Report, model: str, metric: Metric, target: str) -> str:
    row, before = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None:
        return ""
    value = format_value(metric, row.value).removesuffix(" tokens/s").removesuffix(" bits")
    gain = improvement(metric, row.value, before.value) if before and model != BASELINE else ""
    ratio = gain.partition(" ")[0] if gain.endswith((metric.gain, "%")) else gain
    return f"{value}\n{ratio}" if ratio and ratio != "same" else value
