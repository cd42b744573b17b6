"""Everything that trials have shown so far, and what of it is best."""

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
    """Outcomes by point and rung; ``full`` is the last rung, after which a recipe is trained in full."""

    goal: Goal
    full_rung: int
    origin: Point
    outcomes: dict[tuple[Point, int], TrialOutcome] = field(default_factory=dict)
    margins: dict[tuple[Point, int], dict[str, Estimate | None]] = field(default_factory=dict)
    """How far inside each limit they lie; of those that did not fail."""
    finished: dict[Point, TrialOutcome] = field(default_factory=dict)
    feasible: dict[Point, tuple[float, ...]] = field(default_factory=dict)
    """The figures to minimize of those that keep every limit."""

    def copy(self) -> Observations:
        """The same, to go on from without changing this."""
        return replace(
            self,
            outcomes=dict(self.outcomes),
            margins=dict(self.margins),
            finished=dict(self.finished),
            feasible=dict(self.feasible),
        )

    def add(self, point: Point, rung: int, outcome: TrialOutcome) -> None:
        """Take note of what came of a trial."""
        self.outcomes[point, rung] = outcome
        if outcome.error is not None:
            return
        goal = self.goal
        self.margins[point, rung] = {
            limit_name(one): constraint_margin(one, outcome, goal.confidence) for one in goal.limits
        }
        if rung < self.full_rung:
            return
        self.finished[point] = outcome
        values = goal.objectives(outcome)
        if values is not None and goal.meets_limits(outcome):
            self.feasible[point] = values

    def last_rungs(self) -> dict[Point, int]:
        """How far each recipe came that did not fail."""
        found: dict[Point, int] = {}
        for point, rung in self.margins:
            found[point] = max(rung, found.get(point, -1))
        return found

    def initial_objectives(self) -> tuple[float, ...] | None:
        """The figures of the recipe that the search began with, once it is trained in full."""
        return self.goal.objectives(self.finished[self.origin]) if self.origin in self.finished else None

    def pareto_front(self) -> list[Point]:
        """Those that keep every limit and that no other beats in all that is minimized; the best of one figure."""
        found: list[tuple[tuple[float, ...], Point]] = []
        for values, point in sorted((values, point) for point, values in self.feasible.items()):
            if not is_dominated(values, [other for other, _ in found]):
                found.append((values, point))
        return [point for _, point in found]

    def best(self) -> Point | None:
        """The winner; of a front the one that is smallest when each figure counts as a share of the first trial's."""
        return min(self.pareto_front(), key=self._merit, default=None)

    def _merit(self, point: Point) -> tuple[float, Point]:
        start = self.initial_objectives() or (1.0,) * len(self.goal.minimize)
        shares = (value / (base or 1.0) for value, base in zip(self.feasible[point], start, strict=True))
        return sum(shares), point

    def pick(self) -> Point | None:
        """The winner; where nothing keeps every limit surely, the one whose figures do and that does so most surely."""
        return self.best() or next(iter(self._reaching("value")), None)

    def ranked(self) -> list[Point]:
        """What is judged at the end, and what would be without those before: the pick first.

        Where no figures keep every limit on quality, those that the rows leave it open of.
        """
        if self.feasible:
            return sorted(self.feasible, key=self._merit)
        return self._reaching("value") or self._reaching("high")

    def _reaching(self, end: Literal["value", "high"]) -> list[Point]:
        """Those that keep every limit, the ones on quality by the figure or by the upper end of its interval."""
        ends = {limit_name(limit): end for limit in self.goal.quality_limits}

        def reaches(point: Point) -> bool:
            rooms = self.margins[point, self.full_rung].items()
            return all(room is not None and getattr(room, ends.get(name, "value")) >= -1e-12 for name, room in rooms)

        return [point for point in self.by_shortfall() if reaches(point)]

    def by_shortfall(self) -> list[Point]:
        """The recipes trained in full, those first that fall short by least, or lie furthest inside."""
        short = {point: max(self.goal.shortfalls(one).values(), default=0.0) for point, one in self.finished.items()}
        return sorted(short, key=lambda point: (short[point], point))

    def measured_value(self, point: Point, metric: str) -> float | None:
        """A figure that training doesn't change, as it was measured at any rung."""
        if not describe_metric(metric).from_file:
            return None
        found = (self.outcomes.get((point, rung)) for rung in range(self.full_rung, -1, -1))
        return next((one.final[metric] for one in found if one is not None and metric in one.final), None)
