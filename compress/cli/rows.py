"""Measurement rows as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from compress.measurement import Measurement
from compress.report.metrics import describe_metric, format_interval, format_value


def render_rows(rows: Iterable[Measurement]) -> Table:
    """One line a row: model, metric, target, value, interval and number of samples."""
    table = Table("model", "metric", "target", "value", "95% interval", "n")
    for row in rows:
        metric = describe_metric(row.metric, row.unit)
        interval = format_interval(metric, row.low, row.high)
        cells = (row.model, metric.name, row.target, format_value(metric, row.value), interval, str(row.n))
        # As they stand: `accuracy[label=good]` is no markup.
        table.add_row(*map(Text, cells))
    return table
