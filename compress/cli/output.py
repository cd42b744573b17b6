"""Output of commands: views and tables on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from compress.results.formatting import format_interval, format_measurement, format_value
from compress.results.metrics import context_of, describe_metric
from compress.results.report import Measurement
from compress.utils.errors import InputError
from compress.utils.progress import is_shown
from compress.utils.responsive_table import ResponsiveTable, TableColumn
from compress.utils.terminal import Console, printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def show_hint(message: str) -> None:
    """Print a line that is no result on standard error, unless `--quiet` was given."""
    if is_shown(logging.INFO):
        typer.echo(printable(message), err=True)


def show(view: RenderableType) -> None:
    """Print a view: text as UTF-8, which HTML and Markdown views declare, and anything else for the terminal."""
    if isinstance(view, str):
        text = printable(view) if sys.stdout.isatty() else view
        # Bytes bypass the terminal's encoding.
        typer.echo(text.removesuffix("\n").encode("utf-8"))
        return
    Console(file=sys.stdout).print(view)


def write_new_file(path: Path, text: str, replace: bool) -> None:
    """Write a file. Raises `InputError` if it cannot be written, or exists and may not be replaced."""
    try:
        with path.open("w" if replace else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        hint = "give another name, or --force to replace it"
        raise InputError(f"{path} exists already.", where=str(path), hint=hint) from error
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.", where=str(path)) from error


@dataclass(frozen=True)
class Finding:
    """Result of one check of `compress doctor`. ``advice`` is the way to fix a finding, or to get what is absent."""

    level: Literal["ok", "absent", "warning", "problem"]
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
    """Return a table with a line for each measurement: model, metric, target, value, interval, number of samples."""
    columns = [TableColumn("model"), TableColumn("metric"), TableColumn("target", rank=3)]
    columns += [TableColumn("value", right=True), TableColumn("95% interval", rank=1)]
    table = ResponsiveTable("", [*columns, TableColumn("n", right=True, rank=2)], _LEFT_OUT)
    for row in rows:
        metric = describe_metric(row.metric, row.unit)
        interval = format_interval(metric, row.low, row.high)
        table.add(row.model, metric.name, row.target, format_value(metric, row.value), interval, str(row.n))
    return table


def render_generation(rows: Iterable[Measurement]) -> ResponsiveTable:
    """Return a table with a line for each context and model: times and rates with intervals, and the speed-up."""
    measurements = {(part[1], row.model, part[0]): row for row in rows if (part := context_of(row.metric))}
    models = list(dict.fromkeys(model for _, model, _ in measurements))
    columns = [TableColumn("context", right=True), TableColumn("model")]
    columns += [TableColumn(name, right=True, rank=rank) for rank, name in enumerate(_TIMES.values(), start=1)]
    table = ResponsiveTable("", columns, _LEFT_OUT)
    for context in sorted({context for context, _, _ in measurements}):
        for model in models:
            cells = []
            for name in _TIMES:
                speedup = measurements.get((context, model, _SPEEDUPS.get(name, "")))
                # A cell has a line each for value, interval and speed-up.
                row = measurements[context, model, name]
                metric = describe_metric(row.metric, row.unit)
                lines = [format_value(metric, row.value), format_interval(metric, row.low, row.high)]
                # The baseline's speed-up is 1 by definition, and has no interval.
                lines += [format_measurement(speedup)] if speedup is not None and speedup.low is not None else []
                cells.append(
                    "\n".join(
                        line.removesuffix(f" {metric.unit}") if metric.style == "rate" else line
                        for line in lines
                        if line
                    )
                )
            table.add(str(context), model, *cells)
    return table
