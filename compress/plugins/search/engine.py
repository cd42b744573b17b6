"""What is tried next, and how far: pure decisions by what is known, the same however trials come by their outcomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace

from compress.plugins.search.acquisition import Acquisition, CostModel, Expectation
from compress.plugins.search.candidates import Candidates, SearchSpaceView
from compress.plugins.search.early_stopping import early_stopping_reason
from compress.plugins.search.goal import Goal
from compress.plugins.search.ledger import PastTrial
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.space import Point

ROUND = 2
"""Trials that are decided on together, however many workers there are, so that their number decides nothing."""
_TIMED = 3
"""Models that have to be timed before two are decided on together: the first ones show by how much sums of kernels are
off on this machine, all in the same direction."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial: a point, trained as far as a rung says (its place among the shares), and why it is tried."""

    point: Point
    rung: int
    why: str = field(default="", compare=False)
    expected: Expectation | None = field(default=None, compare=False)


@dataclass
class Engine:
    """Decides round by round. ``shares`` are those of training, rising; the last is all of it.

    A recipe goes from rung to rung unless it lies behind one of its family by more than chance allows (`early`), or
    would be no better than what keeps every limit already. It is trained in part first only where that is likely to
    save more than it costs (`_next_rung`).
    """

    space: SearchSpaceView
    costs: CostModel
    goal: Goal
    shares: tuple[float, ...]
    seed: int = 0
    past: InitVar[Sequence[PastTrial]] = ()
    """What is known from elsewhere, which says where to look first and nothing else."""
    may_ship: InitVar[Callable[[Point, Observations], bool]] = lambda point, known: True
    """See `Candidates`."""
    stopped: dict[Point, str] = field(default_factory=dict)
    stopped_at: dict[Point, int] = field(default_factory=dict)
    """The rung after which a recipe was given up for how it stood there."""
    end_reason: str = ""
    """Why there is nothing more to try."""

    def __post_init__(self, past: Sequence[PastTrial], may_ship: Callable[[Point, Observations], bool]) -> None:
        self.observations = Observations(self.goal, self.full_rung, self.space.origin)
        self.candidates = Candidates(self.space, self.costs, self.observations, past, self.seed, may_ship=may_ship)
        self._identities: dict[str, Point] = {}
        self._rounds = 0
        self._pending: tuple[PlannedTrial, ...] = ()

    @property
    def full_rung(self) -> int:
        """The last rung."""
        return len(self.shares) - 1

    def next_round(self) -> list[PlannedTrial]:
        """The next trials, most worth first; none at the end, and then `ended` says why."""
        self._rounds += 1
        origin = self.space.origin
        if not self.observations.outcomes:
            return [PlannedTrial(origin, self.full_rung, "the search begins here")]
        prospects = Acquisition(self.observations, self.costs, self.space.parameters, self.shares, self.candidates.past)
        pending = {job.point for job in self._pending}
        rungs = {point: rung for point, rung in self._going_on(prospects).items() if point not in pending}
        found = {point: f"nothing speaks against it after {self.shares[rung]:.0%} of training"
                 for point, rung in rungs.items()}  # fmt: skip
        found |= self.candidates.propose(prospects, self._rounds, self.stopped)
        by_worth = prospects.rank(found)
        if first := self.candidates.largest_per_family(by_worth, prospects):
            found |= first
            by_worth = list(dict.fromkeys([*first, *prospects.rank(found)]))
        jobs, begun = list[PlannedTrial](), {key for job in self._pending for key in self._left(job)}
        for point in by_worth:
            if len(jobs) == self._most:
                break
            if point in rungs or self._is_new(point):
                expected = prospects.expected[point]
                rung = self.full_rung if point in first else self._next_rung(point, rungs.get(point, -1), expected)
                job = PlannedTrial(point, rung, found[point], expected)
                left = self._left(job)
                # What another one of the round does too had better wait for what comes of that.
                if 2 * sum(left[key] for key in left.keys() & begun) <= sum(left.values()):
                    jobs.append(job)
                    begun |= left.keys()
        self.end_reason = "" if jobs else "every other recipe is predicted to miss a limit or to be no better"
        return jobs

    def speculate(
        self, arrived: Mapping[PlannedTrial, TrialOutcome], pending: Iterable[PlannedTrial]
    ) -> list[PlannedTrial]:
        """What may be decided on next, of a round in which so much is known and trials are pending. Nothing changes."""
        other = copy.copy(self)
        other.observations, other.stopped, other.stopped_at = (
            self.observations.copy(),
            dict(self.stopped),
            dict(self.stopped_at),
        )
        other._identities = dict(self._identities)
        other.candidates = replace(
            self.candidates, observations=other.observations, rejected=dict(self.candidates.rejected)
        )
        for job, outcome in arrived.items():
            other.observations.add(job.point, job.rung, outcome)
        other._pending = tuple(pending)
        for job in (*arrived, *other._pending):
            other._identities.setdefault(self.space.identity(job.point), job.point)
        return other.next_round() if other.observations.outcomes else []

    def record(self, job: PlannedTrial, outcome: TrialOutcome) -> None:
        """Take note of what came of a trial; trials are told in the order in which they were decided on."""
        self._identities.setdefault(self.space.identity(job.point), job.point)
        self.observations.add(job.point, job.rung, outcome)
        if outcome.error is not None:
            self.stopped[job.point] = f"failed: {outcome.error}"
            return
        self.costs.update(job.point, self.shares[job.rung], outcome)

    @property
    def _most(self) -> int:
        """Trials of the next round."""
        return 1 if self.goal.needs_timing and len(self.observations.finished) < _TIMED else ROUND

    def _left(self, job: PlannedTrial) -> Mapping[str, float]:
        """Seconds of what no trial has done for it yet, by what recipes share."""
        return self.costs.remaining(job.point, self.shares[job.rung])

    def _next_rung(self, point: Point, rung: int, expected: Expectation) -> int:
        """How far a recipe is trained next, which has come to ``rung``.

        In part, where that takes less than it is likely to save. How likely it ends there is the chance to miss a limit
        x the share of recipes that miss one which this rung has ended so far.
        """
        misses = 1 - (0.5 if expected.probability is None else expected.probability)
        for lower in range(rung + 1, self.full_rung) if self.space.trains(point) else ():
            takes = self.costs.marginal_seconds(point, self.shares[lower])
            if takes < misses * self._power(lower) * expected.seconds:
                return lower
        return self.full_rung

    def _power(self, rung: int) -> float:
        """The share of recipes that miss a limit that a rung ends: of those so far, after one of each kind."""
        ended = sum(self.stopped_at.get(point) == rung for point in self.stopped)
        missed = sum(
            (point, rung) in self.observations.margins and point not in self.observations.feasible
            for point in self.observations.finished
        )
        return (1 + ended) / (2 + ended + missed)

    def _going_on(self, prospects: Acquisition) -> dict[Point, int]:
        """Recipes that were trained in part, with the rung that they came to, less those that are given up."""
        found = {}
        for point, rung in self.observations.last_rungs().items():
            if rung == self.full_rung or point in self.stopped:
                continue
            why = early_stopping_reason(self.observations, point, rung, self.shares, self.costs.family)
            if why:
                self.stopped_at[point] = rung
            elif prospects.gain(point) <= 0:
                why = "it is no better than what keeps every limit"
            if why:
                self.stopped[point] = why
            else:
                found[point] = rung
        return found

    def _is_new(self, point: Point) -> bool:
        """Whether it is a recipe, and comes to other stages than all that was tried."""
        return self.space.identity(point) not in self._identities and self.candidates.is_valid_recipe(point)
