"""One model's table: a line for each INT8 file, kept beside the files as soon as they are judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

_FILE = "table.json"
_OF = "of.txt"
SLOWER = 0.98
"""Ours is slower than a file where it is less than this times as fast."""


@dataclass(frozen=True)
class Line:
    """One file. ``better`` are the points by which ours beats it; ``faster`` is how many times as fast ours is."""

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
    """One model, judged and perhaps timed."""

    recipe: str
    metric: str
    lines: list[Line]
    notes: list[str]
    timing_notes: list[str] = field(default_factory=list)


def clear_others(folder: Path, of: str) -> None:
    """Remove what ``folder`` keeps of a model that was made otherwise; ``of`` says how this one was."""
    mark = folder / _OF
    if folder.is_dir() and (not mark.is_file() or mark.read_text() != of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(of)


def keep(table: Table, folder: Path) -> None:
    """Write ``table`` beside its files, whole or not at all."""
    partial = folder / f"{_FILE}.partial"
    partial.write_text(json.dumps(asdict(table)))
    partial.replace(folder / _FILE)


def kept(folder: Path) -> Table | None:
    """The table that was kept in ``folder``; None where none was finished."""
    if not (folder / _FILE).is_file():
        return None
    table = json.loads((folder / _FILE).read_text())
    return Table(**{**table, "lines": [Line(**line) for line in table["lines"]]})


def show(table: Table) -> None:
    """Print one model's table, its notes, and what beats ours."""
    typer.echo(f"\n{table.recipe} ({table.metric}; points and times: ours against this file)")
    for line in table.lines:
        better = f"{100 * line.better:+.2f} ({100 * line.better_low:+.2f} to {100 * line.better_high:+.2f})"
        speed = "not timed"
        if line.latency_ms is not None:
            speed = f"{line.latency_ms:.3f} ms {line.faster:.2f}x"
            speed += f" ({line.faster_low:.2f}-{line.faster_high:.2f})" if line.faster_low else ""
        answers = f"{line.value:.2%}  {better:26s} same {line.same:.1%}"
        typer.echo(f"{line.name:42s} {answers}  {line.size_bytes / 1e6:8.3f} MB  {speed:27s} {line.kernels}")
    for note in [*table.notes, *table.timing_notes, *behind(table)]:
        typer.echo(note)


def behind(table: Table) -> list[str]:
    """Which files ours is worse than beyond chance, or slower than by two in a hundred."""
    others = [line for line in table.lines if not line.name.startswith(("ours", "fp32"))]
    comparisons = {"worse than": [line.name for line in others if line.better_high < 0]}
    if any(line.faster is not None for line in others):
        comparisons["slower than"] = [line.name for line in others if line.faster is not None and line.faster < SLOWER]
    return [f"ours is {how}: {', '.join(names) or 'none of them'}" for how, names in comparisons.items()]
