"""Which recipes are looked at that nobody tried: of a space that may have millions, those that may be worth a trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from compress.plugins.search.acquisition import Forecasts, Prospects
from compress.plugins.search.goal import named
from compress.plugins.search.ledger import PastTrial
from compress.plugins.search.observations import Known
from compress.plugins.search.parameters import Knob
from compress.plugins.search.proposals import Told, proposals
from compress.plugins.search.space import Point
from compress.recipe.recipe import Recipe
from compress.utils.errors import InputError, RecipeError, first_line

_ASKED = 32
_SAME_FAILURE = 3
_NEAR = 0.25
"""A limit that is missed by a smaller share was foretold a little wrongly, no more."""
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


Family = tuple[object, ...]


class Cause(NamedTuple):
    """What made recipes fail alike: a family, and of knobs by their places the values that it takes.

    They are what those recipes have in common and none of the family that ran has: nothing, where none ran.
    """

    family: Family
    choices: dict[int, int]


@dataclass
class Candidates:
    """Of one search. Nothing here decides: it says what there is, and for which reason it was looked at."""

    space: Choices
    costs: Forecasts
    known: Known
    past: Sequence[PastTrial]
    """What is known from elsewhere."""
    seed: int
    refused: dict[Point, str] = field(default_factory=dict)
    """Points that are no recipe, and why."""
    is_fit: Callable[[Point, Known], bool] = lambda point, known: True
    """Whether what ships of a recipe may keep its limits, which is asked of those that may keep them themselves."""
    left: float | None = None
    """The share of all recipes that predictions leave and nobody has tried; None before anything is known."""

    def __post_init__(self) -> None:
        self.past = [one for one in self.past if self.has_stages(one.point)]

    def new(self, prospects: Prospects, number: int, given_up: Container[Point]) -> dict[Point, str]:
        """Points that nobody tried: of all, or where these can't be listed, of a sample and what Optuna proposes.

        ``number`` is the round's; those ``given_up`` are told to Optuna by what they came to.
        """
        points = list(self.space.points(self.seed))
        found = self._worth_trying(points, prospects, "most gain for its time")
        self.left = len(found) / max(len(points), 1)
        if not self.space.is_listed:
            seed = self.seed * 100_003 + number
            proposed = proposals(self.space.knobs, self._told(given_up), len(self.known.goal.minimize), seed, _ASKED)
            found |= self._worth_trying(proposed, prospects, "proposed by Optuna")
            found |= self._worth_trying((one.point for one in self.past), prospects, "tried before, elsewhere")
            centres = (self.known.front() or self.known.nearest())[:_CENTRES]
            near = (other for point in centres for other in self._neighbours(point))
            found |= self._worth_trying(near, prospects, "one choice from the best so far")
            self._climb(found, prospects)
        return found

    def largest_of_families(self, by_worth: Sequence[Point], prospects: Prospects) -> dict[Point, str]:
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

        tried = {family(point) for point in self.known.finished if self._was_near(point)}
        families: dict[Family, list[Point]] = {}
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

    def _was_near(self, point: Point) -> bool:
        """Whether a recipe trained in full missed no limit by far but for those on quality."""
        goal, short = self.known.goal, self.known.goal.shortfalls(self.known.finished[point])
        return all(short[named(limit)] < _NEAR for limit in goal.limits if limit not in goal.quality)

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
        causes = self._causes()
        found: dict[Point, str] = {}
        for proposed in points:
            point = self.space.canonical(proposed)
            if point in tried or point in found or not self.has_stages(point):
                continue
            # Sizes are told sooner than times.
            worth = prospects.may_keep(point) and prospects.gain(point) > 0 and not self._fails(point, causes)
            if worth and self.is_fit(point, self.known):
                found[point] = why
        return found

    def _causes(self) -> list[Cause]:
        """What fails again and again, by what came of all trials."""
        outcomes, failed = self.known.outcomes.items(), defaultdict[tuple[Family, str], list[Point]](list)
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
                found.append(Cause(family, choices if ran else {}))
        return found

    def _fails(self, point: Point, causes: Iterable[Cause]) -> bool:
        return any(
            self.costs.family(point) == cause.family and all(point[at] == value for at, value in cause.choices.items())
            for cause in causes
        )

    def has_stages(self, point: Point) -> bool:
        """Whether its stages can be made at all; what can't is `refused`."""
        try:
            self.costs.family(point)
        except InputError as error:
            self.refused[point] = first_line(error)
            return False
        return True

    def is_recipe(self, point: Point) -> bool:
        """Whether it can be run; what can't is `refused`."""
        try:
            self.space.recipe(point)
        except RecipeError as error:
            self.refused[point] = str(error.problems[0]) if error.problems else first_line(error)
            return False
        except InputError as error:
            self.refused[point] = first_line(error)
            return False
        return True

    def _told(self, given_up: Container[Point]) -> list[Told]:
        """Every recipe that was tried as far as it goes, for the sampler."""
        found = []
        for point, rung in self.known.last_rungs().items():
            outcome = self.known.outcomes[point, rung]
            values = self.known.goal.values(outcome)
            if values is None or (rung < self.known.full and point not in given_up):
                continue
            # What wasn't measured at a lower rung falls short without end.
            limits = {name: min(value, 1.0) for name, value in self.known.goal.shortfalls(outcome).items()}
            found.append(Told(point, values, limits))
        return found
