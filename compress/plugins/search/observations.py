"""Everything that trials have shown so far, and what of it is best."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from compress.numerics.statistics import Estimate
from compress.plugins.search.goal import Goal, dominated, named
from compress.plugins.search.outcome import Outcome, slack
from compress.plugins.search.space import Point
from compress.results.metrics import describe_metric


@dataclass
class Known:
    """Outcomes by point and rung; ``full`` is the last rung, after which a recipe is trained in full."""

    goal: Goal
    full: int
    origin: Point
    outcomes: dict[tuple[Point, int], Outcome] = field(default_factory=dict)
    rooms: dict[tuple[Point, int], dict[str, Estimate | None]] = field(default_factory=dict)
    """How far inside each limit they lie; of those that did not fail."""
    finished: dict[Point, Outcome] = field(default_factory=dict)
    kept: dict[Point, tuple[float, ...]] = field(default_factory=dict)
    """The figures to minimize of those that keep every limit."""

    def copied(self) -> Known:
        """The same, to go on from without changing this."""
        return replace(
            self,
            outcomes=dict(self.outcomes),
            rooms=dict(self.rooms),
            finished=dict(self.finished),
            kept=dict(self.kept),
        )

    def add(self, point: Point, rung: int, outcome: Outcome) -> None:
        """Take note of what came of a trial."""
        self.outcomes[point, rung] = outcome
        if outcome.error is not None:
            return
        goal = self.goal
        self.rooms[point, rung] = {named(one): slack(one, outcome, goal.confidence) for one in goal.limits}
        if rung < self.full:
            return
        self.finished[point] = outcome
        values = goal.values(outcome)
        if values is not None and goal.keeps(outcome):
            self.kept[point] = values

    def last_rungs(self) -> dict[Point, int]:
        """How far each recipe came that did not fail."""
        found: dict[Point, int] = {}
        for point, rung in self.rooms:
            found[point] = max(rung, found.get(point, -1))
        return found

    def start(self) -> tuple[float, ...] | None:
        """The figures of the recipe that the search began with, once it is trained in full."""
        return self.goal.values(self.finished[self.origin]) if self.origin in self.finished else None

    def front(self) -> list[Point]:
        """Those that keep every limit and that no other beats in all that is minimized; the best of one figure."""
        found: list[tuple[tuple[float, ...], Point]] = []
        for values, point in sorted((values, point) for point, values in self.kept.items()):
            if not dominated(values, [other for other, _ in found]):
                found.append((values, point))
        return [point for _, point in found]

    def best(self) -> Point | None:
        """The winner; of a front the one that is smallest when each figure counts as a share of the first trial's."""
        return min(self.front(), key=self._merit, default=None)

    def _merit(self, point: Point) -> tuple[float, Point]:
        start = self.start() or (1.0,) * len(self.goal.minimize)
        shares = (value / (base or 1.0) for value, base in zip(self.kept[point], start, strict=True))
        return sum(shares), point

    def pick(self) -> Point | None:
        """The winner; where nothing keeps every limit surely, the one whose figures do and that does so most surely."""
        return self.best() or next(iter(self._reaching("value")), None)

    def ranked(self) -> list[Point]:
        """What is judged at the end, and what would be without those before: the pick first.

        Where no figures keep every limit on quality, those that the rows leave it open of.
        """
        if self.kept:
            return sorted(self.kept, key=self._merit)
        return self._reaching("value") or self._reaching("high")

    def _reaching(self, end: Literal["value", "high"]) -> list[Point]:
        """Those that keep every limit, the ones on quality by the figure or by the upper end of its interval."""
        ends = {named(limit): end for limit in self.goal.quality}

        def reaches(point: Point) -> bool:
            rooms = self.rooms[point, self.full].items()
            return all(room is not None and getattr(room, ends.get(name, "value")) >= -1e-12 for name, room in rooms)

        return [point for point in self.nearest() if reaches(point)]

    def nearest(self) -> list[Point]:
        """The recipes trained in full, those first that fall short by least, or lie furthest inside."""
        short = {point: max(self.goal.shortfalls(one).values(), default=0.0) for point, one in self.finished.items()}
        return sorted(short, key=lambda point: (short[point], point))

    def weighed(self, point: Point, metric: str) -> float | None:
        """A figure that training doesn't change, as it was measured at any rung."""
        if not describe_metric(metric).from_file:
            return None
        found = (self.outcomes.get((point, rung)) for rung in range(self.full, -1, -1))
        return next((one.final[metric] for one in found if one is not None and metric in one.final), None)
