"""Jobs that run together, and their results, in this process or on other machines."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from compress.data.dataset import Dataset
from compress.pipeline.cache import Entry
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import START, Recipe
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
        for job in jobs:
            began = time.perf_counter()
            try:
                runner = self.context.runner(job.recipe)
                for label in job.labels():
                    runner.run_stage(label)
                evaluation, timings = (function and function(runner) for function in (job.evaluate, job.measure))
            # A full disk would fail every other job too.
            except StorageError:
                raise
            except CompressError as error:
                yield JobResult(error=error, seconds=time.perf_counter() - began)
            else:
                stages = tuple(result.record for result in runner.results.values())
                yield JobResult(stages, evaluation, timings, time.perf_counter() - began)

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Do nothing, because this process is never idle."""

    def cancel(self) -> None:
        """Do nothing, because nothing runs between results."""

    def close(self) -> None:
        """Do nothing, because there are no resources."""


@dataclass(eq=False)
class WorkItem:
    """One task: a stage, or an evaluation or timing if it has no ``label``.

    ``previous`` is the stage before it. ``dag_job`` is the first job that needs it. ``urgency`` is the number of
    seconds
    of the longest job that needs it.
    """

    dag_job: DagJob
    label: str | None
    previous: WorkItem | None
    urgency: float = 0.0
    key: str | None = None
    """Cache key of the stage's output, once it is known."""
    is_looked_up: bool = False
    entry: Entry | None = None
    output: object = None
    seconds: float = 0.0
    done: bool = False
    error: CompressError | None = None
    baseline_item: WorkItem | None = None
    """Evaluation of the baseline, which is a part of this evaluation."""
    entries: tuple[Entry, ...] = ()
    """Cache entries that an evaluation has left."""
    is_running: bool = False
    is_guessed: bool = False
    """Whether it was started speculatively."""
    began: float = 0.0
    tries: int = 0
    lost_on: set[str] = field(default_factory=set)
    """Nodes that were lost while they ran it."""

    @property
    def is_ready(self) -> bool:
        """True if it can begin now."""
        waits = self.baseline_item is not None and not (self.baseline_item.done or self.baseline_item.error)
        return not (self.done or self.error or self.is_running or waits) and (
            self.previous is None or self.previous.done
        )

    @property
    def is_timing(self) -> bool:
        """True if nothing else may run at the same time."""
        return self is self.dag_job.timing

    def inputs(self) -> list[Entry]:
        """Return the outputs of the stages before it, in their order."""
        if self.previous is None:
            return []
        return [*self.previous.inputs(), *filter(None, (self.previous.entry,))]

    @property
    def is_baseline_evaluation(self) -> bool:
        """True if it evaluates the baseline, which only later evaluations need."""
        return self is self.dag_job.baseline_evaluation

    def available_entries(self) -> list[Entry]:
        """Return the cache entries of other work that it may read."""
        return [*self.inputs(), *(() if self.baseline_item is None else self.baseline_item.entries)]

    def failure(self) -> CompressError | None:
        """Return its error or that of a stage before it, or None."""
        return self.error or (self.previous.failure() if self.previous is not None else None)


@dataclass(eq=False)
class DagJob:
    """A job with its work items. Other jobs may share its ``stages``."""

    job: Job
    stages: list[WorkItem] = field(default_factory=list)
    baseline_evaluation: WorkItem | None = None
    evaluation: WorkItem | None = None
    timing: WorkItem | None = None
    """Measurement of times, during which nothing else runs."""

    @property
    def required_items(self) -> list[WorkItem]:
        """Work items that the job needs, in order."""
        return [*self.stages, *filter(None, (self.evaluation, self.timing))]

    @property
    def all_items(self) -> list[WorkItem]:
        """Required work items, and the evaluation of the baseline."""
        return [*filter(None, (self.baseline_evaluation,)), *self.required_items]

    @property
    def failure(self) -> CompressError | None:
        """First error of the required work items, or None."""
        return next((error for work in self.required_items if (error := work.failure()) is not None), None)

    @property
    def is_finished(self) -> bool:
        """True if nothing is left to do."""
        return self.failure is not None or all(work.done for work in self.required_items)


WorkItems = dict[tuple[object, ...], WorkItem]
"""Work items by everything that determines their result."""


def build_dag(jobs: Sequence[Job], items: WorkItems) -> list[DagJob]:
    """Return the jobs with their work items. Items that several jobs need are created once and added to ``items``."""
    dag_jobs = []
    for job in jobs:
        dag_job = DagJob(job)
        previous: WorkItem | None = None
        # Two stages with the same name have the same output, so they become one work item.
        name, *names = _names(job.recipe)
        outputs: dict[str, tuple[WorkItem | None, tuple[object, ...]]] = {START: (None, name)}
        for label, name in zip(job.labels(), names, strict=False):
            previous = _shared(items, name, dag_job, label, previous)
            outputs[label] = previous, name
            dag_job.stages.append(previous)
        # Jobs with the same baseline share its evaluation, which runs as soon as the baseline exists.
        if job.evaluate_baseline is not None:
            baseline_stage, baseline_name = outputs[job.recipe.baseline]
            dag_job.baseline_evaluation = _shared(
                items, (*baseline_name, job.evaluate_baseline), dag_job, None, baseline_stage
            )
        if job.evaluate is not None:
            previous = dag_job.evaluation = _shared(items, (*name, job.evaluate), dag_job, None, previous)
            previous.baseline_item = dag_job.baseline_evaluation
        if job.measure is not None:
            dag_job.timing = WorkItem(dag_job, None, previous, job.seconds)
        dag_jobs.append(dag_job)
    return dag_jobs


def _shared(
    items: WorkItems, name: tuple[object, ...], dag_job: DagJob, label: str | None, previous: WorkItem | None
) -> WorkItem:
    item = items.get(name)
    if item is None or item.failure() is not None:
        item = items[name] = WorkItem(dag_job, label, previous)
    item.urgency = max(item.urgency, dag_job.job.seconds)
    return item


def _names(recipe: Recipe) -> list[tuple[object, ...]]:
    """Return a digest of everything that decides the output, for the start and each stage."""
    inputs = recipe.model_dump(
        mode="json",
        include={"task", "model", "module", "module_arguments", "random_weights", "trust_remote_code", "data", "seed"},
    )
    total = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    names: list[tuple[object, ...]] = [(total.hexdigest(),)]
    for stage in recipe.stages:
        # The digest covers all stages so far, since the output depends on each of them.
        total.update(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode())
        names.append((total.copy().hexdigest(),))
    return names
