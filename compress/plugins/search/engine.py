"""Search engine, which decides on the next recipe and the share of its training.

Decisions depend on the outcomes only, so that a search decides the same on one machine and on several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field, replace

from compress.plugins.search.acquisition import Acquisition, CostModel, Expectation
from compress.plugins.search.candidates import Candidates, SearchSpaceView
from compress.plugins.search.early_stopping import early_stopping_reason
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import Goal, TrialOutcome
from compress.plugins.search.space import Point

ROUND = 2
"""Trials that are planned together.

The number does not depend on the number of workers, so that decisions do not either.
"""
_TIMED = 3
"""Models that have to be timed before two trials are planned together.

Times are extrapolated from the first ones.
"""


@dataclass(frozen=True)
class PlannedTrial:
    """Point with the rung that it is trained to, and the reason why it is tried."""

    point: Point
    rung: int
    why: str = field(default="", compare=False)
    expected: Expectation | None = field(default=None, compare=False)


@dataclass
class Engine:
    """Decisions of a search, made in rounds.

    A recipe goes from rung to rung unless it would miss a limit (`early_stopping_reason`), or would be no
    better than the best feasible recipe. It is trained in part first only where that is likely to save more
    than it costs (`_next_rung`).

    Attributes:
        space: Recipes that may be tried.
        costs: Predictions of size and time.
        goal: Objectives and limits.
        shares: Share of training at each rung, rising; the last is 1.
        seed: Seed of samples and proposals.
        may_ship: See `Candidates`.
        stopped: Recipes that are not trained further, with the reason.
        stopped_at: Rung at which early stopping ended a recipe.
        end_reason: Why the search has ended.
    """

    space: SearchSpaceView
    costs: CostModel
    goal: Goal
    shares: tuple[float, ...]
    seed: int = 0
    may_ship: InitVar[Callable[[Point, Observations], bool]] = lambda point, known: True
    stopped: dict[Point, str] = field(default_factory=dict)
    stopped_at: dict[Point, int] = field(default_factory=dict)
    end_reason: str = ""

    def __post_init__(self, may_ship: Callable[[Point, Observations], bool]) -> None:
        self.observations = Observations(self.goal, self.full_rung, self.space.origin)
        self.candidates = Candidates(self.space, self.costs, self.observations, self.seed, may_ship=may_ship)
        self._identities: dict[str, Point] = {}
        self._rounds = 0
        self._pending: tuple[PlannedTrial, ...] = ()

    @property
    def full_rung(self) -> int:
        """Index of the last rung."""
        return len(self.shares) - 1

    def next_round(self) -> list[PlannedTrial]:
        """Return the next trials, the most valuable first; an empty list at the end, and then `end_reason` is set."""
        self._rounds += 1
        origin = self.space.origin
        # The first trial is always the recipe as it stands, since all predictions are relative to it.
        if not self.observations.outcomes:
            return [PlannedTrial(origin, self.full_rung, "the search begins here")]
        acquisition = Acquisition(self.observations, self.costs, self.space.parameters, self.shares)
        # Candidates are the partly trained recipes that may go on, and new ones.
        pending = {planned.point for planned in self._pending}
        rungs = {point: rung for point, rung in self._continuing(acquisition).items() if point not in pending}
        reasons = {
            point: f"no reason to stop after {self.shares[rung]:.0%} of training" for point, rung in rungs.items()
        }
        reasons |= self.candidates.propose(acquisition, self._rounds, self.stopped)
        ranked = acquisition.rank(reasons)
        # Until a recipe meets every limit, the largest recipe of each family comes first.
        if largest := self.candidates.largest_per_family(ranked, acquisition):
            reasons |= largest
            ranked = list(dict.fromkeys([*largest, *acquisition.rank(reasons)]))
        planned_trials = list[PlannedTrial]()
        round_size = 1 if self.goal.needs_timing and len(self.observations.finished) < _TIMED else ROUND
        running_stages = {key for planned in self._pending for key in self._remaining_of(planned)}
        for point in ranked:
            if len(planned_trials) == round_size:
                break
            # The most expensive check comes last: only here is the recipe itself built and validated.
            # Other choices may give the same stages as a recipe that was tried.
            if point in rungs or (
                self.space.identity(point) not in self._identities and self.candidates.is_valid_recipe(point)
            ):
                expected = acquisition.expected[point]
                # The largest of a family is trained in full, since it shows what the family can reach.
                rung = self.full_rung if point in largest else self._next_rung(point, rungs.get(point, -1), expected)
                planned = PlannedTrial(point, rung, reasons[point], expected)
                remaining = self._remaining_of(planned)
                # A trial waits for the next round if most of its work is under way in another one.
                if 2 * sum(remaining[key] for key in remaining.keys() & running_stages) <= sum(remaining.values()):
                    planned_trials.append(planned)
                    running_stages |= remaining.keys()
        self.end_reason = "" if planned_trials else "every other recipe is predicted to miss a limit or to be no better"
        return planned_trials

    def speculate(
        self, arrived: Mapping[PlannedTrial, TrialOutcome], pending: Iterable[PlannedTrial]
    ) -> list[PlannedTrial]:
        """Return the trials that may be planned next, for workers that are idle. Does not change the engine.

        Args:
            arrived: Outcomes of the present round so far.
            pending: Trials of the round that are running.

        Returns:
            Trials of the next round as far as it can be predicted.
        """
        # Work on a copy of everything that planning and recording change.
        other = copy.copy(self)
        other.observations = self.observations.copy()
        other.stopped, other.stopped_at = dict(self.stopped), dict(self.stopped_at)
        other._identities = dict(self._identities)
        rejected = dict(self.candidates.rejected)
        other.candidates = replace(self.candidates, observations=other.observations, rejected=rejected)
        # Record only the observations. Costs must not change before the real outcomes are recorded in their order.
        for planned, outcome in arrived.items():
            other.observations.add(planned.point, planned.rung, outcome)
        other._pending = tuple(pending)
        for planned in (*arrived, *other._pending):
            other._identities.setdefault(self.space.identity(planned.point), planned.point)
        return other.next_round() if other.observations.outcomes else []

    def record(self, planned: PlannedTrial, outcome: TrialOutcome) -> None:
        """Record the outcome of a trial; outcomes are recorded in the order in which the trials were planned."""
        self._identities.setdefault(self.space.identity(planned.point), planned.point)
        self.observations.add(planned.point, planned.rung, outcome)
        if outcome.error is not None:
            # A failed recipe is not tried at another rung.
            self.stopped[planned.point] = f"failed: {outcome.error}"
            return
        self.costs.update(planned.point, self.shares[planned.rung], outcome)

    def _remaining_of(self, planned: PlannedTrial) -> Mapping[str, float]:
        """Return the predicted time of each stage of a trial that no trial has run yet."""
        return self.costs.remaining(planned.point, self.shares[planned.rung])

    def _next_rung(self, point: Point, rung: int, expected: Expectation) -> int:
        """Return the rung that a recipe is trained to next, which was trained to ``rung`` so far.

        It is trained in part where that takes less time than it is expected to save: the probability that the
        recipe misses a limit, times the share of such recipes that this rung has stopped so far, times the time to
        train it in full.
        """
        miss_probability = 1 - (0.5 if expected.probability is None else expected.probability)
        for lower in range(rung + 1, self.full_rung) if self.space.trains(point) else ():
            seconds = self.costs.marginal_seconds(point, self.shares[lower])
            # Estimate the share of the recipes that miss a limit that this rung stops. By Laplace's rule of succession
            # it is one half before any observation.
            ended = sum(self.stopped_at.get(point) == lower for point in self.stopped)
            failing = self.observations.finished.keys() - self.observations.feasible.keys()
            missed = sum((point, lower) in self.observations.margins for point in failing)
            stop_rate = (1 + ended) / (2 + ended + missed)
            if seconds < miss_probability * stop_rate * expected.seconds:
                return lower
        return self.full_rung

    def _continuing(self, acquisition: Acquisition) -> dict[Point, int]:
        """Return partly trained recipes with their rung, without those that are stopped."""
        continuing = {}
        for point, rung in self.observations.last_rungs().items():
            if rung == self.full_rung or point in self.stopped:
                continue
            reason = early_stopping_reason(self.observations, point, rung, self.shares, self.costs.family)
            # A recipe is stopped for good, so that later observations cannot change earlier decisions.
            if reason:
                self.stopped_at[point] = rung
            elif acquisition.gain(point) <= 0:
                reason = "it is no better than a recipe that meets every limit"
            if reason:
                self.stopped[point] = reason
            else:
                continuing[point] = rung
        return continuing
