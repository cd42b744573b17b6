"""Tables about searches in `docs/results/`, each written by the command of `search.py` that measured it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.results.report import Measurement

RESULTS = Path(__file__).parent / "results" / "search.json"
MEASURED_AND_REQUIRED = ("quantity", "measured", "required")
Write = Annotated[bool, typer.Option("--write", help="Write the table to results/.")]


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], write: bool, *,
    notes: Sequence[str] = (), text: str | None = None,
) -> None:  # fmt: skip
    """Print a table and optionally write it to the results.

    Args:
        title: Title, which identifies the table.
        columns: Column headings.
        rows: Cells of each row.
        write: Whether the table replaces the one with its title in the results.
        notes: Sentences below the table.
        text: Text above all tables; default: unchanged.
    """
    for row in rows:
        typer.echo(" | ".join(cell for cell in row if cell))
    if not write:
        return
    page = json.loads(RESULTS.read_text())
    dated = [f"Measured {date.today():%Y-%m-%d}.", *notes]
    table = {"title": title, "columns": list(columns), "rows": rows, "notes": dated}
    titles = [other["title"] for other in page["tables"]]
    if title in titles:
        page["tables"][titles.index(title)] = table
    else:
        page["tables"].append(table)
    RESULTS.write_text(json.dumps(page | {"text": text or page["text"]}, indent=1) + "\n")


def by_model(measured: Iterable[Measurement], labels: Sequence[str], metrics: Iterable[str]) -> list[list[str]]:
    """Return a row for each metric, with the value of each model of a session.

    Args:
        measured: Measurements of the session.
        labels: Models, in the order of the columns.
        metrics: Names of the metrics.
    """
    from compress.results.formatting import format_value
    from compress.results.metrics import describe_metric

    values, rows = {(row.model, row.metric): row.value for row in measured}, []
    for metric in map(describe_metric, metrics):
        cells = [values.get((label, metric.name)) for label in labels]
        rows.append([metric.title, *("" if value is None else format_value(metric, value) for value in cells)])
    return rows
