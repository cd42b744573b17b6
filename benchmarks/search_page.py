"""The tables about searches in `docs/results/`, each put there by the command of `search.py` that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.results.measurement import Measurement

RESULTS = Path(__file__).parent / "results" / "search.json"
FOUND_AND_WANTED = ("what", "found", "wanted")
Write = Annotated[bool, typer.Option("--write", help="Put the figures into results/.")]


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], write: bool, *,
    notes: Sequence[str] = (), text: str | None = None,
) -> None:  # fmt: skip
    """Print a table; with ``write``, put it in place of the one with its title, and ``text`` above all of them."""
    for row in rows:
        typer.echo(" | ".join(cell for cell in row if cell))
    if not write:
        return
    page = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"tables": [], "text": ""}
    table = {"title": title, "columns": list(columns), "rows": rows} | ({"notes": list(notes)} if notes else {})
    kept = [one for one in page["tables"] if one["title"] != title]
    page |= {
        "title": "Searches",
        "order": 10,
        "command": "python benchmarks/search.py COMMAND --write",
        "machine": "2 cores; seconds of replayed searches are those of their table",
        "measured": f"{date.today():%Y-%m-%d}",
        "text": text or page["text"],
        "tables": sorted([*kept, table], key=lambda one: one["title"]),
    }
    RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def by_model(measured: Iterable[Measurement], labels: Sequence[str], metrics: Iterable[str]) -> list[list[str]]:
    """A row of each metric, with what each model of a session came to."""
    from compress.results.formatting import format_value
    from compress.results.metrics import describe_metric

    value, rows = {(row.model, row.metric): row.value for row in measured}, []
    for described in map(describe_metric, metrics):
        shown = [value.get((label, described.name)) for label in labels]
        rows.append([described.title, *("" if one is None else format_value(described, one) for one in shown)])
    return rows
