"""What is tried next, and how far: pure decisions by what is known, the same however trials come by their outcomes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from compress.errors import InputError, RecipeError, first_line
from compress.recipe.recipe import Recipe
from compress.search.early import hopeless
from compress.search.goal import Goal
from compress.search.knobs import Knob
from compress.search.known import Known
from compress.search.ledger import PastTrial
from compress.search.outcome import Outcome
from compress.search.proposals import Told, proposals
from compress.search.prospects import Expected, Forecasts, Prospects
from compress.search.space import Point

ROUND = 2
"""Trials that are decided on together, however many workers there are, so that their number decides nothing."""
_ASKED = 32
_SAME_FAILURE = 3
_CENTRES, _STEPS = 4, 8
"""Recipes whose neighbours are looked at, and how often anew, since a sample of millions has hardly any point near the
one wanted."""


class Choices(Protocol):
    """What the engine has to know of a space (`Space`, or a table of what is known already)."""

    knobs: tuple[Knob, ...]

    @property
    def origin(self) -> Point: ...
    @property
    def is_listed(self) -> bool: ...
    def points(self, seed: int) -> Iterable[Point]: ...
    def canonical(self, point: Sequence[int]) -> Point: ...
    def identity(self, point: Point) -> str: ...
    def recipe(self, point: Point) -> Recipe: ...
    def trains(self, point: Point) -> bool: ...


@dataclass(frozen=True)
class Job:
    """A trial: a point, trained as far as a rung says (its place among the shares), and why it is tried."""

    point: Point
    rung: int
    why: str = field(default="", compare=False)
    expected: Expected | None = field(default=None, compare=False)


@dataclass
class Engine:
    """Decides round by round. ``shares`` are those of training, rising; the last is all of it.

    A recipe goes from rung to rung unless it lies behind one of its family by more than chance allows (`early`), or
    would be no better than what keeps every limit already. It is trained in part first only where that is likely to
    save more than it costs (`_next_rung`).
    """

    space: Choices
    costs: Forecasts
    goal: Goal
    shares: tuple[float, ...]
    seed: int = 0
    past: Sequence[PastTrial] = ()
    """What is known from elsewhere, which says where to look first and nothing else."""
    given_up: dict[Point, str] = field(default_factory=dict)
    ended_at: dict[Point, int] = field(default_factory=dict)
    """The rung after which a recipe was given up for how it stood there."""
    refused: dict[Point, str] = field(default_factory=dict)
    """Points that are no recipe, and why."""
    left: float | None = None
    """The share of all recipes that predictions leave and nobody has tried; None before anything is known."""
    ended: str = ""
    """Why there is nothing more to try."""

    def __post_init__(self) -> None:
        self.known = Known(self.goal, self.full, self.space.origin)
        self._identities: dict[str, Point] = {}
        self._failures: Counter[tuple[tuple[object, ...], str]] = Counter()
        self._rounds = 0
        self._pending: tuple[Job, ...] = ()
        self.past = [one for one in self.past if self._has_stages(one.point)]

    @property
    def full(self) -> int:
        """The last rung."""
        return len(self.shares) - 1

    def round(self) -> list[Job]:
        """The next trials, most worth first; none at the end, and then `ended` says why."""
        self._rounds += 1
        origin = self.space.origin
        if not self.known.outcomes:
            return [Job(origin, self.full, "the search begins here")]
        prospects = Prospects(self.known, self.costs, self.space.knobs, self.shares, self.past)
        pending = {job.point for job in self._pending}
        rungs = {point: rung for point, rung in self._going_on(prospects).items() if point not in pending}
        found = {point: f"nothing speaks against it after {self.shares[rung]:.0%} of training"
                 for point, rung in rungs.items()}  # fmt: skip
        found |= self._new(prospects)
        by_worth = prospects.by_worth(found)
        if first := self._largest_of_families(by_worth, prospects):
            found |= first
            by_worth = list(dict.fromkeys([*first, *prospects.by_worth(found)]))
        jobs, begun = list[Job](), {key for job in self._pending for key in self._left(job)}
        for point in by_worth:
            if len(jobs) == ROUND:
                break
            if point in rungs or self._is_new(point):
                expected = prospects.expected[point]
                rung = self.full if point in first else self._next_rung(point, rungs.get(point, -1), expected)
                job = Job(point, rung, found[point], expected)
                left = self._left(job)
                # What another one of the round does too had better wait for what comes of that.
                if 2 * sum(left[key] for key in left.keys() & begun) <= sum(left.values()):
                    jobs.append(job)
                    begun |= left.keys()
        self.ended = "" if jobs else "every other recipe is predicted to miss a limit or to be no better"
        return jobs

    def guess(self, arrived: Mapping[Job, Outcome], pending: Iterable[Job]) -> list[Job]:
        """What may be decided on next, of a round in which so much is known and trials are pending. Nothing changes."""
        other = copy.copy(self)
        other.known, other.given_up, other.refused = self.known.copied(), dict(self.given_up), dict(self.refused)
        other.ended_at, other._identities = dict(self.ended_at), dict(self._identities)
        for job, outcome in arrived.items():
            other.known.add(job.point, job.rung, outcome)
        other._pending = tuple(pending)
        for job in (*arrived, *other._pending):
            other._identities.setdefault(self.space.identity(job.point), job.point)
        return other.round() if other.known.outcomes else []

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Take note of what came of a trial; trials are told in the order in which they were decided on."""
        self._identities.setdefault(self.space.identity(job.point), job.point)
        self.known.add(job.point, job.rung, outcome)
        if outcome.error is not None:
            self.given_up[job.point] = f"failed: {outcome.error}"
            self._failures[self.costs.family(job.point), outcome.error] += 1
            return
        self.costs.learn(job.point, self.shares[job.rung], outcome)

    def _left(self, job: Job) -> Mapping[str, float]:
        """Seconds of what no trial has done for it yet, by what recipes share."""
        return self.costs.left(job.point, self.shares[job.rung])

    def _next_rung(self, point: Point, rung: int, expected: Expected) -> int:
        """How far a recipe is trained next, which has come to ``rung``.

        In part, where that takes less than it is likely to save. How likely it ends there is the chance to miss a limit
        x the share of recipes that miss one which this rung has ended so far.
        """
        misses = 1 - (0.5 if expected.chance is None else expected.chance)
        for lower in range(rung + 1, self.full) if self.space.trains(point) else ():
            takes = self.costs.marginal_seconds(point, self.shares[lower])
            if takes < misses * self._power(lower) * expected.seconds:
                return lower
        return self.full

    def _power(self, rung: int) -> float:
        """The share of recipes that miss a limit that a rung ends: of those so far, after one of each kind."""
        ended = sum(self.ended_at.get(point) == rung for point in self.given_up)
        missed = sum(
            (point, rung) in self.known.rooms and point not in self.known.kept for point in self.known.finished
        )
        return (1 + ended) / (2 + ended + missed)

    def _going_on(self, prospects: Prospects) -> dict[Point, int]:
        """Recipes that were trained in part, with the rung that they came to, less those that are given up."""
        found = {}
        for point, rung in self.known.last_rungs().items():
            if rung == self.full or point in self.given_up:
                continue
            why = hopeless(self.known, point, rung, self.shares, self.costs.family)
            if why:
                self.ended_at[point] = rung
            elif prospects.gain(point) <= 0:
                why = "it is no better than what keeps every limit"
            if why:
                self.given_up[point] = why
            else:
                found[point] = rung
        return found

    def _new(self, prospects: Prospects) -> dict[Point, str]:
        """Points that nobody tried: of all, or where these can't be listed, of a sample and what Optuna proposes."""
        points = list(self.space.points(self.seed))
        found = self._worth_trying(points, prospects, "most gain for its time")
        self.left = len(found) / max(len(points), 1)
        if not self.space.is_listed:
            seed = self.seed * 100_003 + self._rounds
            proposed = proposals(self.space.knobs, self._told(), len(self.goal.minimize), seed, _ASKED)
            found |= self._worth_trying(proposed, prospects, "proposed by Optuna")
            found |= self._worth_trying((one.point for one in self.past), prospects, "tried before, elsewhere")
            centres = (self.known.front() or self.known.nearest())[:_CENTRES]
            near = (other for point in centres for other in self._neighbours(point))
            found |= self._worth_trying(near, prospects, "one choice from the best so far")
            self._climb(found, prospects)
        return found

    def _largest_of_families(self, by_worth: Sequence[Point], prospects: Prospects) -> dict[Point, str]:
        """While none keeps every limit surely: of each family with none within what is foretold, the largest.

        That is the one of most parameters x seconds of training, found by local search from the largest of
        ``by_worth``: what is small and trained for a moment is cheaper, but its failing says little of what the family
        can come to.
        """
        if self.known.front():
            return {}
        family, why = self.costs.family, "the first of its family, as large as the limits let it be"

        def extent(point: Point) -> tuple[float, float, int]:
            parameters, size = (self.costs.predicted(point, each) or 1.0 for each in ("parameters", "size_bytes"))
            return parameters * self.costs.marginal_seconds(point), -size, -sum(map(bool, point))

        tried = {family(point) for point in self.known.last_rungs() if prospects.is_likely_within(point)}
        families: dict[tuple[object, ...], list[Point]] = {}
        for point in by_worth:
            if self.space.trains(point) and family(point) not in tried and prospects.is_likely_within(point):
                families.setdefault(family(point), []).append(point)
        found = {}
        for points in islice(families.values(), max(_CENTRES - len(tried), 0)):
            largest = max(points, key=extent)
            for _ in range(_STEPS):
                near = self._worth_trying(self._neighbours(largest), prospects, why)
                alike = (one for one in near if family(one) == family(largest) and prospects.is_likely_within(one))
                best = max(alike, key=extent, default=largest)
                if extent(best) <= extent(largest):
                    break
                largest = best
            found[largest] = why
        return found

    def _climb(self, found: dict[Point, str], prospects: Prospects) -> None:
        """Add what differs in one choice from what is worth most, until nothing near is worth more.

        That is local search from several places (Hutter et al. 2011, section 4.3).
        """
        seen: set[Point] = set()
        for _ in range(_STEPS):
            centres = [point for point in prospects.by_worth(found)[:_CENTRES] if point not in seen]
            seen.update(centres)
            near = (other for point in centres for other in self._neighbours(point) if other not in found)
            more = self._worth_trying(near, prospects, "one choice from what promises most")
            if not more:
                break
            found |= more

    def _neighbours(self, point: Point) -> Iterable[Point]:
        """All that differ from it in one choice."""
        for place, knob in enumerate(self.space.knobs):
            for value in range(len(knob.values)):
                if value != point[place]:
                    yield (*point[:place], value, *point[place + 1 :])

    def _worth_trying(self, points: Iterable[Point], prospects: Prospects, why: str) -> dict[Point, str]:
        tried = {point for point, _ in self.known.outcomes} | self.refused.keys()
        ended = {family for (family, _), count in self._failures.items() if count >= _SAME_FAILURE}
        found: dict[Point, str] = {}
        for proposed in points:
            point = self.space.canonical(proposed)
            if point in tried or point in found or not self._has_stages(point):
                continue
            # Sizes are told sooner than times.
            if prospects.may_keep(point) and prospects.gain(point) > 0 and self.costs.family(point) not in ended:
                found[point] = why
        return found

    def _has_stages(self, point: Point) -> bool:
        try:
            self.costs.family(point)
        except InputError as error:
            self.refused[point] = first_line(error)
            return False
        return True

    def _is_new(self, point: Point) -> bool:
        """Whether it is a recipe, and comes to other stages than all that was tried."""
        if self.space.identity(point) in self._identities:
            return False
        try:
            self.space.recipe(point)
        except RecipeError as error:
            self.refused[point] = str(error.problems[0]) if error.problems else first_line(error)
            return False
        except InputError as error:
            self.refused[point] = first_line(error)
            return False
        return True

    def _told(self) -> list[Told]:
        """Every recipe that was tried as far as it goes, for the sampler."""
        found = []
        for point, rung in self.known.last_rungs().items():
            outcome = self.known.outcomes[point, rung]
            values = self.goal.values(outcome)
            if values is None or (rung < self.full and point not in self.given_up):
                continue
            # What wasn't measured at a lower rung falls short without end.
            limits = {name: min(value, 1.0) for name, value in self.goal.shortfalls(outcome).items()}
            found.append(Told(point, values, limits))
        return found
