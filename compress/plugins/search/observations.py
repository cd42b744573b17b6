"""Outcomes of all trials so far, and the best recipes among them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from compress.numerics.statistics import Estimate
from compress.plugins.search.goal import Goal, is_dominated, limit_name
from compress.plugins.search.outcome import TrialOutcome, constraint_margin
from compress.plugins.search.space import Point
from compress.results.metrics import describe_metric


@dataclass
class Observations:
    """Outcomes by point and rung.

    Attributes:
        goal: Objectives and limits.
        full_rung: Index of the last rung, after which a recipe is trained in full.
        origin: Point of the recipe that the search starts from.
        outcomes: Outcome of each point at each rung.
        margins: Margin of each limit for each trial that did not fail; None where it was not measured.
        finished: Outcomes of recipes that were trained in full.
        feasible: Objectives of the recipes that meet every limit.
    """

    goal: Goal
    full_rung: int
    origin: Point
    outcomes: dict[tuple[Point, int], TrialOutcome] = field(default_factory=dict)
    margins: dict[tuple[Point, int], dict[str, Estimate | None]] = field(default_factory=dict)
    finished: dict[Point, TrialOutcome] = field(default_factory=dict)
    feasible: dict[Point, tuple[float, ...]] = field(default_factory=dict)

    def copy(self) -> Observations:
        """Return a copy whose changes do not affect this one."""
        return replace(
            self,
            outcomes=dict(self.outcomes),
            margins=dict(self.margins),
            finished=dict(self.finished),
            feasible=dict(self.feasible),
        )

    def add(self, point: Point, rung: int, outcome: TrialOutcome) -> None:
        """Record the outcome of a trial."""
        self.outcomes[point, rung] = outcome
        if outcome.error is not None:
            return
        goal = self.goal
        self.margins[point, rung] = {
            limit_name(limit): constraint_margin(limit, outcome, goal.confidence) for limit in goal.limits
        }
        if rung < self.full_rung:
            return
        self.finished[point] = outcome
        values = goal.objectives(outcome)
        if values is not None and goal.meets_limits(outcome):
            self.feasible[point] = values

    def last_rungs(self) -> dict[Point, int]:
        """Return the last rung of each recipe that did not fail."""
        last_rungs: dict[Point, int] = {}
        for point, rung in self.margins:
            last_rungs[point] = max(rung, last_rungs.get(point, -1))
        return last_rungs

    def initial_objectives(self) -> tuple[float, ...] | None:
        """Return the objectives of the recipe that the search started from, once it is trained in full."""
        return self.goal.objectives(self.finished[self.origin]) if self.origin in self.finished else None

    def pareto_front(self) -> list[Point]:
        """Return the feasible recipes that no other dominates; with one objective, the best."""
        front: list[tuple[tuple[float, ...], Point]] = []
        for values, point in sorted((values, point) for point, values in self.feasible.items()):
            if not is_dominated(values, [other for other, _ in front]):
                front.append((values, point))
        return [point for _, point in front]

    def best(self) -> Point | None:
        """Return the best feasible recipe.

        Of a front, this is the one with the least sum of objectives, each relative to the first trial.
        """
        return min(self.pareto_front(), key=self._merit, default=None)

    def _merit(self, point: Point) -> tuple[float, Point]:
        start = self.initial_objectives() or (1.0,) * len(self.goal.minimize)
        shares = (value / (base or 1.0) for value, base in zip(self.feasible[point], start, strict=True))
        return sum(shares), point

    def pick(self) -> Point | None:
        """Return the best feasible recipe; without one, the safest recipe whose measured values meet every limit."""
        return self.best() or next(iter(self._reaching("value")), None)

    def ranked(self) -> list[Point]:
        """Return the recipes to evaluate at the end, the pick first.

        Without a feasible recipe, these are the recipes whose measured values meet every limit on quality, or else
        the ones that may meet them.
        """
        if self.feasible:
            return sorted(self.feasible, key=self._merit)
        return self._reaching("value") or self._reaching("high")

    def _reaching(self, end: Literal["value", "high"]) -> list[Point]:
        """Return the recipes that meet every limit, those on quality by one end of their interval."""
        ends = {limit_name(limit): end for limit in self.goal.quality_limits}

        def reaches(point: Point) -> bool:
            rooms = self.margins[point, self.full_rung].items()
            return all(room is not None and getattr(room, ends.get(name, "value")) >= -1e-12 for name, room in rooms)

        return [point for point in self.by_shortfall() if reaches(point)]

    def by_shortfall(self) -> list[Point]:
        """Return the recipes trained in full, ordered by their largest shortfall."""
        shortfalls = {
            point: max(self.goal.shortfalls(outcome).values(), default=0.0) for point, outcome in self.finished.items()
        }
        return sorted(shortfalls, key=lambda point: (shortfalls[point], point))

    def measured_value(self, point: Point, metric: str) -> float | None:
        """Return a metric that training does not change, as it was measured at any rung."""
        if not describe_metric(metric).from_file:
            return None
        outcomes = (self.outcomes.get((point, rung)) for rung in range(self.full_rung, -1, -1))
        return next(
            (outcome.final[metric] for outcome in outcomes if outcome is not None and metric in outcome.final), None
        )
