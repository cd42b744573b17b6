"""Page about long runs and injected faults in `docs/results/`, whose tables the commands of `soak.py` write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).parent / "results" / "soak.json"
Write = Annotated[bool, typer.Option("--write", help="Write the table to results/.")]


def show(title: str, command: str, rows: Sequence[Sequence[str]], write: bool) -> None:
    """Print a table of measured and required values, and optionally put it into the results."""
    for row in rows:
        typer.echo(" | ".join(cell for cell in row if cell))
    if not write:
        return
    page = json.loads(RESULTS.read_text())
    notes = [f"Measured {date.today():%Y-%m-%d} by `{command}`."]
    table = {"title": title, "columns": ["quantity", "measured", "required"], "rows": rows, "notes": notes}
    page["tables"] = [*(other for other in page["tables"] if other["title"] != title), table]
    RESULTS.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")
