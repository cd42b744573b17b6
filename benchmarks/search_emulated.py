"""Emulated searches of the quickstart's space, whose real trials take minutes each.

The command `emulate` of `benchmarks/search.py`. A search takes 10 seconds with the surrogate model of `search_world.py`
(Eggensperger et al. 2015, "Efficient benchmarking of hyperparameter optimizers via surrogates"). It is used to tune the
search engine for a space of 300,000 recipes, while `replay` only has 128.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import typer
from search_page import MEASURED_AND_REQUIRED, Write, show
from search_space import RecordedSpace
from search_world import KEEP, SHARES, WIDTH, World, normal

from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.outcome import Goal, TrialOutcome, pack_rows
from compress.plugins.search.space import Point
from compress.recipe.recipe import Limit
from compress.results.report import BASELINE, FINAL

LIMITS = (KEEP, Limit(metric="size_bytes", at_most=4.82e6), Limit(metric="latency_ms", at_most=0.473))
ROWS, BASELINE_ACCURACY, GAINED_SHARE = 1500, 0.857, 0.055
"""Selection rows, the baseline's accuracy on them, and the share that only the student classifies correctly."""
_SHARED_NOISE, _STUDENT_NOISE = 0.008, 0.004
"""Standard deviations of the accuracy on the selection rows: the part shared by all students, and the part of each."""
BUDGET, OVERHEAD = 1750.0, 20.0
"""Seconds for trials of a search with one hour, and seconds spent when the first trial has ended."""


@dataclass
class EmulatedSearch(RecordedSpace):
    """Search space and cost model of the engine, in which trials are emulated."""

    world: World
    seed: int
    spent: float = 0.0
    done: set[tuple[object, ...]] = field(default_factory=set)
    is_enumerable = False

    def __post_init__(self) -> None:
        self.parameters = self.world.parameters
        rng, sizes = np.random.default_rng(self.seed), [len(parameter.values) for parameter in self.parameters]
        sampled = rng.integers(0, sizes, (700, len(sizes)))
        self._points = list(dict.fromkeys([self.origin, *(tuple(map(int, indices)) for indices in sampled)]))
        self._correct = np.ones(ROWS)
        self._correct[rng.permutation(ROWS)[: round((1 - BASELINE_ACCURACY) * ROWS)]] = 0
        self._margins: dict[tuple[Point, float], float] = {}

    def points(self, seed: int) -> Iterable[Point]:
        return self._points

    def family(self, point: Point) -> tuple[object, ...]:
        return (len(self.world.values(point)["distill.student.layers"]),)

    def tolerance(self, point: Point, metric: str) -> float:
        return 1e-4

    def predict(self, point: Point, metric: str) -> float | None:
        if metric == "size_bytes":
            return self.world.size_bytes(point)
        if metric == "parameters":
            return self.world.weights(point) + self.world.tokens(point) * WIDTH
        return None

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        return self.predict(point, metric)

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        self.done |= self.world.stages(point, share).keys()

    def remaining(self, point: Point, share: float = 1.0) -> Mapping[str, float]:
        stages = self.world.stages(point, share)
        return {str(key): seconds for key, seconds in stages.items() if key not in self.done}

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return _EVALUATION_SECONDS + sum(self.remaining(point, share).values())

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return _RUN_SECONDS + sum(self.world.stages(point, share).values())

    def margin(self, point: Point, share: float) -> float:
        """Return the true margin of a recipe to the accuracy limit."""
        if (point, share) not in self._margins:
            self._margins[point, share] = self.world.margin(point, share, self.seed)
        return self._margins[point, share]

    def run(self, job: PlannedTrial) -> TrialOutcome:
        """Return an outcome on the selection rows, with noise on accuracy and latency."""
        point, share = job.point, SHARES[job.rung]
        self.spent += sum(self.remaining(point, share).values()) + (
            _EVALUATION_SECONDS if share == 1 else _UNTIMED_SECONDS
        )
        # Flip rows of the baseline in both directions so that the accuracy has this margin.
        gained = round(GAINED_SHARE * ROWS)
        noise = _SHARED_NOISE * normal(self.seed, "rows") + _STUDENT_NOISE * normal(self.seed, "rows", point[:5], share)
        lost = gained - round((KEEP.bound + self.margin(point, share) + noise - 1) * BASELINE_ACCURACY * ROWS)
        generator, correct = random.Random(repr((self.seed, point, share))), self._correct.copy()
        for row in generator.sample([*np.flatnonzero(self._correct == 0)], gained):
            correct[row] = 1
        for row in generator.sample([*np.flatnonzero(self._correct)], max(lost, 0)):
            correct[row] = 0
        latency = self.world.latency_ms(point) * (1 + 0.03 * normal(self.seed, "timed", point))
        sizes = {"size_bytes": self.world.size_bytes(point), "latency_ms": latency}
        return TrialOutcome(
            final={"accuracy": float(correct.mean()), **sizes},
            baseline={"accuracy": float(self._correct.mean()), "size_bytes": 9.1e7, "latency_ms": 6.4},
            rows={FINAL: {"accuracy": pack_rows([*correct])}, BASELINE: {"accuracy": pack_rows([*self._correct])}},
        )


_EVALUATION_SECONDS, _UNTIMED_SECONDS, _RUN_SECONDS = 12.0, 2.0, 45.0
"""Seconds to evaluate and time a model, to evaluate it only, and to start a run without cached stages."""


@dataclass(frozen=True)
class SearchResult:
    """Result of an emulated search.

    Attributes:
        seconds: Time until a recipe met all limits by its true accuracy; None if none did.
        picked: Whether the search returned a recipe.
        margin: True margin of that recipe to the accuracy limit.
        trials: Number of trials.
    """

    seconds: float | None
    picked: bool
    margin: float
    trials: int


def run_search(world: World, seed: int, budget: float = BUDGET, verbose: bool = False) -> SearchResult:
    """Emulate one search for the lowest latency within the limits."""
    emulated, goal = EmulatedSearch(world, seed), Goal(("latency_ms",), LIMITS, 0.95)
    engine = Engine(emulated, emulated, goal, SHARES, seed)
    seconds: float | None = None
    for job in _trials_within_budget(emulated, engine, budget):
        outcome = emulated.run(job)
        if job.point == emulated.origin and not engine.observations.outcomes:
            emulated.spent = OVERHEAD
        engine.record(job, outcome)
        final, margin = outcome.final, emulated.margin(job.point, SHARES[job.rung])
        margins = (margin, LIMITS[1].bound - final["size_bytes"], LIMITS[2].bound - final["latency_ms"])
        is_feasible = job.rung == engine.full_rung and min(margins) >= 0
        if verbose:
            sizes = f"{final['size_bytes'] / 1e6:.2f} MB, {final['latency_ms']:.3f} ms"
            sizes += ", meets all limits" if is_feasible else ""
            values = ", ".join(f"{name} {value}" for name, value in world.values(job.point).items())
            typer.echo(f"{emulated.spent:5.0f} s, {SHARES[job.rung]:.0%}: {margin:+.2%}, {sizes}: {values} ({job.why})")
        if is_feasible and seconds is None:
            seconds = emulated.spent
    pick = engine.observations.pick()
    margin = math.nan if pick is None else emulated.margin(pick, 1.0)
    return SearchResult(seconds, pick is not None, margin, len(engine.observations.outcomes))


def _trials_within_budget(emulated: EmulatedSearch, engine: Engine, budget: float) -> Iterator[PlannedTrial]:
    while jobs := engine.next_round():
        for job in jobs:
            seconds = emulated.marginal_seconds(job.point, SHARES[job.rung])
            if engine.observations.outcomes and emulated.spent + seconds > budget:
                return
            yield job


def emulate(
    searches: Annotated[int, typer.Option(help="Number of searches, each with another seed.")] = 16,
    first: Annotated[int, typer.Option(help="First seed.")] = 0,
    verbose: Annotated[bool, typer.Option("--say", help="Print every trial.")] = False,
    write: Write = False,
) -> None:
    """Emulate searches for the fastest recipe within the quickstart's limits, with a budget of one hour."""
    world = World.recorded()
    results = [run_search(world, seed, verbose=verbose) for seed in range(first, first + searches)]
    seconds = [result.seconds for result in results if result.seconds is not None]
    margins = [result.margin for result in results if result.picked]
    rows = [
        ["searches that found a recipe within all limits", f"{len(seconds)} of {searches}", ""],
        ["seconds until then, median", f"{statistics.median(seconds):,.0f} of {BUDGET:,.0f}" if seconds else "", ""],
        [
            "searches whose pick meets the true accuracy limit",
            f"{sum(margin >= 0 for margin in margins)} of {searches}",
            "",
        ],
        ["true accuracy margin of the picks, median", f"{statistics.median(margins):+.2%}" if margins else "", ""],
        ["trials, median", f"{statistics.median(result.trials for result in results):g}", ""],
    ]
    note = f"`python benchmarks/search.py emulate --write`; Gaussian process on {len(world.trials)} real trials"
    show("Emulated searches of the quickstart's space", MEASURED_AND_REQUIRED, rows, write, notes=[note])
