"""Predictions of `compress check` against measured runs: seconds, peak memory and bytes of each stage.

    python benchmarks/plans.py ARTIFACTS... [--write]

ARTIFACTS are folders that `compress run --artifacts` wrote on this machine, each with runs and a cache. Every run of a
shipped recipe in them is planned again with the recorded settings. `--write` stores the table for the documentation as
`benchmarks/results/plans.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.pipeline.cache import Cache
from compress.pipeline.planning import Plan, make_plan
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.results.report import Report

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RESULT = Path(__file__).parent / "results" / "plans.json"
MAX_FACTOR, SHORT_SECONDS = 1.5, 5.0
MEASURING, WHOLE = "measuring", "whole run"
_QUIET_PERCENT = 10
_FIELDS = {"seconds": "seconds", "memory": "peak_memory_bytes", "disk": "disk_bytes"}
_LOAD_NOTE = re.compile(r"other processes took (\d+)%")


@dataclass(frozen=True)
class RecordedRun:
    """A recorded run of a shipped recipe, with its settings and the bytes of its stages' outputs."""

    recipe: Recipe
    report: Report
    disk: dict[str, int]

    @property
    def busy(self) -> int:
        """Percent of the processor that other processes used during the measurement."""
        return max((int(match[1]) for note in self.report.notes for match in _LOAD_NOTE.finditer(note)), default=0)


@dataclass(frozen=True)
class Row:
    """One quantity of one stage of one run: prediction and measurement."""

    recipe: str
    busy: int
    stage: str
    what: str
    measured: float
    predicted: float | None

    @property
    def factor(self) -> float | None:
        """Return the prediction divided by the measurement, or None if either is missing."""
        return None if not self.predicted or not self.measured else self.predicted / self.measured


def main() -> None:
    """Print the rows, and how many are within the factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    runs = [run for folder in options.artifacts for run in read_runs(folder)]
    rows = [row for run in runs for row in compare_run(run)]
    for row in rows:
        factor = _format_factor(row.factor)
        sys.stdout.write(
            f"{row.recipe:15} {row.busy:3}% {row.stage:16} {row.what:7} {_format_measured(row):>10}  {factor:>6}\n"
        )
    for line in summary(rows):
        sys.stdout.write(f"{' | '.join(line)}\n")
    if options.write:
        RESULT.write_text(json.dumps(page(rows), indent=1) + "\n")


def read_runs(artifacts: Path) -> Iterator[RecordedRun]:
    """Yield the finished runs of shipped recipes in an artifacts folder, the oldest first."""
    cache = Cache(artifacts / "cache")
    for file in sorted(artifacts.glob("runs/*/2*/report.json")):
        report = Report.model_validate_json(file.read_text())
        shipped = RECIPES / f"{report.recipe}.yaml"
        if not shipped.is_file() or sum(not stage.cached for stage in report.stages) < 2:
            continue
        # The recorded model path may not exist any more.
        model = read_recipe(shipped).model
        recipe = read_recipe(file.parent / "recipe.yaml").model_copy(update={"model": model})
        entries = {stage.name: cache.peek(stage.key) for stage in report.stages}
        yield RecordedRun(recipe, report, {name: entry.size_bytes for name, entry in entries.items() if entry})


def compare_run(run: RecordedRun) -> Iterator[Row]:
    """Yield the rows of one run."""
    plan = plan_recipe(run.recipe)
    name, busy, seconds = run.recipe.name, run.busy, run.report.seconds or 0.0
    for index, stage in enumerate(run.report.stages):
        if stage.cached:
            continue
        disk = run.disk.get(stage.name)
        for what, actual in (("seconds", stage.seconds), ("memory", stage.peak_rss_bytes), ("disk", disk)):
            if actual:
                predicted = getattr(plan.stages[index], _FIELDS[what]).value
                yield Row(name, busy, stage.name, what, float(actual), predicted)
    spent = sum(stage.seconds + stage.check_seconds for stage in run.report.stages)
    yield Row(name, busy, MEASURING, "seconds", seconds - spent, plan.measuring.value)
    cached = {stage.name for stage in run.report.stages if stage.cached}
    yield Row(name, busy, WHOLE, "seconds", seconds, _predict_run(plan, cached))


def _predict_run(plan: Plan, cached: Iterable[str]) -> float | None:
    """Return the predicted seconds of a run, or None if a stage has no prediction."""
    parts = [plan.measuring, *(stage.seconds for stage in plan.stages if stage.label not in set(cached))]
    predicted = [part.value for part in parts if part.value is not None]
    return sum(predicted) if len(predicted) == len(parts) else None


def plan_recipe(recipe: Recipe) -> Plan:
    """Return the plan of a recipe, without a cache."""
    with tempfile.TemporaryDirectory() as scratch:
        return make_plan(recipe, RECIPES, None, Path(scratch), looks_into_model=True)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return how many of the long stages are predicted within the factor, by quantity and machine."""
    lines = []
    for quiet, what in ((quiet, what) for quiet in (True, False) for what in ("seconds", "memory", "disk")):
        selected = [row for row in rows if row.what == what and row.stage != WHOLE]
        selected = [row for row in selected if (row.busy < _QUIET_PERCENT) == quiet]
        long = {(row.recipe, row.stage) for row in rows if row.what == "seconds" and row.measured > SHORT_SECONDS}
        selected = [row for row in selected if what != "seconds" or (row.recipe, row.stage) in long]
        factors = [factor for row in selected if (factor := row.factor) is not None]
        good = [factor for factor in factors if 1 / MAX_FACTOR <= factor <= MAX_FACTOR]
        median = f", median {statistics.median(factors):.2f}" if factors else ""
        result = f"{len(good)} of {len(factors)}{median}" if factors else "-"
        lines.append([what, "idle" if quiet else "shared", result])
    return lines


def page(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the documentation page: the summary, and the seconds of each long stage."""
    # Seconds on a shared machine are noisy, so only the total of the run is listed.
    shown = [row for row in rows if row.what == "seconds" and (row.busy < _QUIET_PERCENT or row.stage == WHOLE)]
    long = [row for row in shown if row.measured > SHORT_SECONDS]
    return {
        "title": "Cost predictions",
        "order": 9,
        "command": "python benchmarks/plans.py ARTIFACTS... --write",
        "machine": "2 virtual cores of an Intel Xeon with AVX512-VNNI",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": (
            "`compress check` predicts time, memory and disk. The tables compare predictions with shipped recipes at "
            "full size. The constants for export, quantization, evaluation and memory were fitted on the idle runs; "
            "only training time and disk are therefore real predictions."
        ),
        "tables": [
            {
                "title": f"Predictions within a factor of {MAX_FACTOR} (stages longer than {SHORT_SECONDS:.0f} s), and "
                "the median ratio of prediction to measurement",
                "columns": ["quantity", "machine", "result"],
                "rows": summary(rows),
            },
            {
                "title": "Seconds: prediction divided by measurement",
                "columns": ["recipe", "stage", "measured", "prediction / measurement", "processor used by others"],
                "rows": [
                    [row.recipe, row.stage, _format_measured(row), _format_factor(row.factor), f"{row.busy}%"]
                    for row in long
                ],
            },
        ],
    }


def _format_measured(row: Row) -> str:
    return f"{row.measured:.0f} s" if row.what == "seconds" else f"{row.measured / 1e6:.1f} MB"


def _format_factor(factor: float | None) -> str:
    return "?" if factor is None else f"{factor:.2f}"


if __name__ == "__main__":
    main()
