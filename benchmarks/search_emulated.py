"""Hours of searching, emulated: the engine's decisions in the quickstart's space, whose real trials take minutes each.

The command `emulate` of `benchmarks/search.py`: some 10 seconds a search, in the world that `search_world.py` tells
(Eggensperger et al. 2015, "Efficient benchmarking of hyperparameter optimizers via surrogates"). By this the engine is
tuned: `replay` has 128 listed recipes, and shows nothing of what goes wrong among 300,000.
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
from search_page import FOUND_AND_WANTED, Write, show
from search_space import RecordedSpace
from search_world import KEEP, SHARES, WIDTH, World, normal

from compress.plugins.search.engine import Engine, PlannedTrial
from compress.plugins.search.outcome import Goal, TrialOutcome, pack_rows
from compress.plugins.search.space import Point
from compress.recipe.recipe import Limit
from compress.results.report import BASELINE, FINAL

LIMITS = (KEEP, Limit(metric="size_bytes", at_most=4.82e6), Limit(metric="latency_ms", at_most=0.473))
ROWS, RIGHT, DISAGREE = 1500, 0.857, 0.055
"""Rows that choose, the baseline's accuracy on them, and the share that a student alone has right."""
_SHARED, _OWN = 0.008, 0.004
"""By how much so many rows mislead about all students alike, and about each besides; standard deviations."""
_EACH, _ALL = 0.04, 0.1
"""By how much times are foretold wrongly, of each recipe, and of all alike until one beside the first was timed."""
BUDGET, OVERHEAD = 1750.0, 20.0
"""Seconds for trials, of an hour less the baseline's training and the end, and those gone when the first has ended."""


@dataclass
class Emulated(RecordedSpace):
    """A world as the engine and its forecasts see it, in which a trial takes no time."""

    world: World
    seed: int
    spent: float = 0.0
    done: set[tuple[object, ...]] = field(default_factory=set)
    timed: int = 0
    is_enumerable = False

    def __post_init__(self) -> None:
        self.parameters = self.world.parameters
        rng, sizes = np.random.default_rng(self.seed), [len(parameter.values) for parameter in self.parameters]
        drawn = rng.integers(0, sizes, (700, len(sizes)))
        self._points = list(dict.fromkeys([self.origin, *(tuple(map(int, one)) for one in drawn)]))
        self._right = np.ones(ROWS)
        self._right[rng.permutation(ROWS)[: round((1 - RIGHT) * ROWS)]] = 0
        self._rooms: dict[tuple[Point, float], float] = {}

    def points(self, seed: int) -> Iterable[Point]:
        return self._points

    def family(self, point: Point) -> tuple[object, ...]:
        return (len(self.world.of(point)["distill.student.layers"]),)

    def tolerance(self, point: Point, metric: str) -> float:
        return 1e-4 if metric == "size_bytes" else 0.225 if self.timed < 2 else 0.15

    def predict(self, point: Point, metric: str) -> float | None:
        if metric == "size_bytes":
            return self.world.size_bytes(point)
        if metric == "parameters":
            return self.world.weights(point) + self.world.tokens(point) * WIDTH
        if metric != "latency_ms":
            return None
        off = _EACH * normal(self.seed, "foretold", self.world.matrices(point))
        off += _ALL * normal(self.seed, "foretold") if self.timed < 2 else 0.0
        return self.world.latency_ms(point) * (1 + off)

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        return None if metric == "latency_ms" else self.predict(point, metric)

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        self.done |= self.world.stages(point, share).keys()
        self.timed += share == 1

    def remaining(self, point: Point, share: float = 1.0) -> Mapping[str, float]:
        stages = self.world.stages(point, share)
        return {str(key): seconds for key, seconds in stages.items() if key not in self.done}

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        return _JUDGED + sum(self.remaining(point, share).values())

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        return _OPENED + sum(self.world.stages(point, share).values())

    def room(self, point: Point, share: float) -> float:
        """How far inside the limit on accuracy it lies in truth."""
        if (point, share) not in self._rooms:
            self._rooms[point, share] = self.world.room(point, share, self.seed)
        return self._rooms[point, share]

    def run(self, job: PlannedTrial) -> TrialOutcome:
        """What came of it by the rows that choose, timed with the noise of real timings."""
        point, share = job.point, SHARES[job.rung]
        self.spent += sum(self.remaining(point, share).values()) + (_JUDGED if share == 1 else _GLANCED)
        # As many rows more and fewer right as make the accuracy what it is.
        more = round(DISAGREE * ROWS)
        drawn = _SHARED * normal(self.seed, "rows") + _OWN * normal(self.seed, "rows", point[:5], share)
        fewer = more - round((KEEP.bound + self.room(point, share) + drawn - 1) * RIGHT * ROWS)
        draw, answers = random.Random(repr((self.seed, point, share))), self._right.copy()
        for row in draw.sample([*np.flatnonzero(self._right == 0)], more):
            answers[row] = 1
        for row in draw.sample([*np.flatnonzero(self._right)], max(fewer, 0)):
            answers[row] = 0
        latency = self.world.latency_ms(point) * (1 + 0.03 * normal(self.seed, "timed", point))
        sizes = {"size_bytes": self.world.size_bytes(point), "latency_ms": latency}
        return TrialOutcome(
            final={"accuracy": float(answers.mean()), **sizes},
            baseline={"accuracy": float(self._right.mean()), "size_bytes": 9.1e7, "latency_ms": 6.4},
            rows={FINAL: {"accuracy": pack_rows([*answers])}, BASELINE: {"accuracy": pack_rows([*self._right])}},
        )


_JUDGED, _GLANCED, _OPENED = 12.0, 2.0, 45.0
"""Seconds to judge and time a model, to judge one that is not timed, and of a run that nobody shares a stage with."""


@dataclass(frozen=True)
class Found:
    """What a search came to: seconds until something kept every limit in truth (None: never), and its pick."""

    after: float | None
    picked: bool
    room: float
    trials: int


def searched(world: World, seed: int, budget: float = BUDGET, say: bool = False) -> Found:
    """One search for the fastest."""
    emulated, goal = Emulated(world, seed), Goal(("latency_ms",), LIMITS, 0.95)
    engine = Engine(emulated, emulated, goal, SHARES, seed)
    after: float | None = None
    for job in _within(emulated, engine, budget):
        outcome = emulated.run(job)
        if job.point == emulated.origin and not engine.observations.outcomes:
            emulated.spent = OVERHEAD
        engine.record(job, outcome)
        final, room = outcome.final, emulated.room(job.point, SHARES[job.rung])
        kept = (room, LIMITS[1].bound - final["size_bytes"], LIMITS[2].bound - final["latency_ms"])
        good = job.rung == engine.full_rung and min(kept) >= 0
        if say:
            sizes = f"{final['size_bytes'] / 1e6:.2f} MB, {final['latency_ms']:.3f} ms{', kept' if good else ''}"
            words = ", ".join(f"{name} {value}" for name, value in world.of(job.point).items())
            typer.echo(f"{emulated.spent:5.0f} s, {SHARES[job.rung]:.0%}: {room:+.2%}, {sizes}: {words} ({job.why})")
        if good and after is None:
            after = emulated.spent
    pick = engine.observations.pick()
    room = math.nan if pick is None else emulated.room(pick, 1.0)
    return Found(after, pick is not None, room, len(engine.observations.outcomes))


def _within(emulated: Emulated, engine: Engine, budget: float) -> Iterator[PlannedTrial]:
    while jobs := engine.next_round():
        for job in jobs:
            takes = emulated.marginal_seconds(job.point, SHARES[job.rung])
            if engine.observations.outcomes and emulated.spent + takes > budget:
                return
            yield job


def emulate(
    searches: Annotated[int, typer.Option(help="How many, each with a seed and a world of its own.")] = 16,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    say: Annotated[bool, typer.Option("--say", help="Print every trial.")] = False,
    write: Write = False,
) -> None:
    """Searches for the fastest that keeps the quickstart's limits, in the time that an hour leaves for trials."""
    world = World.recorded()
    found = [searched(world, seed, say=say) for seed in range(first, first + searches)]
    after = [one.after for one in found if one.after is not None]
    inside = [one.room for one in found if one.picked]
    rows = [
        ["searches that tried what keeps every limit", f"{len(after)} of {searches}", ""],
        ["seconds until then, median", f"{statistics.median(after):,.0f} of {BUDGET:,.0f}" if after else "", ""],
        ["searches whose pick keeps its accuracy in truth", f"{sum(room >= 0 for room in inside)} of {searches}", ""],
        ["how far inside the limit picks lie, median", f"{statistics.median(inside):+.2%}" if inside else "", ""],
        ["trials, median", f"{statistics.median(one.trials for one in found):g}", ""],
    ]
    note = f"`python benchmarks/search.py emulate --write`; a process through {len(world.trials)} real trials"
    show("Emulated searches of the quickstart's space", FOUND_AND_WANTED, rows, write, notes=[note])
