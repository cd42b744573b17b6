"""What `compress check` predicts of a run against what happened: seconds, peak memory and bytes of each stage.

    python benchmarks/plans.py ARTIFACTS... [--trials FOLDER] [--write]

ARTIFACTS are folders that `compress run --artifacts` left on this machine, each with runs and a cache. Every run of a
shipped recipe in them, as it was set then, is planned three times: knowing no past run, knowing those of all
other recipes, and knowing another run of the same recipe with other settings, where there is one. Stages are tried on a
few batches where nothing is kept in FOLDER. A factor is predicted over happened. `--write` keeps the table for the
documentation as `benchmarks/results/plans.json`.
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
from compress.pipeline.planning import History, Plan, make_plan, timings_of
from compress.pipeline.stage_benchmark import FOLDER as TRIALS
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.results.report import Report

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RESULT = Path(__file__).parent / "results" / "plans.json"
WITHIN, SHORT_SECONDS = 1.5, 5.0
MEASURING, WHOLE = "measuring", "whole run"
_QUIET_PERCENT = 10
_FIELDS = {"seconds": "seconds", "memory": "peak_memory_bytes", "disk": "disk_bytes"}
_OTHERS = re.compile(r"other processes took (\d+)%")


@dataclass(frozen=True)
class Past:
    """One run of a shipped recipe, as it was set then, and the bytes that its stages left."""

    recipe: Recipe
    report: Report
    disk: dict[str, int]

    @property
    def busy(self) -> int:
        """Percent of the processor that others took while it was measured."""
        return max((int(match[1]) for note in self.report.notes for match in _OTHERS.finditer(note)), default=0)


@dataclass(frozen=True)
class Row:
    """One quantity of one stage of one run: predicted in three ways, and what happened."""

    recipe: str
    busy: int
    stage: str
    what: str
    happened: float
    first: float | None
    others: float | None
    same: float | None

    def factor(self, name: str) -> float | None:
        """Predicted over happened."""
        value = getattr(self, name)
        return None if not value or not self.happened else float(value) / self.happened


def main() -> None:
    """Print the rows, and how many are within the factor; with `--write` keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--trials", type=Path, default=Path("artifacts"), help="where trials are kept")
    parser.add_argument("--write", action="store_true", help=f"keep the table as {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    past = [past_run for folder in options.artifacts for past_run in runs_in(folder)]
    rows = [row for past_run in past for row in compared(past_run, past, options.trials)]
    for row in rows:
        shown = "  ".join(f"{name} {_shown(row.factor(name)):>6}" for name in ("first", "others", "same"))
        sys.stdout.write(f"{row.recipe:15} {row.busy:3}% {row.stage:16} {row.what:7} {_amount(row):>10}  {shown}\n")
    for line in summary(rows):
        sys.stdout.write(f"{' | '.join(line)}\n")
    if options.write:
        RESULT.write_text(json.dumps(page(rows), indent=1) + "\n")


def runs_in(artifacts: Path) -> Iterator[Past]:
    """The finished runs of shipped recipes below an artifacts folder, the oldest first."""
    cache = Cache(artifacts / "cache")
    for file in sorted(artifacts.glob("runs/*/2*/report.json")):
        report = Report.model_validate_json(file.read_text())
        shipped = RECIPES / f"{report.recipe}.yaml"
        if (
            not shipped.is_file()
            or len([stage_record for stage_record in report.stages if not stage_record.cached]) < 2
        ):
            continue
        # Where the recipe lay then, its own files may be no longer.
        model = read_recipe(shipped).model
        recipe = read_recipe(file.parent / "recipe.yaml").model_copy(update={"model": model})
        entries = {stage.name: cache.peek(stage.key) for stage in report.stages}
        yield Past(recipe, report, {name: entry.size_bytes for name, entry in entries.items() if entry})


def compared(run: Past, past: Sequence[Past], trials: Path) -> Iterator[Row]:
    """The rows of one run."""
    # What runs took that shared the machine says nothing of those that had it for themselves.
    past = [past_run for past_run in past if (past_run.busy < _QUIET_PERCENT) == (run.busy < _QUIET_PERCENT)]
    others = [past_run for past_run in past if past_run.recipe.name != run.recipe.name]
    again = [
        past_run
        for past_run in past
        if past_run.recipe.name == run.recipe.name and past_run.recipe.stages != run.recipe.stages
    ]
    plans = {"first": planned(run.recipe, (), trials), "others": planned(run.recipe, others, trials)}
    if again:
        plans["same"] = planned(run.recipe, again, trials)
    happened, busy = run.report.seconds or 0.0, run.busy
    for index, stage in enumerate(run.report.stages):
        if stage.cached:
            continue
        disk = run.disk.get(stage.name)
        for what, actual in (("seconds", stage.seconds), ("memory", stage.peak_rss_bytes), ("disk", disk)):
            if actual:
                values = {name: getattr(plan.stages[index], _FIELDS[what]).value for name, plan in plans.items()}
                yield Row(run.recipe.name, busy, stage.name, what, float(actual), **{"same": None, **values})
    spent = sum(stage.seconds + stage.check_seconds for stage in run.report.stages)
    values = {name: plan.measuring.value for name, plan in plans.items()}
    yield Row(run.recipe.name, busy, MEASURING, "seconds", happened - spent, **{"same": None, **values})
    done = {stage.name for stage in run.report.stages if stage.cached}
    whole = {name: _whole(plan, done) for name, plan in plans.items()}
    yield Row(run.recipe.name, busy, WHOLE, "seconds", happened, **{"same": None, **whole})


def _whole(plan: Plan, cached: Iterable[str]) -> float | None:
    parts = [plan.measuring, *(stage.seconds for stage in plan.stages if stage.label not in set(cached))]
    known = [part.value for part in parts if part.value is not None]
    return sum(known) if len(known) == len(parts) else None


def planned(recipe: Recipe, before: Iterable[Past], trials: Path) -> Plan:
    """The plan of a recipe on a machine that knows those runs."""
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = Path(scratch)
        previous_trials = trials / TRIALS
        previous_trials.mkdir(parents=True, exist_ok=True)
        (artifacts / TRIALS).symlink_to(previous_trials.resolve())
        for past_run in before:
            plan = make_plan(past_run.recipe, RECIPES, None, artifacts)
            History(artifacts).add(timings_of(plan, past_run.report.stages, past_run.report.seconds or 0.0))
        return make_plan(recipe, RECIPES, None, artifacts, looks_into_model=True)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """How many of the stages that take long are within the factor, by quantity and by what the plan knows."""
    lines = []
    for quiet, what in ((quiet, what) for quiet in (True, False) for what in ("seconds", "memory", "disk")):
        selected = [row for row in rows if row.what == what and row.stage != WHOLE]
        selected = [row for row in selected if (row.busy < _QUIET_PERCENT) == quiet]
        long = {(row.recipe, row.stage) for row in rows if row.what == "seconds" and row.happened > SHORT_SECONDS}
        selected = [row for row in selected if what != "seconds" or (row.recipe, row.stage) in long]
        cells = []
        for name in ("first", "others", "same"):
            factors = [factor for row in selected if (factor := row.factor(name)) is not None]
            good = [factor for factor in factors if 1 / WITHIN <= factor <= WITHIN]
            middle = f", median {statistics.median(factors):.2f}" if factors else ""
            cells.append(f"{len(good)} of {len(factors)}{middle}" if factors else "-")
        lines.append([what, "alone" if quiet else "beside other work", *cells])
    return lines


def page(rows: Sequence[Row]) -> dict[str, Any]:
    """The page of the documentation: the summary, and the seconds of each stage that takes long."""
    titles = ["knowing no run", "knowing other recipes' runs", "knowing the recipe with other settings"]
    # Of runs beside other work the whole will do.
    shown = [row for row in rows if row.what == "seconds" and (row.busy < _QUIET_PERCENT or row.stage == WHOLE)]
    long = [row for row in shown if row.happened > SHORT_SECONDS]
    detail = []
    for row in long:
        factors = [_shown(row.factor(name)) for name in ("first", "others", "same")]
        detail.append([row.recipe, row.stage, _amount(row), *factors, f"{row.busy}%"])
    return {
        "title": "Plans",
        "order": 9,
        "command": "python benchmarks/plans.py ARTIFACTS... --write",
        "machine": "2 virtual cores of an Intel Xeon with AVX512-VNNI",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": (
            "What `compress check` predicts over what happened, for runs of shipped recipes at full size. Stages that "
            "train are tried on a few batches before; trials were made while others used the machine, and so were the "
            "runs whose last column is not 0%: what they took is more than they would have at rest. What exporting, "
            "quantizing and measuring cost, and how memory grows, was set by the runs that were alone, so that only "
            "the seconds of what trains, and disk, are predicted of runs that had no say."
        ),
        "tables": [
            {
                "title": f"Within a factor of {WITHIN} (seconds: of what takes over {SHORT_SECONDS:.0f} s)",
                "columns": ["quantity", "the run was", *titles],
                "rows": summary(rows),
            },
            {
                "title": "Seconds, predicted over happened",
                "columns": ["recipe", "stage", "took", *titles, "others took of the processor"],
                "rows": detail,
            },
        ],
    }


def _amount(row: Row) -> str:
    return f"{row.happened:.0f} s" if row.what == "seconds" else f"{row.happened / 1e6:.1f} MB"


def _shown(factor: float | None) -> str:
    return "?" if factor is None else f"{factor:.2f}"


if __name__ == "__main__":
    main()
