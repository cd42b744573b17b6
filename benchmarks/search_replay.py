"""Replays of searches on recorded trials: each recipe of a small real task was run once to each rung.

Each replay has other random selection rows and another seed, and evaluates its pick on rows that neither the search nor
training saw. Its cost is the recorded time of the stages that it ran, each counted once.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from search_page import Write, show
from search_space import RecordedSpace

from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.outcome import Goal, TrialOutcome, pack_rows, unpack_rows
from compress.plugins.search.space import Point, SearchParameter
from compress.recipe.recipe import Limit
from compress.results.report import BASELINE, FINAL

FOLDER = Path(__file__).parent
RECIPE = FOLDER / "searching" / "reviews.yaml"
TABLE = FOLDER / "results" / "search_table.json.gz"
METRIC, SELECTION_ROWS = "accuracy", 1500
BOUNDS = "0.87,0.88,0.89,0.9"
"""Shares of the baseline's accuracy that replayed searches have to keep."""
_LAST_TRAINING_STAGE = 3
"""Index of the `distill` stage in the recipe."""


def collect(
    artifacts: Annotated[Path, typer.Option(help="Folder of the stage cache.")] = Path("artifacts"),
    output: Annotated[Path, typer.Option(help="File for the recorded trials.")] = TABLE,
) -> None:
    """Run every recipe to every rung and evaluate it on the held-out rows and on the test rows."""
    from compress.formats.quiet_output import quiet_libraries
    from compress.plugins.ray.jobs import JobContext
    from compress.plugins.search.space import SearchSpace
    from compress.plugins.search.trial import BarsOnly, EvaluateModels, TrialRunner
    from compress.recipe.document import read_document
    from compress.report.progress import ConsoleProgress

    quiet_libraries()
    space = SearchSpace(read_document(RECIPE), RECIPE.parent)
    goal, progress = Goal.from_recipe(space.base), ConsoleProgress()
    trials = TrialRunner.in_process(goal, JobContext(RECIPE.parent, artifacts, BarsOnly(progress)))
    shares = (*space.search.rungs, 1.0)
    rows = []
    for number, point in enumerate(space.points(0)):
        for rung, share in enumerate(shares):
            recipe = space.recipe(point, share)
            outcome = trials.run(recipe, timed=False)
            record = outcome.model_dump()
            # Replays only need the rows of this metric; those of the others would be much larger.
            record["rows"] = {model: {METRIC: metrics[METRIC]} for model, metrics in record["rows"].items()}
            row = {"point": point, "rung": rung, "outcome": record, "words": space.describe(point)}
            if outcome.error is None:
                runner = trials.run_recipe(recipe)
                # Cache entries remember the time of their own run, so cached stages count in full.
                row["seconds"] = [runner.results[label].entry.record["seconds"] for label in recipe.labels()]
                if share == 1:
                    _, measurements = EvaluateModels("test")(runner)
                    row["test"] = {
                        measurement.model: pack_rows(measurement.raw)
                        for measurement in measurements
                        if measurement.metric == METRIC and measurement.raw is not None
                    }
            rows.append(row)
            progress.note(
                f"{number + 1} of {space.size}, rung {rung}: {space.describe(point)}: {outcome.final.get(METRIC)}"
            )
    recorded = {
        "knobs": [
            [parameter.name, list(parameter.values), parameter.stage_index, parameter.is_optional_stage]
            for parameter in space.parameters
        ],
        "shares": shares,
        "rows": rows,
        "families": {json.dumps(point): len(space.stages(point)[3].student.layers) for point in space.points(0)},
    }
    output.write_bytes(gzip.compress(json.dumps(recorded).encode(), mtime=0))
    typer.echo(f"{len(rows)} trials in {output}")


@dataclass
class RecordedTrials(RecordedSpace):
    """Search space and cost model of recorded trials.

    Attributes:
        recorded: Content of the file that `collect` writes.
        selection_rows: Indices of the held-out rows that the search selects by.
        fresh_rows: Indices of the other held-out rows, which evaluate its pick.
        size_error: Standard deviation of predicted sizes, relative.
        seed: Seed of the errors of predicted sizes.
        spent_seconds: Recorded time of the stages that were run so far.
        stages_run: Keys of these stages.
    """

    recorded: dict[str, Any]
    selection_rows: np.ndarray
    fresh_rows: np.ndarray
    size_error: float = 0.0
    seed: int = 0
    spent_seconds: float = 0.0
    stages_run: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.parameters = tuple(
            SearchParameter(name, tuple(values), stage, is_stage, is_after_training=stage > _LAST_TRAINING_STAGE)
            for name, values, stage, is_stage in self.recorded["knobs"]
        )
        self.shares = tuple(self.recorded["shares"])
        self._rows = {(tuple(row["point"]), row["rung"]): row for row in self.recorded["rows"]}
        self._points = sorted({point for point, _ in self._rows})
        noise = random.Random(self.seed)
        self._size_factors = {point: noise.gauss(1, self.size_error) for point in self._points}

    @property
    def full_rung(self) -> int:
        """Index of the last rung, at which recipes are trained in full."""
        return len(self.shares) - 1

    @property
    def is_enumerable(self) -> bool:
        return True

    def points(self, seed: int) -> Iterator[Point]:
        yield from self._points

    def family(self, point: Point) -> tuple[object, ...]:
        return (self.recorded["families"][json.dumps(list(point))],)

    def tolerance(self, point: Point, metric: str) -> float:
        return max(0.02, 3 * self.size_error)

    def predict(self, point: Point, metric: str) -> float | None:
        if metric != "size_bytes":
            return None
        size: float = self._rows[point, self.full_rung]["outcome"]["final"]["size_bytes"]
        return size * self._size_factors[point]

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        return self.predict(point, metric)

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        """Do nothing: the costs are recorded."""

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return sum(self.remaining(point, share).values())

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        return {key: seconds for key, seconds in self._stages(point, share) if key not in self.stages_run}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return sum(seconds for _, seconds in self._stages(point, share))

    def _stages(self, point: Point, share: float) -> list[tuple[str, float]]:
        row = self._rows[point, self.shares.index(share)]
        keys = [stage["key"] for stage in row["outcome"]["stages"]]
        return list(zip(keys, row["seconds"], strict=True))

    def run(self, trial: PlannedTrial) -> TrialOutcome:
        """Return the recorded outcome on the selection rows, and count the time of stages that were not run yet."""
        for key, seconds in self._stages(trial.point, self.shares[trial.rung]):
            if key not in self.stages_run:
                self.stages_run.add(key)
                self.spent_seconds += seconds
        return self.outcome(trial.point, trial.rung)

    def outcome(self, point: Point, rung: int) -> TrialOutcome:
        """Return the recorded outcome, restricted to the selection rows."""
        outcome = TrialOutcome.model_validate(self._rows[point, rung]["outcome"])
        rows = {
            model: np.asarray(unpack_rows(outcome.rows[model][METRIC]))[self.selection_rows]
            for model in (FINAL, BASELINE)
        }
        return outcome.model_copy(
            update={
                "rows": {model: {METRIC: pack_rows(values)} for model, values in rows.items()},
                "final": {**outcome.final, METRIC: float(rows[FINAL].mean())},
                "baseline": {**outcome.baseline, METRIC: float(rows[BASELINE].mean())},
            }
        )

    def accuracy_ratio_on_fresh_rows(self, point: Point) -> float:
        """Return accuracy divided by the baseline's, on the rows that neither training nor the search saw."""
        row = self._rows[point, self.full_rung]
        held_out = {
            model: np.asarray(unpack_rows(row["outcome"]["rows"][model][METRIC]))[self.fresh_rows]
            for model in (FINAL, BASELINE)
        }
        test = {model: np.asarray(unpack_rows(row["test"][model])) for model in (FINAL, BASELINE)}
        means = {model: np.concatenate([held_out[model], test[model]]).mean() for model in (FINAL, BASELINE)}
        return float(means[FINAL] / means[BASELINE])

    @property
    def exhaustive_seconds(self) -> float:
        """Time to train every recipe in full, each stage counted once."""
        stages: dict[str, float] = {}
        for point in self._points:
            stages |= dict(self._stages(point, 1.0))
        return sum(stages.values())

    def best(self, goal: Goal) -> tuple[Point | None, float]:
        """Return the recipe that an exhaustive search would select by the same rows, and its bytes."""
        outcomes = {point: self.outcome(point, self.full_rung) for point in self._points}
        sizes = {
            point: outcome.final["size_bytes"] for point, outcome in outcomes.items() if goal.meets_limits(outcome)
        }
        point = min(sizes, key=sizes.__getitem__, default=None)
        return point, sizes[point] if point is not None else float("inf")


def load_recorded(path: Path) -> dict[str, Any]:
    """Read the file that `collect` writes."""
    recorded: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return recorded


def sample_rows(recorded: dict[str, Any], seed: int, size_error: float = 0.0) -> RecordedTrials:
    """Return the recorded trials with selection rows sampled by ``seed``."""
    count = len(unpack_rows(recorded["rows"][0]["outcome"]["rows"][FINAL][METRIC]))
    order = np.random.default_rng(seed).permutation(count)
    return RecordedTrials(recorded, order[:SELECTION_ROWS], order[SELECTION_ROWS:], size_error, seed)


def size_goal(bound: float, confidence: float = 0.95) -> Goal:
    """Return the goal of a replay: the smallest model with at least a share ``bound`` of the baseline's accuracy."""
    return Goal(("size_bytes",), (Limit(metric=METRIC, at_least=bound, of="baseline"),), confidence)


def engine_trials(engine: Engine) -> Iterator[PlannedTrial]:
    """Yield the trials that the engine plans, until it ends; each has to be recorded before the next is taken."""
    while trials := engine.next_round():
        yield from trials


def random_trials(trials: RecordedTrials, seed: int) -> Iterator[PlannedTrial]:
    """Yield every recipe in random order, after the recipe that a search starts from."""
    points = list(trials.points(0))
    random.Random(seed).shuffle(points)
    yield PlannedTrial(trials.origin, trials.full_rung)
    yield from (PlannedTrial(point, trials.full_rung) for point in points if point != trials.origin)


def _seconds_to_best(
    trials: RecordedTrials, goal: Goal, planned: Iterator[PlannedTrial], engine: Engine | None, best_bytes: float
) -> float:
    """Return the time until a recipe within 1% of the best size that meets the limit was trained in full."""
    for trial in planned:
        outcome = trials.run(trial)
        if engine is not None:
            engine.record(trial, outcome)
        is_full = trial.rung == trials.full_rung
        if is_full and goal.meets_limits(outcome) and outcome.final["size_bytes"] <= best_bytes * 1.01:
            return trials.spent_seconds
    return float("inf")


def replay(
    table: Annotated[Path, typer.Option(help="File that `collect` wrote.")] = TABLE,
    searches: Annotated[int, typer.Option(help="Searches for each bound.")] = 100,
    confidence: Annotated[float, typer.Option(help="Confidence with which a limit has to be met.")] = 0.95,
    bounds: Annotated[str, typer.Option(help="Shares of the baseline's accuracy to keep.")] = BOUNDS,
    size_error: Annotated[float, typer.Option(help="Standard deviation of predicted sizes, relative.")] = 0.0,
    write: Write = False,
) -> None:
    """Replay searches, each with other rows and another seed, and compare them with random search."""
    recorded = load_recorded(table)
    levels = [float(bound) for bound in bounds.split(",")]
    replays = [replay_bound(recorded, bound, searches, confidence, size_error) for bound in levels]
    summaries = [_summarize(group) for group in (*([result] for result in replays), replays)]
    rows = [[label, *(summary[label] for summary in summaries), _REQUIRED.get(label, "")] for label in summaries[0]]
    columns = ("", *(f"{bound:.0%} of the accuracy" for bound in levels), "all", "required")
    recipes = len({tuple(row["point"]) for row in recorded["rows"]})
    show(
        "Replayed searches by accuracy limit", columns, rows, write, text=_replay_text(recipes, confidence, size_error)
    )


_WITHIN_25, _WITHIN_15, _SPEED_UP, _MET_ON_FRESH = (
    "found at 25% of the cost",
    "found at 15% of the cost",
    "cost of random search / cost",
    "picks that meet the limit on fresh rows",
)
_REQUIRED = {_WITHIN_25: "90%", _WITHIN_15: "aim 95%", _SPEED_UP: "2x (aim 4x)", _MET_ON_FRESH: "95%"}


@dataclass
class Replays:
    """Replayed searches for one bound; costs are shares of the cost of running every recipe."""

    costs: list[float] = field(default_factory=list)
    random_costs: list[float] = field(default_factory=list)
    met_on_fresh_rows: list[bool] = field(default_factory=list)
    trial_counts: list[int] = field(default_factory=list)


def replay_bound(
    recorded: dict[str, Any], bound: float, searches: int, confidence: float, size_error: float
) -> Replays:
    """Replay the searches with those selection rows by which at least one recipe meets the limit."""
    goal, results = size_goal(bound, confidence), Replays()
    for seed in range(searches):
        trials = sample_rows(recorded, seed, size_error)
        best, best_bytes = trials.best(goal)
        if best is None:
            continue
        engine = Engine(trials, trials, goal, trials.shares, seed)
        seconds = _seconds_to_best(trials, goal, engine_trials(engine), engine, best_bytes)
        results.costs.append(seconds / trials.exhaustive_seconds)
        # The pick also depends on the following trials, so the search continues to its end.
        for trial in engine_trials(engine):
            engine.record(trial, trials.run(trial))
        pick = engine.observations.best() or best
        results.met_on_fresh_rows.append(trials.accuracy_ratio_on_fresh_rows(pick) >= bound)
        results.trial_counts.append(len(engine.observations.outcomes))
        other = sample_rows(recorded, seed, size_error)
        seconds = _seconds_to_best(other, goal, random_trials(other, seed), None, best_bytes)
        results.random_costs.append(seconds / other.exhaustive_seconds)
    return results


def _summarize(replays: Sequence[Replays]) -> dict[str, str]:
    """Return the rows of the results table for the replays of one or several bounds."""
    costs = [cost for replay in replays for cost in replay.costs]
    random_costs = [cost for replay in replays for cost in replay.random_costs]
    met = [is_met for replay in replays for is_met in replay.met_on_fresh_rows]
    return {
        "searches": str(len(costs)),
        _WITHIN_25: f"{sum(cost <= 0.25 for cost in costs) / len(costs):.0%}",
        _WITHIN_15: f"{sum(cost <= 0.15 for cost in costs) / len(costs):.0%}",
        "median cost until found": f"{statistics.median(costs):.1%}",
        "median cost of random search": f"{statistics.median(random_costs):.1%}",
        _SPEED_UP: f"{statistics.median(b / a for a, b in zip(costs, random_costs, strict=True)):.1f}x",
        _MET_ON_FRESH: f"{sum(met) / len(met):.0%}",
        "median number of trials": f"{statistics.median(n for replay in replays for n in replay.trial_counts):g}",
    }


def _replay_text(recipes: int, confidence: float, size_error: float) -> str:
    sizes = f"with an error of {size_error:.1%}" if size_error else "exactly"
    return (
        f"The space has {recipes} recipes (`benchmarks/searching/reviews.yaml`). Each was run once to each rung, and "
        "searches are replayed on the recorded trials. They look for the smallest model that keeps a share of the "
        f"accuracy with {confidence:.0%} confidence, by {SELECTION_ROWS:,} rows sampled for each search. Sizes are "
        f"predicted {sizes}. *Found* means within 1% of the smallest recipe that an exhaustive search would select by "
        "the same rows. The *cost* is the time of the stages run, as a share of the time to run every recipe."
    )
