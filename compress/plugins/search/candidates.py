"""Which recipes are looked at that nobody tried: of a space that may have millions, those that may be worth a trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from compress.plugins.search.acquisition import Acquisition, CostModel
from compress.plugins.search.goal import limit_name
from compress.plugins.search.ledger import PastTrial
from compress.plugins.search.observations import Observations
from compress.plugins.search.parameters import SearchParameter
from compress.plugins.search.space import Point
from compress.recipe.recipe import Recipe
from compress.utils.errors import InputError, MissingExtraError, RecipeError, first_line

_ASKED = 32
_SAME_FAILURE = 3
_NEAR = 0.25
"""A limit that is missed by a smaller share was foretold a little wrongly, no more."""
_CENTRES, _STEPS = 4, 8
"""Recipes whose neighbours are looked at, and how often anew, since a sample of millions has hardly any point near the
one wanted."""


class SearchSpaceView(Protocol):
    """What the engine has to know of a space (`SearchSpace`, or a table of what is known already)."""

    parameters: tuple[SearchParameter, ...]

    @property
    def origin(self) -> Point: ...
    @property
    def is_enumerable(self) -> bool: ...
    def points(self, seed: int) -> Iterable[Point]: ...
    def canonicalize(self, point: Sequence[int]) -> Point: ...
    def identity(self, point: Point) -> str: ...
    def recipe(self, point: Point) -> Recipe: ...
    def trains(self, point: Point) -> bool: ...


Family = tuple[object, ...]


class FailurePattern(NamedTuple):
    """What made recipes fail alike: a family, and of knobs by their places the values that it takes.

    They are what those recipes have in common and none of the family that ran has: nothing, where none ran.
    """

    family: Family
    choices: dict[int, int]


@dataclass
class Candidates:
    """Of one search. Nothing here decides: it says what there is, and for which reason it was looked at."""

    space: SearchSpaceView
    costs: CostModel
    observations: Observations
    past: Sequence[PastTrial]
    """What is known from elsewhere."""
    seed: int
    rejected: dict[Point, str] = field(default_factory=dict)
    """Points that are no recipe, and why."""
    may_ship: Callable[[Point, Observations], bool] = lambda point, known: True
    """Whether what ships of a recipe may keep its limits, which is asked of those that may keep them themselves."""
    remaining_share: float | None = None
    """The share of all recipes that predictions leave and nobody has tried; None before anything is known."""

    def __post_init__(self) -> None:
        self.past = [one for one in self.past if self.has_valid_stages(one.point)]

    def propose(self, prospects: Acquisition, number: int, given_up: Container[Point]) -> dict[Point, str]:
        """Points that nobody tried: of all, or where these can't be listed, of a sample and what Optuna proposes.

        ``number`` is the round's; those ``given_up`` are told to Optuna by what they came to.
        """
        points = list(self.space.points(self.seed))
        found = self._worth_trying(points, prospects, "most gain for its time")
        self.remaining_share = len(found) / max(len(points), 1)
        if not self.space.is_enumerable:
            seed = self.seed * 100_003 + number
            proposed = proposals(
                self.space.parameters, self._told(given_up), len(self.observations.goal.minimize), seed, _ASKED
            )
            found |= self._worth_trying(proposed, prospects, "proposed by Optuna")
            found |= self._worth_trying((one.point for one in self.past), prospects, "tried before, elsewhere")
            centres = (self.observations.pareto_front() or self.observations.by_shortfall())[:_CENTRES]
            near = (other for point in centres for other in self._neighbours(point))
            found |= self._worth_trying(near, prospects, "one choice from the best so far")
            self._climb(found, prospects)
        return found

    def largest_per_family(self, by_worth: Sequence[Point], prospects: Acquisition) -> dict[Point, str]:
        """While none keeps every limit surely: of each family with none within what is foretold, the largest.

        That is the one of most parameters x seconds of training, found by local search from the largest of
        ``by_worth``: what is small and trained for a moment is cheaper, but its failing says little of what the family
        can come to.
        """
        if self.observations.pareto_front():
            return {}
        family, why = self.costs.family, "the first of its family, as large as the limits let it be"

        def extent(point: Point) -> tuple[float, float, int]:
            parameters, size = (self.costs.predict(point, each) or 1.0 for each in ("parameters", "size_bytes"))
            return parameters * self.costs.marginal_seconds(point), -size, -sum(map(bool, point))

        tried = {family(point) for point in self.observations.finished if self._was_near(point)}
        families: dict[Family, list[Point]] = {}
        for point in by_worth:
            if self.space.trains(point) and family(point) not in tried and prospects.likely_meets_limits(point):
                families.setdefault(family(point), []).append(point)
        found = {}
        for points in islice(families.values(), max(_CENTRES - len(tried), 0)):
            largest = max(points, key=extent)
            for _ in range(_STEPS):
                near = self._worth_trying(self._neighbours(largest), prospects, why)
                alike = (one for one in near if family(one) == family(largest) and prospects.likely_meets_limits(one))
                best = max(alike, key=extent, default=largest)
                if extent(best) <= extent(largest):
                    break
                largest = best
            found[largest] = why
        return found

    def _was_near(self, point: Point) -> bool:
        """Whether a recipe trained in full missed no limit by far but for those on quality."""
        goal, short = self.observations.goal, self.observations.goal.shortfalls(self.observations.finished[point])
        return all(short[limit_name(limit)] < _NEAR for limit in goal.limits if limit not in goal.quality_limits)

    def _climb(self, found: dict[Point, str], prospects: Acquisition) -> None:
        """Add what differs in one choice from what is worth most, until nothing near is worth more.

        That is local search from several places (Hutter et al. 2011, section 4.3).
        """
        seen: set[Point] = set()
        for _ in range(_STEPS):
            centres = [point for point in prospects.rank(found)[:_CENTRES] if point not in seen]
            seen.update(centres)
            near = (other for point in centres for other in self._neighbours(point) if other not in found)
            more = self._worth_trying(near, prospects, "one choice from what promises most")
            if not more:
                break
            found |= more

    def _neighbours(self, point: Point) -> Iterable[Point]:
        """All that differ from it in one choice."""
        for place, parameter in enumerate(self.space.parameters):
            for value in range(len(parameter.values)):
                if value != point[place]:
                    yield (*point[:place], value, *point[place + 1 :])

    def _worth_trying(self, points: Iterable[Point], prospects: Acquisition, why: str) -> dict[Point, str]:
        tried = {point for point, _ in self.observations.outcomes} | self.rejected.keys()
        causes = self._causes()
        found: dict[Point, str] = {}
        for proposed in points:
            point = self.space.canonicalize(proposed)
            if point in tried or point in found or not self.has_valid_stages(point):
                continue
            # Sizes are told sooner than times.
            worth = prospects.may_meet_limits(point) and prospects.gain(point) > 0 and not self._fails(point, causes)
            if worth and self.may_ship(point, self.observations):
                found[point] = why
        return found

    def _causes(self) -> list[FailurePattern]:
        """What fails again and again, by what came of all trials."""
        outcomes, failed = self.observations.outcomes.items(), defaultdict[tuple[Family, str], list[Point]](list)
        for (point, _), outcome in outcomes:
            if outcome.error is not None:
                failed[self.costs.family(point), outcome.error].append(point)
        found = []
        for (family, _), points in failed.items():
            if len(points) < _SAME_FAILURE:
                continue
            ran = [point for (point, _), one in outcomes if one.error is None and self.costs.family(point) == family]
            alike = {at: values[0] for at, values in enumerate(zip(*points, strict=True)) if len(set(values)) == 1}
            choices = {at: value for at, value in alike.items() if all(point[at] != value for point in ran)}
            if not ran or choices:
                found.append(FailurePattern(family, choices if ran else {}))
        return found

    def _fails(self, point: Point, causes: Iterable[FailurePattern]) -> bool:
        return any(
            self.costs.family(point) == cause.family and all(point[at] == value for at, value in cause.choices.items())
            for cause in causes
        )

    def has_valid_stages(self, point: Point) -> bool:
        """Whether its stages can be made at all; what can't is `refused`."""
        try:
            self.costs.family(point)
        except InputError as error:
            self.rejected[point] = first_line(error)
            return False
        return True

    def is_valid_recipe(self, point: Point) -> bool:
        """Whether it can be run; what can't is `refused`."""
        try:
            self.space.recipe(point)
        except RecipeError as error:
            self.rejected[point] = str(error.problems[0]) if error.problems else first_line(error)
            return False
        except InputError as error:
            self.rejected[point] = first_line(error)
            return False
        return True

    def _told(self, given_up: Container[Point]) -> list[CompletedTrial]:
        """Every recipe that was tried as far as it goes, for the sampler."""
        found = []
        for point, rung in self.observations.last_rungs().items():
            outcome = self.observations.outcomes[point, rung]
            values = self.observations.goal.objectives(outcome)
            if values is None or (rung < self.observations.full_rung and point not in given_up):
                continue
            # What wasn't measured at a lower rung falls short without end.
            limits = {name: min(value, 1.0) for name, value in self.observations.goal.shortfalls(outcome).items()}
            found.append(CompletedTrial(point, values, limits))
        return found


@dataclass(frozen=True)
class CompletedTrial:
    """A trial as the sampler sees it: figures to minimize, and limits that are missed where they are above 0."""

    point: Point
    values: tuple[float, ...]
    constraints: Mapping[str, float]


def proposals(
    parameters: Sequence[SearchParameter], told: Sequence[CompletedTrial], objectives: int, seed: int, count: int
) -> Iterator[Point]:
    """``count`` points worth trying, by a tree-structured Parzen estimator with constraints (Watanabe and Hutter 2023).

    The study is made anew of what is known, so that the same ledger and ``seed`` give the same proposals. They may
    repeat, and may have been tried.
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
        if parameter.is_ordered:
            order[parameter.name] = sorted(range(len(parameter.values)), key=parameter.values.__getitem__)
            distributions[parameter.name] = IntDistribution(0, len(parameter.values) - 1)
        else:
            distributions[parameter.name] = CategoricalDistribution(list(range(len(parameter.values))))
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=min(8, 2 + 2 * len(parameters)))
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    for one in told:
        params = {
            parameter.name: order[parameter.name].index(place) if parameter.name in order else place
            for parameter, place in zip(parameters, one.point, strict=True)
        }
        study.add_trial(
            create_trial(
                params=params, distributions=distributions, values=one.values, constraints=dict(one.constraints)
            )
        )
    for _ in range(count):
        params = study.ask(distributions).params
        yield tuple(
            order[parameter.name][params[parameter.name]] if parameter.name in order else params[parameter.name]
            for parameter in parameters
        )
