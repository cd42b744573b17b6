"""What is tried next, and how far: pure decisions by what is known, the same however trials come by their outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compress.errors import InputError, RecipeError, first_line
from compress.recipe.recipe import Limit, Recipe
from compress.report.schema import WEIGHED
from compress.search.goal import Goal, dominated, named
from compress.search.outcome import Outcome, difference, slack
from compress.search.proposals import Told, proposals
from compress.search.space import Knob, Point

ROUND = 4
"""Trials that are decided on together, however many workers there are, so that their number decides nothing."""
PROMOTED = 2
"""How many of them go on from a lower rung."""
_ASKED = 32
_SAME_FAILURE = 3


class Choices(Protocol):
    """What the engine has to know of a space (`Space`, or a table of what is known already)."""

    knobs: tuple[Knob, ...]

    @property
    def origin(self) -> Point: ...
    def points(self, seed: int) -> Iterator[Point]: ...
    def canonical(self, point: Sequence[int]) -> Point: ...
    def identity(self, point: Point) -> str: ...
    def recipe(self, point: Point) -> Recipe: ...
    def trains(self, point: Point) -> bool: ...


class Forecasts(Protocol):
    """What the engine has to know of costs (`Costs`, or a table)."""

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float: ...
    def predicted(self, point: Point, metric: str) -> float | None: ...
    def tolerance(self, metric: str) -> float: ...
    def family(self, point: Point) -> tuple[object, ...]: ...
    def learn(self, point: Point, share: float, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class Job:
    """A trial: a point, trained as far as a rung says (its place among the shares), and why it is tried."""

    point: Point
    rung: int
    why: str = field(default="", compare=False)


@dataclass
class Engine:
    """Decides round by round. ``shares`` are those of training, rising; the last is all of it.

    A recipe goes from rung to rung unless it falls short of a limit by more than chance allows for, judged against one
    of its family, whose whole way is known, on the same rows (`_judge`).
    """

    space: Choices
    costs: Forecasts
    goal: Goal
    shares: tuple[float, ...]
    seed: int = 0
    outcomes: dict[tuple[Point, int], Outcome] = field(default_factory=dict)
    given_up: dict[Point, str] = field(default_factory=dict)
    refused: dict[Point, str] = field(default_factory=dict)
    """Points that are no recipe, and why."""
    ended: str = ""
    """Why there is nothing more to try."""

    def __post_init__(self) -> None:
        self._identities: dict[str, Point] = {}
        self._failures: Counter[tuple[tuple[object, ...], str]] = Counter()
        self._rounds = 0

    @property
    def full(self) -> int:
        """The last rung."""
        return len(self.shares) - 1

    def round(self) -> list[Job]:
        """The next trials, most worth first; none at the end, and then `ended` says why."""
        self._rounds += 1
        origin = self.space.origin
        if not self.outcomes:
            return [Job(origin, self._first_rung(origin), "the recipe as it stands")]
        jobs = self._promotions()
        if origin not in self.finished() and origin not in self.given_up:
            return [job for job in jobs if job.point == origin]
        # What promises most goes on first: once it has ended, others may have nothing left to win.
        jobs = sorted(jobs, key=lambda job: (-self._worth(job.point, job.rung), job.point))[:PROMOTED]
        if len(jobs) < ROUND:
            jobs += self._new(ROUND - len(jobs))
        if not jobs and not self.ended:
            self.ended = "no recipe is left that could be better"
        return jobs[:ROUND]

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Take note of what came of a trial; trials are told in the order in which they were decided on."""
        self.outcomes[job.point, job.rung] = outcome
        self._identities.setdefault(self.space.identity(job.point), job.point)
        if outcome.error is not None:
            self.given_up[job.point] = f"failed: {outcome.error}"
            self._failures[self.costs.family(job.point), outcome.error] += 1
            return
        self.costs.learn(job.point, self.shares[job.rung], outcome)

    def finished(self) -> dict[Point, Outcome]:
        """Points that were trained in full, with what came of them."""
        return {point: outcome for (point, rung), outcome in self.outcomes.items() if self._counts(rung, outcome)}

    def front(self) -> list[Point]:
        """Those that keep every limit and that no other beats in all that is minimized; the best of one figure."""
        kept = [(point, self.goal.values(outcome)) for point, outcome in self.finished().items()]
        feasible = [
            (values, point) for point, values in kept if values is not None and self.goal.keeps(self.finished()[point])
        ]
        found: list[tuple[tuple[float, ...], Point]] = []
        for values, point in sorted(feasible):
            if not dominated(values, [other for other, _ in found]):
                found.append((values, point))
        return [point for _, point in found]

    def best(self) -> Point | None:
        """The winner; of a front the one that is smallest when each figure counts as a share of the first trial's."""
        front = self.front()
        if not front:
            return None
        start = self.goal.values(self.finished().get(self.space.origin, Outcome())) or (1.0,) * len(self.goal.minimize)

        def merit(point: Point) -> tuple[float, Point]:
            values = self.goal.values(self.finished()[point]) or start
            return sum(value / (base or 1.0) for value, base in zip(values, start, strict=True)), point

        return min(front, key=merit)

    def nearest(self) -> Point | None:
        """Where nothing keeps every limit, what falls short by least."""
        short = {point: max(self.goal.shortfalls(one).values(), default=0.0) for point, one in self.finished().items()}
        return min(short, key=lambda point: (short[point], point), default=None)

    def _counts(self, rung: int, outcome: Outcome) -> bool:
        return rung == self.full and outcome.error is None

    def _first_rung(self, point: Point) -> int:
        return 0 if self.space.trains(point) else self.full

    def _promotions(self) -> list[Job]:
        """Recipes that go on to the next rung, and those that are given up now."""
        jobs = []
        last: dict[Point, int] = {}
        for (point, rung), outcome in self.outcomes.items():
            if outcome.error is None:
                last[point] = max(rung, last.get(point, -1))
        for point, rung in last.items():
            if rung == self.full or point in self.given_up:
                continue
            hopeless = self._judge(point, rung) if point != self.space.origin else None
            hopeless = hopeless or self._pointless(point)
            if hopeless is not None and point != self.space.origin:
                self.given_up[point] = hopeless
            else:
                jobs.append(
                    Job(point, rung + 1, f"nothing speaks against it after {self.shares[rung]:.0%} of training")
                )
        return jobs

    def _judge(self, point: Point, rung: int) -> str | None:
        """Why a recipe will not keep a limit, by how it stands to one of its family after as much training.

        With the rungs that are looked at, each look has its part of the error that is allowed for (Bonferroni).
        """
        own, family = self.outcomes[point, rung], self.costs.family(point)
        confidence = 1 - (1 - self.goal.confidence) / max(len(self.shares), 1)
        kin = [
            other
            for other in self.finished()
            if other != point and self.costs.family(other) == family and (other, rung) in self.outcomes
        ]
        for limit in self.goal.quality:
            for other in kin:
                gap = difference(limit, own, self.outcomes[other, rung], confidence)
                there = slack(limit, self.finished()[other], self.goal.confidence)
                if gap is not None and there is not None and there.value + gap.high < 0:
                    return (
                        f"{named(limit)}: after {self.shares[rung]:.0%} of training {-gap.value:.1%} behind a recipe "
                        f"of its family that ended {there.value:+.1%} from the limit"
                    )
        return None

    def _pointless(self, point: Point) -> str | None:
        """Why a recipe would not be chosen even if it kept every limit."""
        gain = self._gain(point)
        return "by what is predicted it is no better than what keeps every limit" if gain <= 0 else None

    def _new(self, count: int) -> list[Job]:
        """Points that nobody tried: what Optuna proposes, most gain for its marginal seconds first; else any other."""
        told, seed = self._told(), self.seed * 100_003 + self._rounds
        proposed = proposals(self.space.knobs, told, len(self.goal.minimize), seed, _ASKED)
        found = self._worth_trying(proposed, "proposed")
        if len(found) < count:
            found |= self._worth_trying(self.space.points(self.seed), "not tried yet", count - len(found))
        if not found:
            self.ended = "every other recipe is predicted to miss a limit or to be no better"
            return []
        chosen = sorted(found, key=lambda point: (-self._worth(point), point))[:count]
        return [Job(point, self._first_rung(point), found[point]) for point in chosen]

    def _worth_trying(self, points: Iterable[Point], why: str, most: int | None = None) -> dict[Point, str]:
        found: dict[Point, str] = {}
        tried = {point for point, _ in self.outcomes}
        for proposed in points:
            point = self.space.canonical(proposed)
            if point in tried or point in found or point in self.refused or point in self.given_up:
                continue
            if self._is_new(point) and self._gain(point) > 0 and self._may_keep(point) and not self._fails(point):
                found[point] = why
                if most is not None and len(found) >= most:
                    break
        return found

    def _is_new(self, point: Point) -> bool:
        try:
            identity = self.space.identity(point)
            if identity in self._identities:
                return False
            self.space.recipe(point)
        except (InputError, RecipeError) as error:
            self.refused[point] = first_line(error)
            return False
        return True

    def _fails(self, point: Point) -> bool:
        family = self.costs.family(point)
        return any(count >= _SAME_FAILURE for (where, _), count in self._failures.items() if where == family)

    def _may_keep(self, point: Point) -> bool:
        """Whether predictions leave open that every limit on what is predicted is kept."""
        return all(self._room(limit, point) >= 0 for limit in self.goal.limits)

    def _room(self, limit: Limit, point: Point) -> float:
        value = self._hoped(point, limit.metric)
        base = self.finished().get(self.space.origin)
        other = 1.0 if limit.of is None else (base.baseline.get(limit.metric) if base else None)
        if value is None or not other:
            return 0.0
        ratio, tolerance = value / other / limit.bound, self.costs.tolerance(limit.metric)
        return ratio * (1 + tolerance) - 1 if limit.at_least is not None else 1 - ratio * (1 - tolerance)

    def _gain(self, point: Point) -> float:
        """By how much of the first trial's figures it would be better than what is best now; 1 before that is known."""
        predicted = [self._hoped(point, metric) for metric in self.goal.minimize]
        start = self.goal.values(self.finished().get(self.space.origin, Outcome()))
        front = [self.goal.values(self.finished()[other]) for other in self.front()]
        known = [values for values in front if values is not None]
        if start is None or not known or None in predicted:
            return 1.0
        hoped = [value for value in predicted if value is not None]
        if len(hoped) == 1:
            return (min(values[0] for values in known) - hoped[0]) / (start[0] or 1.0)
        if dominated(hoped, known):
            return 0.0
        nearest = min(
            max((b - a) / (base or 1.0) for a, b, base in zip(hoped, values, start, strict=True)) for values in known
        )
        return max(nearest, 1e-9)

    def _hoped(self, point: Point, metric: str) -> float | None:
        """What a figure will be: as it was measured on the way, where training doesn't change it; else as predicted."""
        if metric in WEIGHED:
            for rung in reversed(range(len(self.shares))):
                outcome = self.outcomes.get((point, rung))
                if outcome is not None and metric in outcome.final:
                    return outcome.final[metric]
        return self.costs.predicted(point, metric)

    def _worth(self, point: Point, rung: int | None = None) -> float:
        share = self.shares[self._first_rung(point) if rung is None else rung]
        return self._gain(point) / max(self.costs.marginal_seconds(point, share), 1e-3)

    def _told(self) -> list[Told]:
        """Every recipe that was tried, as far as it came, for the sampler."""
        found = []
        furthest: dict[Point, tuple[int, Outcome]] = {}
        for (point, rung), outcome in self.outcomes.items():
            if point not in furthest or rung > furthest[point][0]:
                furthest[point] = rung, outcome
        for point, (rung, outcome) in furthest.items():
            values = self.goal.values(outcome)
            if outcome.error is not None or values is None or (rung < self.full and point not in self.given_up):
                continue
            short = self.goal.shortfalls(outcome)
            # `inf` is a figure that wasn't measured at a lower rung.
            limits = {name: min(value, 1.0) for name, value in short.items()}
            found.append(Told(point, values, limits))
        return found
