"""What journeys have in common: a tree of stages, each to be done once, and a look at the end of each journey."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from compress.pipeline.cache import Entry
from compress.plugins.ray.jobs import Journey
from compress.recipe.recipe import START, Recipe
from compress.utils.errors import CompressError


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
    beside: Work | None = None
    """A look that finds a part of what this one will."""
    entries: tuple[Entry, ...] = ()
    """What a look has left in the cache."""
    under_way: bool = False
    is_guessed: bool = False
    """Whether it was begun before anybody asked for it."""
    began: float = 0.0
    tries: int = 0
    avoided: set[str] = field(default_factory=set)
    """Machines that were lost at it."""

    @property
    def is_ready(self) -> bool:
        """Whether it can begin now."""
        waits = self.beside is not None and not (self.beside.done or self.beside.error)
        return not (self.done or self.error or self.under_way or waits) and (self.before is None or self.before.done)

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

    @property
    def is_early(self) -> bool:
        """Whether it is only for looks to come, and may wait for stages."""
        return self is self.trip.early

    def reads(self) -> list[Entry]:
        """Everything of other work that it may have use for."""
        return [*self.made_before(), *(() if self.beside is None else self.beside.entries)]

    def failure(self) -> CompressError | None:
        """What it, or a stage before it, failed by."""
        return self.error or (self.before.failure() if self.before is not None else None)


@dataclass(eq=False)
class Trip:
    """A journey on its way. ``stages`` may be other trips' too."""

    journey: Journey
    stages: list[Work] = field(default_factory=list)
    early: Work | None = None
    look: Work | None = None
    timed: Work | None = None
    """A look that is taken where nothing else runs."""

    @property
    def last(self) -> list[Work]:
        """What has to be done for it, in this order."""
        return [*self.stages, *filter(None, (self.look, self.timed))]

    @property
    def works(self) -> list[Work]:
        """The same, and what others need not do then."""
        return [*filter(None, (self.early,)), *self.last]

    @property
    def failure(self) -> CompressError | None:
        """What it failed by."""
        return next((found for work in self.last if (found := work.failure()) is not None), None)

    @property
    def has_arrived(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or all(work.done for work in self.last)


Works = dict[tuple[object, ...], Work]
"""Pieces of work by what tells their results from others'."""


def tree(journeys: Sequence[Journey], works: Works) -> list[Trip]:
    """The journeys with the work that each needs; what several need is one piece of work, added to ``works``."""
    trips = []
    for journey in journeys:
        trip = Trip(journey)
        before: Work | None = None
        name, *names = _names(journey.recipe)
        made: dict[str, tuple[Work | None, tuple[object, ...]]] = {START: (None, name)}
        for label, name in zip(journey.labels(), names, strict=False):
            before = _shared(works, name, trip, label, before)
            made[label] = before, name
            trip.stages.append(before)
        if journey.early is not None:
            at, named = made[journey.recipe.baseline]
            trip.early = _shared(works, (*named, journey.early), trip, None, at)
        if journey.then is not None:
            before = trip.look = _shared(works, (*name, journey.then), trip, None, before)
            before.beside = trip.early
        if journey.alone is not None:
            trip.timed = Work(trip, None, before, journey.seconds)
        trips.append(trip)
    return trips


def _shared(works: Works, name: tuple[object, ...], trip: Trip, label: str | None, before: Work | None) -> Work:
    found = works.get(name)
    if found is None or found.failure() is not None:
        found = works[name] = Work(trip, label, before)
    found.urgency = max(found.urgency, trip.journey.seconds)
    return found


def _names(recipe: Recipe) -> list[tuple[object, ...]]:
    """For the start and each stage a digest of everything that decides its output."""
    told = recipe.model_dump(
        mode="json",
        include={"task", "model", "module", "module_arguments", "random_weights", "trust_remote_code", "data", "seed"},
    )
    sofar = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    names: list[tuple[object, ...]] = [(sofar.hexdigest(),)]
    for stage in recipe.stages:
        sofar.update(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode())
        names.append((sofar.copy().hexdigest(),))
    return names
