"""Recipes that are taken down the road together, and what comes of each; here, or on other machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compress.data.dataset import Dataset
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import Recipe
from compress.results.report import StageRecord
from compress.utils.errors import CompressError, StorageError
from compress.utils.progress import Progress

Look = Callable[[StageRunner], Any]
"""What is done at the end of a runner. It travels to other machines, so that it and what it finds can be pickled."""


@dataclass(frozen=True)
class Journey:
    """A recipe to be taken down the road, as far as the stage ``until`` (left out: all of it).

    ``then`` looks at what was made, beside other work; ``alone`` does so where nothing else runs, to take times.
    ``early`` finds what ``then`` would of the baseline alone: with several workers it is done once for all journeys of
    one baseline, as soon as that is made. ``seconds`` is what it will take, about: what takes longest begins first.
    """

    recipe: Recipe
    then: Look | None = None
    alone: Look | None = None
    seconds: float = 0.0
    until: str | None = None
    early: Look | None = None

    def labels(self) -> tuple[str, ...]:
        """Of the stages that it has."""
        every = self.recipe.labels()
        return every if self.until is None else every[: every.index(self.until) + 1]


@dataclass(frozen=True)
class Arrival:
    """What came of a journey. ``found`` and ``timed`` are what its two looks gave; with an ``error`` there is nothing.

    A stage that several journeys share is ``cached`` for all but the first; ``seconds`` is the work of its own.
    """

    stages: tuple[StageRecord, ...] = ()
    found: Any = None
    timed: Any = None
    seconds: float = 0.0
    error: CompressError | None = None


Guess = Callable[[Mapping[int, Arrival]], Sequence[Journey]]
"""What may be asked for next, by what has arrived so far, each by its journey's place."""


class Workers(Protocol):
    """Who takes journeys. Arrivals come in the order of the journeys, whichever ends first."""

    @property
    def width(self) -> int:
        """How many journeys can be under way at once."""

    def together(self, journeys: Iterable[Journey], guess: Guess | None = None) -> Iterator[Arrival]:
        """What comes of each. A full disk raises `StorageError`; another error is its journey's alone.

        Workers with nothing to do begin with what ``guess`` says.
        """

    def ahead(self, journeys: Sequence[Journey]) -> None:
        """What will be asked for later, surely; done where a worker would have nothing to do."""

    def rest(self) -> None:
        """Stop what nobody waits for, so that nothing runs."""

    def close(self) -> None:
        """Let everything go."""


@dataclass
class Roads:
    """Roads of recipes in ``folder`` that share a cache, and their data, which is read once."""

    folder: Path
    artifacts: Path
    progress: Progress
    _read: tuple[object, Dataset] | None = field(default=None, init=False)
    """The data, and what of a recipe says which it is."""

    def road(self, recipe: Recipe) -> StageRunner:
        """The road of a recipe, not travelled yet."""
        runner = StageRunner(recipe, self.folder, self.artifacts, self.progress)
        told = recipe.data, recipe.task, recipe.slices
        if self._read is not None and self._read[0] == told:
            runner.inputs.data = self._read[1]
        else:
            self._read = told, runner.inputs.data
        return runner


@dataclass
class InProcess:
    """One journey after another, in this process; the next is asked for when what came of the last has been taken."""

    roads: Roads
    width: int = 1

    def together(self, journeys: Iterable[Journey], guess: Guess | None = None) -> Iterator[Arrival]:
        """What comes of each; nothing is guessed."""
        yield from map(self._arrived, journeys)

    def _arrived(self, journey: Journey) -> Arrival:
        began = time.perf_counter()
        try:
            runner = self.roads.road(journey.recipe)
            for label in journey.labels():
                runner.run_stage(label)
            found, timed = (None if look is None else look(runner) for look in (journey.then, journey.alone))
        except StorageError:
            raise
        except CompressError as error:
            return Arrival(error=error, seconds=time.perf_counter() - began)
        stages = tuple(one.record for one in runner.results.values())
        return Arrival(stages, found, timed, time.perf_counter() - began)

    def ahead(self, journeys: Sequence[Journey]) -> None:
        """Nothing: this process is never idle."""

    def rest(self) -> None:
        """Nothing: nothing runs."""

    def close(self) -> None:
        """Nothing: there is nothing to let go."""
