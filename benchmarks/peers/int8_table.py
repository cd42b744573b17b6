"""Results table of one model: a line for each INT8 file, stored with the files."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

_FILE = "table.json"
_KEY_FILE = "of.txt"
SLOWER = 0.98
"""Ours counts as slower than a file if its speed-up over it is below this."""


@dataclass(frozen=True)
class Line:
    """One file. ``better`` is our advantage in points, and ``faster`` our speed-up over it."""

    name: str
    value: float
    better: float
    better_low: float
    better_high: float
    same: float
    size_bytes: int
    kernels: str
    latency_ms: float | None = None
    faster: float | None = None
    faster_low: float | None = None
    faster_high: float | None = None


@dataclass(frozen=True)
class Table:
    """Results of one model, with or without timings."""

    recipe: str
    metric: str
    lines: list[Line]
    notes: list[str]
    timing_notes: list[str] = field(default_factory=list)


def clear_outdated(folder: Path, key: str) -> None:
    """Remove ``folder`` unless it belongs to the model with this ``key``, and create it."""
    mark = folder / _KEY_FILE
    if folder.is_dir() and (not mark.is_file() or mark.read_text() != key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(key)


def save_table(table: Table, folder: Path) -> None:
    """Write ``table`` to the folder of its files, atomically."""
    partial = folder / f"{_FILE}.partial"
    partial.write_text(json.dumps(asdict(table)))
    partial.replace(folder / _FILE)


def load_table(folder: Path) -> Table | None:
    """Return the table stored in ``folder``, or None."""
    if not (folder / _FILE).is_file():
        return None
    table = json.loads((folder / _FILE).read_text())
    return Table(**{**table, "lines": [Line(**line) for line in table["lines"]]})


def show(table: Table) -> None:
    """Print a table, its notes, and the files that are better than ours."""
    typer.echo(f"\n{table.recipe} ({table.metric}; points and speed-up of ours over this file)")
    for line in table.lines:
        better = f"{100 * line.better:+.2f} ({100 * line.better_low:+.2f} to {100 * line.better_high:+.2f})"
        speed = "not timed"
        if line.latency_ms is not None:
            speed = f"{line.latency_ms:.3f} ms {line.faster:.2f}x"
            speed += f" ({line.faster_low:.2f}-{line.faster_high:.2f})" if line.faster_low else ""
        answers = f"{line.value:.2%}  {better:26s} same {line.same:.1%}"
        typer.echo(f"{line.name:42s} {answers}  {line.size_bytes / 1e6:8.3f} MB  {speed:27s} {line.kernels}")
    for note in [*table.notes, *table.timing_notes, *summarize_losses(table)]:
        typer.echo(note)


def summarize_losses(table: Table) -> list[str]:
    """Return which files are significantly better than ours, or more than 2% faster."""
    others = [line for line in table.lines if not line.name.startswith(("ours", "fp32"))]
    comparisons = {"worse than": [line.name for line in others if line.better_high < 0]}
    if any(line.faster is not None for line in others):
        comparisons["slower than"] = [line.name for line in others if line.faster is not None and line.faster < SLOWER]
    return [f"ours is {how}: {', '.join(names) or 'none of them'}" for how, names in comparisons.items()]
