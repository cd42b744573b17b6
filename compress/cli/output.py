"""What commands write to standard output: views, measurements as tables, and what `compress doctor` found."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import typer

from compress.results.formatting import format_interval, format_measurement, format_value
from compress.results.measurement import Measurement
from compress.results.metrics import context_of, describe_metric
from compress.utils.responsive_table import ResponsiveTable, TableColumn

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(view: RenderableType) -> None:
    """A text in UTF-8, whatever the terminal's own encoding, since views say so of themselves; else for a terminal."""
    if isinstance(view, str):
        typer.echo(view.removesuffix("\n").encode("utf-8"))
        return
    from rich.console import Console

    Console(file=sys.stdout).print(view)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice`` says how to mend what isn't ``ok``."""

    level: Literal["ok", "warning", "problem"]
    what: str
    advice: str | None = None


_TIMES = {
    "time_to_first_token_ms": "first token",
    "time_per_output_token_ms": "a token",
    "tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "prompt tokens/s",
}
_SPEEDUPS = {
    "time_to_first_token_ms": "speedup_time_to_first_token",
    "time_per_output_token_ms": "speedup_time_per_output_token",
}

_LEFT_OUT = "hidden at this width; see --json"


def render_rows(rows: Iterable[Measurement]) -> ResponsiveTable:
    """One line a row: model, metric, target, value, interval and number of samples."""
    columns = [
        TableColumn("model"),
        TableColumn("metric"),
        TableColumn("target", rank=3),
        TableColumn("value", right=True),
    ]
    table = ResponsiveTable(
        "", [*columns, TableColumn("95% interval", rank=1), TableColumn("n", right=True, rank=2)], _LEFT_OUT
    )
    for row in rows:
        metric = describe_metric(row.metric, row.unit)
        interval = format_interval(metric, row.low, row.high)
        table.add(row.model, metric.name, row.target, format_value(metric, row.value), interval, str(row.n))
    return table


def render_generation(rows: Iterable[Measurement]) -> ResponsiveTable:
    """One line a context and model: times and rates with their intervals, and how many times the baseline's speed."""
    found = {(part[1], row.model, part[0]): row for row in rows if (part := context_of(row.metric))}
    models = list(dict.fromkeys(model for _, model, _ in found))
    columns = [TableColumn("context", right=True), TableColumn("model")]
    columns += [TableColumn(name, right=True, rank=rank) for rank, name in enumerate(_TIMES.values(), start=1)]
    table = ResponsiveTable("", columns, _LEFT_OUT)
    for context in sorted({context for context, _, _ in found}):
        for model in models:
            speedups = (found.get((context, model, _SPEEDUPS.get(name, ""))) for name in _TIMES)
            cells = [_lines(found[context, model, name], it) for name, it in zip(_TIMES, speedups, strict=True)]
            table.add(str(context), model, *cells)
    return table


def _lines(row: Measurement, speedup: Measurement | None) -> str:
    """Value, interval, and speed-up, each on a line."""
    metric = describe_metric(row.metric, row.unit)
    lines = [format_value(metric, row.value), format_interval(metric, row.low, row.high)]
    # The baseline's own has no interval.
    lines += [format_measurement(speedup)] if speedup is not None and speedup.low is not None else []
    return "\n".join(line.removesuffix(f" {metric.unit}") if metric.style == "rate" else line for line in lines if line)
