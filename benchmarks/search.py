"""Searches replayed on a table: a small real task, each of whose recipes was run once, with other rows and seeds.

    python benchmarks/search.py collect    runs every recipe of the space to every rung (an hour; goes on if stopped)
    python benchmarks/search.py replay     100 searches on the table that is kept in results/, against random ones
    python benchmarks/search.py ray        a search on one worker and on two, each of one processor
    python benchmarks/search.py killed     a search killed at ten random moments, against one left alone
    python benchmarks/search.py size       bytes that are foretold of unseen recipes of the space, against bytes made
    python benchmarks/search.py latency    the same of milliseconds; on a quiet machine
    python benchmarks/search.py emulate    searches of the quickstart's space, whose trials are emulated by real ones
    python benchmarks/search.py record     adds the trials of real searches to those that emulate
    python benchmarks/search.py olive      Olive's joint search and ours for the same
    python benchmarks/search.py found      what a search found beside a run of the recipe made by hand, on the test rows

A replay draws the rows that choose anew, and judges its pick on rows that neither it nor training saw. What it costs
are the recorded seconds of the stages that it ran, each once.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import search_emulated
import search_forecasts
import search_found
import search_killed
import search_olive
import search_workers
import search_world
import typer
from search_page import Write, show
from search_space import Unrun

from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.goal import Goal
from compress.plugins.search.outcome import TrialOutcome, pack_rows, unpack_rows
from compress.plugins.search.parameters import SearchParameter
from compress.plugins.search.space import Point
from compress.results.report import BASELINE, FINAL

HERE = Path(__file__).parent
RECIPE = HERE / "searching" / "reviews.yaml"
TABLE = HERE / "results" / "search_table.json.gz"
METRIC, CHOOSE = "accuracy", 1500
_DISTILL = 3
"""The last stage of the recipe that trains."""
app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def collect(
    artifacts: Annotated[Path, typer.Option(help="Where stages are cached.")] = Path("artifacts"),
    output: Annotated[Path, typer.Option(help="The table.")] = TABLE,
) -> None:
    """Run every recipe to every rung, judged on the rows held out and on the test rows."""
    from compress.cli.console_progress import ConsoleProgress
    from compress.formats.silence import quiet_libraries
    from compress.plugins.search.space import SearchSpace
    from compress.plugins.search.trial import EvaluateModels, TrialRunner
    from compress.recipe.document import read_document

    quiet_libraries()
    space = SearchSpace(read_document(RECIPE), RECIPE.parent)
    goal, progress = Goal.from_recipe(space.base, space.search), ConsoleProgress()
    trials = TrialRunner.in_process(goal, RECIPE.parent, artifacts, progress)
    shares = (*space.search.rungs, 1.0)
    rows = []
    for number, point in enumerate(space.points(0)):
        for rung, share in enumerate(shares):
            recipe = space.recipe(point, share)
            outcome = trials.run(recipe, timed=False)
            told = outcome.model_dump()
            # A replay judges by these; of other metrics it would take many times the bytes.
            told["rows"] = {model: {METRIC: each[METRIC]} for model, each in told["rows"].items()}
            row = {"point": point, "rung": rung, "outcome": told, "words": space.describe(point)}
            if outcome.error is None:
                runner = trials.run_recipe(recipe)
                # Seconds that the entries remember, whatever was cached this time.
                row["seconds"] = [runner.results[label].entry.record["seconds"] for label in recipe.labels()]
                if share == 1:
                    _, found = EvaluateModels("test")(runner)
                    row["test"] = {
                        one.model: pack_rows(one.raw) for one in found if one.metric == METRIC and one.raw is not None
                    }
            rows.append(row)
            progress.note(
                f"{number + 1} of {space.size}, rung {rung}: {space.describe(point)}: {outcome.final.get(METRIC)}"
            )
    kept = {
        "knobs": [
            [parameter.name, list(parameter.values), parameter.stage_index, parameter.is_optional_stage]
            for parameter in space.parameters
        ],
        "shares": shares,
        "rows": rows,
        "families": {json.dumps(point): len(space.stages(point)[3].student.layers) for point in space.points(0)},
    }
    output.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))
    typer.echo(f"{len(rows)} trials in {output}")


@dataclass
class Table(Unrun):
    """The recorded space, as the engine and its forecasts see it; ``rows`` are the places of those that choose."""

    kept: dict[str, Any]
    rows: np.ndarray
    fresh: np.ndarray
    wrong_by: float = 0.0
    """By how much predictions of size are off, one standard deviation, relative."""
    seed: int = 0
    spent: float = 0.0
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.parameters = tuple(
            SearchParameter(name, tuple(values), stage, is_stage, is_after_training=stage > _DISTILL)
            for name, values, stage, is_stage in self.kept["knobs"]
        )
        self.shares = tuple(self.kept["shares"])
        self._rows = {(tuple(row["point"]), row["rung"]): row for row in self.kept["rows"]}
        self._noise = random.Random(self.seed)
        self._off = {point: self._noise.gauss(1, self.wrong_by) for point in sorted({point for point, _ in self._rows})}

    @property
    def is_enumerable(self) -> bool:
        return True

    def points(self, seed: int) -> Iterator[Point]:
        yield from sorted({point for point, _ in self._rows})

    def family(self, point: Point) -> tuple[object, ...]:
        return (self.kept["families"][json.dumps(list(point))],)

    def tolerance(self, point: Point, metric: str) -> float:
        return max(0.02, 3 * self.wrong_by)

    def predict(self, point: Point, metric: str) -> float | None:
        if metric != "size_bytes":
            return None
        size: float = self._rows[point, len(self.shares) - 1]["outcome"]["final"]["size_bytes"]
        return size * self._off[point]

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        return self.predict(point, metric)

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        """Nothing: the table knows."""

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return sum(self.remaining(point, share).values())

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        return {key: seconds for key, seconds in self._stages(point, share) if key not in self.done}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return sum(seconds for _, seconds in self._stages(point, share))

    def _stages(self, point: Point, share: float) -> list[tuple[str, float]]:
        row = self._rows[point, self.shares.index(share)]
        keys = [stage["key"] for stage in row["outcome"]["stages"]]
        return list(zip(keys, row["seconds"], strict=True))

    def run(self, job: PlannedTrial) -> TrialOutcome:
        """What came of it, on the rows that choose; its stages are paid for once."""
        for key, seconds in self._stages(job.point, self.shares[job.rung]):
            if key not in self.done:
                self.done.add(key)
                self.spent += seconds
        return self.outcome(job.point, job.rung)

    def outcome(self, point: Point, rung: int) -> TrialOutcome:
        whole = TrialOutcome.model_validate(self._rows[point, rung]["outcome"])
        rows = {model: np.asarray(unpack_rows(whole.rows[model][METRIC]))[self.rows] for model in (FINAL, BASELINE)}
        return whole.model_copy(
            update={
                "rows": {model: {METRIC: pack_rows(values)} for model, values in rows.items()},
                "final": {**whole.final, METRIC: float(rows[FINAL].mean())},
                "baseline": {**whole.baseline, METRIC: float(rows[BASELINE].mean())},
            }
        )

    def kept_on_fresh_rows(self, point: Point) -> float:
        """The share of the baseline's accuracy that is kept on rows that nobody saw."""
        row = self._rows[point, len(self.shares) - 1]
        held = {
            model: np.asarray(unpack_rows(row["outcome"]["rows"][model][METRIC]))[self.fresh]
            for model in (FINAL, BASELINE)
        }
        tests = {model: np.asarray(unpack_rows(row["test"][model])) for model in (FINAL, BASELINE)}
        means = {model: np.concatenate([held[model], tests[model]]).mean() for model in (FINAL, BASELINE)}
        return float(means[FINAL] / means[BASELINE])

    @property
    def cost_of_all(self) -> float:
        """Of training every recipe in full."""
        found: dict[str, float] = {}
        for (point, rung), _ in self._rows.items():
            if rung == len(self.shares) - 1:
                found |= dict(self._stages(point, 1.0))
        return sum(found.values())


def _table(kept: dict[str, Any], seed: int, wrong_by: float) -> Table:
    count = len(unpack_rows(kept["rows"][0]["outcome"]["rows"][FINAL][METRIC]))
    order = np.random.default_rng(seed).permutation(count)
    return Table(kept, order[:CHOOSE], order[CHOOSE:], wrong_by, seed)


def _best(table: Table, goal: Goal) -> tuple[Point | None, float]:
    """What trying everything would choose by the same rows and the same rule."""
    full = len(table.shares) - 1
    outcomes = {point: table.outcome(point, full) for point in table.points(0)}
    kept = {point: outcome.final["size_bytes"] for point, outcome in outcomes.items() if goal.meets_limits(outcome)}
    point = min(kept, key=kept.__getitem__, default=None)
    return point, kept[point] if point is not None else float("inf")


def _paid_until_found(
    table: Table, goal: Goal, jobs: Iterator[PlannedTrial], engine: Engine | None, wanted: float
) -> float:
    """Seconds until a recipe within 1% of the wanted size that keeps the limit was trained in full."""
    full = len(table.shares) - 1
    for job in jobs:
        outcome = table.run(job)
        if engine is not None:
            engine.record(job, outcome)
        if job.rung == full and goal.meets_limits(outcome) and outcome.final["size_bytes"] <= wanted * 1.01:
            return table.spent
    return float("inf")


def _searching(engine: Engine) -> Iterator[PlannedTrial]:
    while jobs := engine.next_round():
        yield from jobs


def _at_random(table: Table, seed: int) -> Iterator[PlannedTrial]:
    points = list(table.points(0))
    random.Random(seed).shuffle(points)
    full = len(table.shares) - 1
    yield PlannedTrial(table.origin, full)
    yield from (PlannedTrial(point, full) for point in points if point != table.origin)


@app.command()
def replay(
    table: Annotated[Path, typer.Option(help="What `collect` wrote.")] = TABLE,
    searches: Annotated[int, typer.Option(help="How many for each bound.")] = 100,
    confidence: Annotated[float, typer.Option(help="How sure a limit has to be kept.")] = 0.95,
    bounds: Annotated[str, typer.Option(help="Shares of the baseline's accuracy to keep.")] = "0.87,0.88,0.89,0.9",
    wrong_by: Annotated[float, typer.Option(help="Error of predicted sizes, one standard deviation.")] = 0.0,
    write: Write = False,
) -> None:
    """100 searches, each with other rows and seeds, against trying recipes at random."""
    kept = json.loads(gzip.decompress(table.read_bytes()))
    wanted = [float(bound) for bound in bounds.split(",")]
    each = [_replayed(kept, bound, searches, confidence, wrong_by) for bound in wanted]
    found = [_summary(some) for some in (*([one] for one in each), each)]
    rows = [[what, *(one[what] for one in found), _WANTED.get(what, "")] for what in found[0]]
    columns = ("what", *(f"{bound:.0%} kept" for bound in wanted), "all", "wanted")
    recipes = len({tuple(row["point"]) for row in kept["rows"]})
    show("Replayed", columns, rows, write, text=_replay_text(recipes, confidence, wrong_by))


_SOON, _SOONER, _TIMES, _HELD = (
    "at 25% of the cost",
    "at 15%",
    "random search costs",
    "picks that keep it on fresh rows",
)
_WANTED = {_SOON: "90%", _SOONER: "aim 95%", _TIMES: "2x (aim 4x)", _HELD: "95%"}


@dataclass
class Replays:
    """Searches for the smallest that keeps one bound: shares of the cost until it was found, and what came of it."""

    ours: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    trials: list[int] = field(default_factory=list)


def _replayed(kept: dict[str, Any], bound: float, searches: int, confidence: float, wrong_by: float) -> Replays:
    """Of those searches in which trying everything would find one."""
    from compress.recipe.recipe import Limit

    goal = Goal(("size_bytes",), (Limit(metric=METRIC, at_least=bound, of="baseline"),), confidence)
    found = Replays()
    for seed in range(searches):
        fresh = _table(kept, seed, wrong_by)
        best, size = _best(fresh, goal)
        if best is None:
            continue
        engine = Engine(fresh, fresh, goal, fresh.shares, seed)
        found.ours.append(_paid_until_found(fresh, goal, _searching(engine), engine, size) / fresh.cost_of_all)
        for job in _searching(engine):  # what is left for the search to do decides which it picks
            engine.record(job, fresh.run(job))
        pick = engine.observations.best() or best
        found.held.append(fresh.kept_on_fresh_rows(pick) >= bound)
        found.trials.append(len(engine.observations.outcomes))
        other = _table(kept, seed, wrong_by)
        found.chance.append(_paid_until_found(other, goal, _at_random(other, seed), None, size) / other.cost_of_all)
    return found


def _summary(some: Sequence[Replays]) -> dict[str, str]:
    """Of the searches for one bound or for several."""
    ours, chance = [one for each in some for one in each.ours], [one for each in some for one in each.chance]
    held = [one for each in some for one in each.held]
    return {
        "searches": str(len(ours)),
        _SOON: f"{sum(one <= 0.25 for one in ours) / len(ours):.0%}",
        _SOONER: f"{sum(one <= 0.15 for one in ours) / len(ours):.0%}",
        "share of the cost until it is found, median": f"{statistics.median(ours):.1%}",
        "the same, trying at random": f"{statistics.median(chance):.1%}",
        _TIMES: f"{statistics.median(b / a for a, b in zip(ours, chance, strict=True)):.1f}x",
        _HELD: f"{sum(held) / len(held):.0%}",
        "trials, median": f"{statistics.median(count for each in some for count in each.trials):g}",
    }


def _replay_text(recipes: int, confidence: float, wrong_by: float) -> str:
    sizes = f"within {wrong_by:.1%}" if wrong_by else "exactly, as they are (below)"
    return (
        f"A space of {recipes} recipes (`benchmarks/searching/reviews.yaml`), each run once to each rung, and searches "
        f"replayed on it: the smallest model that keeps a share of the accuracy, {confidence:.0%} surely, by "
        f"{CHOOSE:,} rows drawn anew each time; sizes are foretold {sizes}. Found is what lies within 1% of the "
        "smallest that trying everything would choose by the same rows; the cost is that of the stages run, of all."
    )


app.command()(search_workers.ray)
app.command()(search_killed.killed)
app.command()(search_olive.olive)
app.command()(search_found.found)
for _command in (search_world.record, search_emulated.emulate, *search_forecasts.commands()):
    app.command()(_command)

if __name__ == "__main__":
    sys.exit(app())
