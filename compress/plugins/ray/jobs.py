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

RunnerFunction = Callable[[StageRunner], Any]
"""Function that is called after the stages. It is sent to other machines, so it and its result must be picklable."""


@dataclass(frozen=True)
class Job:
    """A recipe to be taken down the road, as far as the stage ``until`` (left out: all of it).

    ``then`` looks at what was made, beside other work; ``alone`` does so where nothing else runs, to take times.
    ``early`` finds what ``then`` would of the baseline alone: with several workers it is done once for all journeys of
    one baseline, as soon as that is made. ``seconds`` is what it will take, about: what takes longest begins first.
    """

    recipe: Recipe
    evaluate: RunnerFunction | None = None
    measure: RunnerFunction | None = None
    seconds: float = 0.0
    last_stage: str | None = None
    evaluate_baseline: RunnerFunction | None = None

    def labels(self) -> tuple[str, ...]:
        """Of the stages that it has."""
        every = self.recipe.labels()
        return every if self.last_stage is None else every[: every.index(self.last_stage) + 1]


@dataclass(frozen=True)
class JobResult:
    """What came of a journey. ``found`` and ``timed`` are what its two looks gave; with an ``error`` there is nothing.

    A stage that several journeys share is ``cached`` for all but the first; ``seconds`` is the work of its own.
    """

    stages: tuple[StageRecord, ...] = ()
    evaluation: Any = None
    timings: Any = None
    seconds: float = 0.0
    error: CompressError | None = None


Speculation = Callable[[Mapping[int, JobResult]], Sequence[Job]]
"""Function that returns the jobs that may come next, given the results so far by their index."""


class Workers(Protocol):
    """Who takes journeys. Arrivals come in the order of the journeys, whichever ends first."""

    @property
    def width(self) -> int:
        """How many journeys can be under way at once."""

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """What comes of each. A full disk raises `StorageError`; another error is its journey's alone.

        Workers with nothing to do begin with what ``guess`` says.
        """

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """What will be asked for later, surely; done where a worker would have nothing to do."""

    def cancel(self) -> None:
        """Stop what nobody waits for, so that nothing runs."""

    def close(self) -> None:
        """Let everything go."""


@dataclass
class JobContext:
    """Roads of recipes in ``folder`` that share a cache, and their data, which is read once."""

    folder: Path
    artifacts: Path
    progress: Progress
    _read: tuple[object, Dataset] | None = field(default=None, init=False)
    """Data of the last recipe, with the fields of the recipe that determine it."""

    def runner(self, recipe: Recipe) -> StageRunner:
        """The road of a recipe, not travelled yet."""
        runner = StageRunner(recipe, self.folder, self.artifacts, self.progress)
        told = recipe.data, recipe.task, recipe.slices
        if self._read is not None and self._read[0] == told:
            runner.inputs.data = self._read[1]
        else:
            self._read = told, runner.inputs.data
        return runner


@dataclass
class InProcessWorkers:
    """One journey after another, in this process; the next is asked for when what came of the last has been taken."""

    context: JobContext
    width: int = 1

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """What comes of each; nothing is guessed."""
        yield from map(self._arrived, jobs)

    def _arrived(self, job: Job) -> JobResult:
        began = time.perf_counter()
        try:
            runner = self.context.runner(job.recipe)
            for label in job.labels():
                runner.run_stage(label)
            found, timed = (None if look is None else look(runner) for look in (job.evaluate, job.measure))
        except StorageError:
            raise
        except CompressError as error:
            return JobResult(error=error, seconds=time.perf_counter() - began)
        stages = tuple(one.record for one in runner.results.values())
        return JobResult(stages, found, timed, time.perf_counter() - began)

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Nothing: this process is never idle."""

    def cancel(self) -> None:
        """Nothing: nothing runs."""

    def close(self) -> None:
        """Nothing: there is nothing to let go."""
