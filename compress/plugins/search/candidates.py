"""Untried recipes that the search considers, out of a space that may have millions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from compress.plugins.search.acquisition import Acquisition, CostModel
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import limit_name
from compress.plugins.search.space import Point, SearchParameter
from compress.recipe.recipe import Recipe
from compress.utils.errors import InputError, MissingExtraError, RecipeError, first_line

_OPTUNA_PROPOSALS = 32
_SAME_FAILURE = 3
_NEAR = 0.25
"""Relative shortfall below which a missed limit counts as nearly met."""
_CENTRES, _STEPS = 4, 8
"""Recipes whose neighbours are considered, and repetitions of that.

A sample of millions has hardly any point near the best.
"""


class SearchSpaceView(Protocol):
    """Members of a search space that the engine needs (`SearchSpace`, or recorded trials)."""

    parameters: tuple[SearchParameter, ...]

    @property
    def origin(self) -> Point:
        """Return the point of the recipe that the search starts from."""

    @property
    def is_enumerable(self) -> bool:
        """Return whether every recipe can be enumerated."""

    def points(self, seed: int) -> Iterable[Point]:
        """Return every point, or a sample."""

    def canonicalize(self, point: Sequence[int]) -> Point:
        """Return the point that stands for all equivalent ones."""

    def identity(self, point: Point) -> str:
        """Return a digest that points with equal stages share."""

    def recipe(self, point: Point) -> Recipe:
        """Return the recipe at a point."""

    def trains(self, point: Point) -> bool:
        """Return whether a recipe can be trained in part."""


Family = tuple[object, ...]


class FailurePattern(NamedTuple):
    """Common cause of several failures: a family, and parameter values that all failed recipes share.

    Recipes of the family that succeeded have none of these values. There are none where no recipe of the
    family succeeded.
    """

    family: Family
    choices: dict[int, int]

    def matches(self, point: Point, family: Family) -> bool:
        """Return whether a recipe is of the family and has all of the values."""
        return family == self.family and all(point[index] == value for index, value in self.choices.items())


@dataclass
class Candidates:
    """Untried recipes of a search, each with the reason why it is considered.

    Attributes:
        space: Recipes that may be tried.
        costs: Predictions of size and time.
        observations: All trials so far.
        seed: Seed of samples and proposals.
        rejected: Points that are no valid recipe, with the reason.
        may_ship: Whether the shipped model of a recipe may meet its limits, for recipes that may meet them
            themselves.
        remaining_share: Share of all recipes that predictions leave and no trial has tested; None before the
            first round.
    """

    space: SearchSpaceView
    costs: CostModel
    observations: Observations
    seed: int
    rejected: dict[Point, str] = field(default_factory=dict)
    may_ship: Callable[[Point, Observations], bool] = lambda point, known: True
    remaining_share: float | None = None

    def propose(self, acquisition: Acquisition, number: int, given_up: Container[Point]) -> dict[Point, str]:
        """Return untried points with reasons: of all points, or of a sample, proposals of Optuna and neighbours.

        Args:
            acquisition: Acquisition function of this round.
            number: Number of the round, from which the seed of Optuna's proposals is derived.
            given_up: Recipes that are not trained further; Optuna gets their partial results.

        Returns:
            Point -> reason why it is considered.
        """
        points = list(self.space.points(self.seed))
        reasons = self._promising(points, acquisition, "largest expected gain per time")
        self.remaining_share = len(reasons) / max(len(points), 1)
        # A sample of a large space has few good points. Add proposals near the good ones.
        if not self.space.is_enumerable:
            # Each round has its own seed, which does not depend on the process, so that a resumed search repeats it.
            seed = (self.seed * 100_003 + number) % 2**32
            proposed = propose_with_optuna(self.space.parameters, self.observations, given_up, seed)
            reasons |= self._promising(proposed, acquisition, "proposed by Optuna")
            centres = (self.observations.pareto_front() or self.observations.by_shortfall())[:_CENTRES]
            neighbours = (other for point in centres for other in self._neighbours(point))
            reasons |= self._promising(neighbours, acquisition, "one choice from the best so far")
            self._add_better_neighbours(reasons, acquisition)
        return reasons

    def largest_per_family(self, ranked: Sequence[Point], acquisition: Acquisition) -> dict[Point, str]:
        """Return the largest permitted recipe of each family that has none yet, until a recipe meets every limit.

        Large means many parameters and much training. It is found by local search from the largest ranked point. A
        small recipe that trains briefly would be cheaper, but its failure says little about the family.
        """
        if self.observations.pareto_front():
            return {}
        family, reason = self.costs.family, "the first of its family, as large as the limits permit"

        def extent(point: Point) -> tuple[float, float, int]:
            parameters, size = (self.costs.predict(point, metric) or 1.0 for metric in ("parameters", "size_bytes"))
            return parameters * self.costs.marginal_seconds(point), -size, -sum(map(bool, point))

        # A family counts as tried once one of its recipes nearly met the limits that are not on quality.
        goal, tried = self.observations.goal, set[Family]()
        for point, outcome in self.observations.finished.items():
            short = goal.shortfalls(outcome)
            if all(short[limit_name(limit)] < _NEAR for limit in goal.limits if limit not in goal.quality_limits):
                tried.add(family(point))
        families: dict[Family, list[Point]] = {}
        for point in ranked:
            if self.space.trains(point) and family(point) not in tried and acquisition.likely_meets_limits(point):
                families.setdefault(family(point), []).append(point)
        reasons = {}
        for points in islice(families.values(), max(_CENTRES - len(tried), 0)):
            largest = max(points, key=extent)
            # Climb to larger neighbours as long as they are likely to meet the predictable limits.
            for _ in range(_STEPS):
                neighbours = self._promising(self._neighbours(largest), acquisition, reason)
                relatives = [neighbour for neighbour in neighbours if family(neighbour) == family(largest)]
                best = max(filter(acquisition.likely_meets_limits, relatives), key=extent, default=largest)
                # No neighbour is larger.
                if extent(best) <= extent(largest):
                    break
                largest = best
            reasons[largest] = reason
        return reasons

    def _add_better_neighbours(self, reasons: dict[Point, str], acquisition: Acquisition) -> None:
        """Add neighbours of the most valuable points until no neighbour is more valuable.

        This is local search from several starting points (Hutter et al. 2011, section 4.3).
        """
        seen: set[Point] = set()
        for _ in range(_STEPS):
            centres = [point for point in acquisition.rank(reasons)[:_CENTRES] if point not in seen]
            seen.update(centres)
            neighbours = (other for point in centres for other in self._neighbours(point) if other not in reasons)
            added = self._promising(neighbours, acquisition, "one choice from the most promising")
            if not added:
                break
            reasons |= added

    def _neighbours(self, point: Point) -> Iterable[Point]:
        """Yield all points that differ in one choice."""
        for index, parameter in enumerate(self.space.parameters):
            for value in range(len(parameter.values)):
                if value != point[index]:
                    yield (*point[:index], value, *point[index + 1 :])

    def _promising(self, points: Iterable[Point], acquisition: Acquisition, why: str) -> dict[Point, str]:
        tried = {point for point, _ in self.observations.outcomes} | self.rejected.keys()
        patterns = self._failure_patterns()
        reasons: dict[Point, str] = {}
        for proposed in points:
            # Equivalent points have the same canonical form and are considered once.
            point = self.space.canonicalize(proposed)
            if point in tried or point in reasons or not self.has_valid_stages(point):
                continue
            # Sizes are predicted faster than times, and the size after a refit takes longest.
            if (
                acquisition.may_meet_limits(point)
                and acquisition.gain(point) > 0
                and not any(pattern.matches(point, self.costs.family(point)) for pattern in patterns)
                and self.may_ship(point, self.observations)
            ):
                reasons[point] = why
        return reasons

    def _failure_patterns(self) -> list[FailurePattern]:
        """Return the common causes of repeated failures."""
        outcomes, failed = self.observations.outcomes.items(), defaultdict[tuple[Family, str], list[Point]](list)
        for (point, _), outcome in outcomes:
            if outcome.error is not None:
                failed[self.costs.family(point), outcome.error].append(point)
        patterns = []
        for (family, _), points in failed.items():
            if len(points) < _SAME_FAILURE:
                continue
            # A choice that all failed recipes share and no other recipe has is the likely cause.
            finished = [point for (point, _), outcome in outcomes if outcome.error is None]
            succeeded = [point for point in finished if self.costs.family(point) == family]
            choices = {
                index: values[0]
                for index, values in enumerate(zip(*points, strict=True))
                if len(set(values)) == 1 and all(point[index] != values[0] for point in succeeded)
            }
            if not succeeded or choices:
                patterns.append(FailurePattern(family, choices if succeeded else {}))
        return patterns

    def has_valid_stages(self, point: Point) -> bool:
        """Return whether the stages of a point can be built; records the reason otherwise."""
        try:
            self.costs.family(point)
        except InputError as error:
            self.rejected[point] = first_line(error)
            return False
        return True

    def is_valid_recipe(self, point: Point) -> bool:
        """Return whether a point is a recipe that can run; records the reason otherwise."""
        try:
            self.space.recipe(point)
        except InputError as error:
            problems = error.problems if isinstance(error, RecipeError) else ()
            self.rejected[point] = str(problems[0]) if problems else first_line(error)
            return False
        return True


def propose_with_optuna(
    parameters: Sequence[SearchParameter], observations: Observations, given_up: Container[Point], seed: int
) -> Iterator[Point]:
    """Yield points proposed by a tree-structured Parzen estimator with constraints (Watanabe and Hutter 2023).

    The study is built anew each time, so that the same ledger and seed give the same proposals. Proposals may
    repeat.

    Args:
        parameters: Parameters of the space.
        observations: All trials so far; those of recipes that may be trained further are ignored.
        given_up: Recipes that are not trained further.
        seed: Seed of the sampler.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "A space of more recipes than can be listed") from error
    from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {}
    order: dict[str, list[int]] = {}
    for parameter in parameters:
        name, indices = parameter.name, range(len(parameter.values))
        # Optuna exploits the order of integers, so a parameter of numbers is given as the rank of its value.
        if parameter.is_ordered:
            order[name] = sorted(indices, key=parameter.values.__getitem__)
            distributions[name] = IntDistribution(0, indices[-1])
        else:
            order[name], distributions[name] = list(indices), CategoricalDistribution(list(indices))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=min(8, 2 + 2 * len(parameters)))
    goal = observations.goal
    study = optuna.create_study(directions=["minimize"] * len(goal.minimize), sampler=sampler)
    for point, rung in observations.last_rungs().items():
        outcome = observations.outcomes[point, rung]
        values = goal.objectives(outcome)
        if values is None or (rung < observations.full_rung and point not in given_up):
            continue
        params = {name: ranks.index(index) for (name, ranks), index in zip(order.items(), point, strict=True)}
        # A constraint above 0 marks a violated limit. A metric that was not measured at a lower rung has an infinite
        # shortfall, which Optuna cannot rank.
        constraints = {name: min(value, 1.0) for name, value in goal.shortfalls(outcome).items()}
        study.add_trial(
            create_trial(params=params, distributions=distributions, values=values, constraints=constraints)
        )
    for _ in range(_OPTUNA_PROPOSALS):
        # The study learns no value for a proposal, so a proposal may repeat.
        params = study.ask(distributions).params
        yield tuple(ranks[params[name]] for name, ranks in order.items())
