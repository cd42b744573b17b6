"""What is tried next, and how far: pure decisions by what is known, the same however trials come by their outcomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace

from compress.plugins.search.acquisition import Expected, Forecasts, Prospects
from compress.plugins.search.candidates import Candidates, Choices
from compress.plugins.search.early_stopping import hopeless
from compress.plugins.search.goal import Goal
from compress.plugins.search.ledger import PastTrial
from compress.plugins.search.observations import Known
from compress.plugins.search.outcome import Outcome
from compress.plugins.search.space import Point

ROUND = 2
"""Trials that are decided on together, however many workers there are, so that their number decides nothing."""
_TIMED = 3
"""Models that have to be timed before two are decided on together: the first ones show by how much sums of kernels are
off on this machine, all in the same direction."""


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
    past: InitVar[Sequence[PastTrial]] = ()
    """What is known from elsewhere, which says where to look first and nothing else."""
    is_fit: InitVar[Callable[[Point, Known], bool]] = lambda point, known: True
    """See `Candidates`."""
    given_up: dict[Point, str] = field(default_factory=dict)
    ended_at: dict[Point, int] = field(default_factory=dict)
    """The rung after which a recipe was given up for how it stood there."""
    ended: str = ""
    """Why there is nothing more to try."""

    def __post_init__(self, past: Sequence[PastTrial], is_fit: Callable[[Point, Known], bool]) -> None:
        self.known = Known(self.goal, self.full, self.space.origin)
        self.candidates = Candidates(self.space, self.costs, self.known, past, self.seed, is_fit=is_fit)
        self._identities: dict[str, Point] = {}
        self._rounds = 0
        self._pending: tuple[Job, ...] = ()

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
        prospects = Prospects(self.known, self.costs, self.space.knobs, self.shares, self.candidates.past)
        pending = {job.point for job in self._pending}
        rungs = {point: rung for point, rung in self._going_on(prospects).items() if point not in pending}
        found = {point: f"nothing speaks against it after {self.shares[rung]:.0%} of training"
                 for point, rung in rungs.items()}  # fmt: skip
        found |= self.candidates.new(prospects, self._rounds, self.given_up)
        by_worth = prospects.by_worth(found)
        if first := self.candidates.largest_of_families(by_worth, prospects):
            found |= first
            by_worth = list(dict.fromkeys([*first, *prospects.by_worth(found)]))
        jobs, begun = list[Job](), {key for job in self._pending for key in self._left(job)}
        for point in by_worth:
            if len(jobs) == self._most:
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
        other.known, other.given_up, other.ended_at = self.known.copied(), dict(self.given_up), dict(self.ended_at)
        other._identities = dict(self._identities)
        other.candidates = replace(self.candidates, known=other.known, refused=dict(self.candidates.refused))
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
            return
        self.costs.learn(job.point, self.shares[job.rung], outcome)

    @property
    def _most(self) -> int:
        """Trials of the next round."""
        return 1 if self.goal.timed and len(self.known.finished) < _TIMED else ROUND

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

    def _is_new(self, point: Point) -> bool:
        """Whether it is a recipe, and comes to other stages than all that was tried."""
        return self.space.identity(point) not in self._identities and self.candidates.is_recipe(point)
