"""What journeys have in common: a tree of stages, each to be done once, and a look at the end of each journey."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from compress.cache import Entry
from compress.errors import CompressError
from compress.recipe.recipe import Recipe
from compress.workers.journeys import Journey


@dataclass(eq=False)
class Work:
    """One piece of work: a stage, or with no ``label`` the look at the end of a journey.

    ``before`` is the stage that it follows. ``trip`` is the first journey that needs it; ``urgency`` the seconds of
    the longest one.
    """

    trip: Trip
    label: str | None
    before: Work | None
    urgency: float = 0.0
    key: str | None = None
    """The cache key of a stage's output, once it is known."""
    looked_up: bool = False
    entry: Entry | None = None
    found: object = None
    seconds: float = 0.0
    done: bool = False
    error: CompressError | None = None
    under_way: bool = False
    tries: int = 0
    avoided: set[str] = field(default_factory=set)
    """Machines that were lost at it."""

    @property
    def is_ready(self) -> bool:
        """Whether it can begin now."""
        return not (self.done or self.error or self.under_way) and (self.before is None or self.before.done)

    @property
    def is_timing(self) -> bool:
        """Whether nothing else may run beside it."""
        return self is self.trip.timed

    def made_before(self) -> list[Entry]:
        """The outputs of the stages before it, in their order."""
        if self.before is None:
            return []
        own = [] if self.before.entry is None else [self.before.entry]
        return [*self.before.made_before(), *own]

    def failure(self) -> CompressError | None:
        """What it, or a stage before it, failed by."""
        return self.error or (self.before.failure() if self.before is not None else None)


@dataclass(eq=False)
class Trip:
    """A journey on its way. ``stages`` may be other trips' too."""

    journey: Journey
    stages: list[Work] = field(default_factory=list)
    look: Work | None = None
    timed: Work | None = None
    """A look that is taken where nothing else runs."""

    @property
    def last(self) -> list[Work]:
        """What has to be done for it, in this order."""
        return [*self.stages, *filter(None, (self.look, self.timed))]

    @property
    def failure(self) -> CompressError | None:
        """What it failed by."""
        return next((found for work in self.last if (found := work.failure()) is not None), None)

    @property
    def has_arrived(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or all(work.done for work in self.last)


def tree(journeys: Sequence[Journey], known: dict[str, Work] | None = None) -> list[Trip]:
    """The journeys with the work that each needs; what several need, or is ``known`` already, is one piece of work."""
    works = {} if known is None else known
    trips = []
    for journey in journeys:
        trip = Trip(journey)
        before: Work | None = None
        for label, name in zip(journey.labels(), _names(journey.recipe), strict=False):
            work = works.get(name)
            if work is None or work.error is not None:
                work = works[name] = Work(trip, label, before)
            work.urgency = max(work.urgency, journey.seconds)
            trip.stages.append(work)
            before = work
        if journey.then is not None:
            before = trip.look = Work(trip, None, before, journey.seconds)
        if journey.alone is not None:
            trip.timed = Work(trip, None, before, journey.seconds)
        trips.append(trip)
    return trips


def _names(recipe: Recipe) -> list[str]:
    """For each stage a digest of everything that decides its output: the stages up to it, and where they start."""
    told = recipe.model_dump(
        mode="json",
        include={"task", "model", "module", "module_arguments", "random_weights", "trust_remote_code", "data", "seed"},
    )
    sofar, names = hashlib.sha256(json.dumps(told, sort_keys=True).encode()), []
    for stage in recipe.stages:
        sofar.update(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode())
        names.append(sofar.copy().hexdigest())
    return names
