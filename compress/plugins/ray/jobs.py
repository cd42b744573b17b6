"""Jobs that run together, and their results, in this process or on other machines."""

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
    """A recipe to run up to the stage ``last_stage``, or completely.

    ``evaluate`` is called with the finished runner while other work runs. ``measure`` is called when nothing else runs,
    to
    take timings. ``evaluate_baseline`` computes the part of ``evaluate`` that concerns the baseline: with several
    workers it
    runs once for all jobs of one baseline. ``seconds`` is the estimated duration. The longest job begins first.
    """

    recipe: Recipe
    evaluate: RunnerFunction | None = None
    measure: RunnerFunction | None = None
    seconds: float = 0.0
    last_stage: str | None = None
    evaluate_baseline: RunnerFunction | None = None

    def labels(self) -> tuple[str, ...]:
        """Return the labels of the stages that the job runs."""
        every = self.recipe.labels()
        return every if self.last_stage is None else every[: every.index(self.last_stage) + 1]


@dataclass(frozen=True)
class JobResult:
    """Result of a job: the outputs of ``evaluate`` and ``measure``, or an ``error``.

    A stage that several jobs share is ``cached`` for all but the first. ``seconds`` counts the job's own work.
    """

    stages: tuple[StageRecord, ...] = ()
    evaluation: Any = None
    timings: Any = None
    seconds: float = 0.0
    error: CompressError | None = None


Speculation = Callable[[Mapping[int, JobResult]], Sequence[Job]]
"""Function that returns the jobs that may come next, given the results so far by their index."""


class Workers(Protocol):
    """Interface of workers. Results come in the order of the jobs, whichever ends first."""

    @property
    def width(self) -> int:
        """Number of jobs that can run at once."""

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """Yield the result of each job. A full disk raises `StorageError`; another error belongs to its job alone.

        Idle workers begin with the jobs that ``guess`` returns.
        """

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Add jobs that will be requested later, for idle workers."""

    def cancel(self) -> None:
        """Stop all running work."""

    def close(self) -> None:
        """Release all resources."""


@dataclass
class JobContext:
    """Runners of recipes in ``folder`` that share a cache and their data, which is read once."""

    folder: Path
    artifacts: Path
    progress: Progress
    _read: tuple[object, Dataset] | None = field(default=None, init=False)
    """Data of the last recipe, with the fields of the recipe that determine it."""

    def runner(self, recipe: Recipe) -> StageRunner:
        """Return a new runner of a recipe."""
        runner = StageRunner(recipe, self.folder, self.artifacts, self.progress)
        fields = recipe.data, recipe.task, recipe.slices
        if self._read is not None and self._read[0] == fields:
            runner.inputs.data = self._read[1]
        else:
            self._read = fields, runner.inputs.data
        return runner


@dataclass
class InProcessWorkers:
    """Workers that run one job after another in this process.

    The next job is requested after the last result was taken.
    """

    context: JobContext
    width: int = 1

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """Yield the result of each job. There is no speculation."""
        yield from map(self._arrived, jobs)

    def _arrived(self, job: Job) -> JobResult:
        """Run one job and return its result."""
        began = time.perf_counter()
        try:
            runner = self.context.runner(job.recipe)
            for label in job.labels():
                runner.run_stage(label)
            evaluation, timings = (
                None if function is None else function(runner) for function in (job.evaluate, job.measure)
            )
        # A full disk would fail every other job too.
        except StorageError:
            raise
        except CompressError as error:
            return JobResult(error=error, seconds=time.perf_counter() - began)
        stages = tuple(result.record for result in runner.results.values())
        return JobResult(stages, evaluation, timings, time.perf_counter() - began)

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Do nothing, because this process is never idle."""

    def cancel(self) -> None:
        """Do nothing, because nothing runs between results."""

    def close(self) -> None:
        """Do nothing, because there are no resources."""
