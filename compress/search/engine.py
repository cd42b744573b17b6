"""What is tried next, and how far: pure decisions by what is known, the same however trials come by their outcomes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from compress.errors import InputError, RecipeError, first_line
from compress.numerics.statistics import Estimate
from compress.recipe.recipe import Limit, Recipe
from compress.report.schema import WEIGHED
from compress.search.goal import Goal, dominated, named
from compress.search.outcome import Outcome, difference, slack
from compress.search.proposals import Told, proposals
from compress.search.space import ENUMERATED, Knob, Point
from compress.search.surrogate import Surrogate, coordinates

ROUND = 4
"""Trials that are decided on together, however many workers there are, so that their number decides nothing."""
PROMOTED = 2
"""How many of them go on from a lower rung."""
_ASKED = 32
_SAME_FAILURE = 3
_FEWEST_KNOWN = 3
_REMEMBERED, _LASTING = 12, 0.5
"""Recipes by which it is known how much of an early gap lasts, and what is taken before there are any."""
_SHARED = 2.56
"""Half-widths at 90% one-sided in a standard deviation, and once more since part of the error is common to all."""


class Choices(Protocol):
    """What the engine has to know of a space (`Space`, or a table of what is known already)."""

    knobs: tuple[Knob, ...]

    @property
    def origin(self) -> Point: ...
    @property
    def size(self) -> int: ...
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
        self._rooms: dict[tuple[Point, int], dict[str, Estimate | None]] = {}
        self._kept: set[Point] = set()
        self._ranks = [knob.ranks() for knob in self.space.knobs]
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
        order = self._by_worth([job.point for job in jobs])
        jobs = sorted(jobs, key=lambda job: order.index(job.point))[:PROMOTED]
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
        limits = self.goal.limits
        self._rooms[job.point, job.rung] = {named(one): slack(one, outcome, self.goal.confidence) for one in limits}
        if job.rung == self.full and self.goal.keeps(outcome):
            self._kept.add(job.point)
        self.costs.learn(job.point, self.shares[job.rung], outcome)

    def finished(self) -> dict[Point, Outcome]:
        """Points that were trained in full, with what came of them."""
        return {point: outcome for (point, rung), outcome in self.outcomes.items() if self._counts(rung, outcome)}

    def front(self) -> list[Point]:
        """Those that keep every limit and that no other beats in all that is minimized; the best of one figure."""
        kept = [(self.goal.values(self.outcomes[point, self.full]), point) for point in self._kept]
        feasible = [(values, point) for values, point in kept if values is not None]
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

        With the rungs that are looked at, each look has its part of the error that is allowed for (Bonferroni). What
        parts recipes early parts them less when all is learned, so that gaps count as far as those of others lasted.
        """
        own, family = self.outcomes[point, rung], self.costs.family(point)
        confidence = 1 - (1 - self.goal.confidence) / max(len(self.shares), 1)
        kin = [other for other in self._ended(rung) if self.costs.family(other) == family]
        for limit in self.goal.quality:
            lasting = self._lasting(limit, rung)
            for other in kin:
                gap = difference(limit, own, self.outcomes[other, rung], confidence)
                there = self._rooms[other, self.full][named(limit)]
                if gap is not None and there is not None and there.value + lasting * gap.high < 0:
                    return (
                        f"{named(limit)}: after {self.shares[rung]:.0%} of training {-gap.value:.1%} behind a recipe "
                        f"of its family that ended {there.value:+.1%} from the limit"
                    )
        return None

    def _ended(self, rung: int) -> list[Point]:
        """Recipes that were looked at after that rung and trained in full."""
        return [point for point in self.finished() if (point, rung) in self.outcomes]

    def _lasting(self, limit: Limit, rung: int) -> float:
        """How much of a gap in quality after that rung is left when all is learned: a slope through 0, at most 1."""
        pairs = []
        for one, other in itertools.combinations(self._ended(rung)[-_REMEMBERED:], 2):
            rooms = [self._rooms[each][named(limit)] for each in
                     ((one, rung), (other, rung), (one, self.full), (other, self.full))]  # fmt: skip
            known = [room.value for room in rooms if room is not None]
            if len(known) == len(rooms):
                pairs.append((known[0] - known[1], known[2] - known[3]))
        across = sum(early * early for early, _ in pairs)
        if len(pairs) < _FEWEST_KNOWN or not across:
            return _LASTING
        return min(max(sum(early * late for early, late in pairs) / across, 0.0), 1.0)

    def _pointless(self, point: Point) -> str | None:
        """Why a recipe would not be chosen even if it kept every limit."""
        gain = self._gain(point)
        return "by what is predicted it is no better than what keeps every limit" if gain <= 0 else None

    def _new(self, count: int) -> list[Job]:
        """Points that nobody tried: of all, or where these can't be listed, of a sample and what Optuna proposes."""
        found = self._worth_trying(self.space.points(self.seed), "most gain for its time")
        if self.space.size > ENUMERATED:
            seed = self.seed * 100_003 + self._rounds
            proposed = proposals(self.space.knobs, self._told(), len(self.goal.minimize), seed, _ASKED)
            found |= self._worth_trying(proposed, "proposed by Optuna")
        jobs = []
        for point in self._by_worth(list(found)):
            if self._is_new(point):
                jobs.append(Job(point, self._first_rung(point), found[point]))
                if len(jobs) == count:
                    break
        if not jobs:
            self.ended = "every other recipe is predicted to miss a limit or to be no better"
        return jobs

    def _by_worth(self, points: Sequence[Point], rung: int | None = None) -> list[Point]:
        """Most first: gain x the probability that every limit is kept, for each second that is left to do."""
        chances = self._chances(points)
        worth = {point: chance * self._worth(point, rung) for point, chance in zip(points, chances, strict=True)}
        return sorted(points, key=lambda point: (-worth[point], point))

    def _chances(self, points: Sequence[Point]) -> list[float]:
        """The probability of each point to keep every limit on quality as surely as is wanted, trained in full."""
        found = np.ones(len(points))
        for limit in self.goal.quality:
            known = [(key, room) for key, rooms in self._rooms.items() if (room := rooms[named(limit)]) is not None]
            if len(known) < _FEWEST_KNOWN or not points:
                continue
            features = np.array([self._features(point, rung) for (point, rung), _ in known])
            values = np.array([room.value for _, room in known])
            halves = np.array([room.value - room.low for _, room in known])
            # What rows leave open is common to all, since they share the rows: half of it is taken for noise of each.
            surrogate = Surrogate.of(features, values, np.maximum(halves / _SHARED, 1e-4))
            wanted = np.full(len(points), float(np.median(halves)))
            found *= surrogate.at_least(np.array([self._features(point, self.full) for point in points]), wanted)
        return [max(float(chance), 1e-3) for chance in found]

    def _features(self, point: Point, rung: int) -> list[float]:
        """A point's coordinates, its predicted size and its share of training, each about between 0 and 1."""
        size, start = (self.costs.predicted(each, "size_bytes") for each in (point, self.space.origin))
        ratio = size / start if size and start else 1.0
        lowest = math.log(self.shares[0]) if len(self.shares) > 1 else -1.0
        return [*coordinates(point, self._ranks), math.log(ratio), math.log(self.shares[rung]) / lowest]

    def _worth_trying(self, points: Iterable[Point], why: str) -> dict[Point, str]:
        found: dict[Point, str] = {}
        tried = {point for point, _ in self.outcomes}
        for proposed in points:
            point = self.space.canonical(proposed)
            if point in tried or point in found or point in self.refused or point in self.given_up:
                continue
            if self._gain(point) > 0 and self._may_keep(point) and not self._fails(point):
                found[point] = why
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
