"""What journeys have in common: a tree of stages, each to be done once, and a look at the end of each journey."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from compress.pipeline.cache import Entry
from compress.plugins.ray.jobs import Job
from compress.recipe.recipe import START, Recipe
from compress.utils.errors import CompressError


@dataclass(eq=False)
class WorkItem:
    """One piece of work: a stage, or with no ``label`` the look at the end of a journey.

    ``before`` is the stage that it follows. ``trip`` is the first journey that needs it; ``urgency`` the seconds of
    the longest one.
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
        """Whether it can begin now."""
        waits = self.baseline_item is not None and not (self.baseline_item.done or self.baseline_item.error)
        return not (self.done or self.error or self.is_running or waits) and (
            self.previous is None or self.previous.done
        )

    @property
    def is_timing(self) -> bool:
        """Whether nothing else may run beside it."""
        return self is self.dag_job.timing

    def inputs(self) -> list[Entry]:
        """The outputs of the stages before it, in their order."""
        if self.previous is None:
            return []
        own = [] if self.previous.entry is None else [self.previous.entry]
        return [*self.previous.inputs(), *own]

    @property
    def is_baseline_evaluation(self) -> bool:
        """Whether it is only for looks to come, and may wait for stages."""
        return self is self.dag_job.baseline_evaluation

    def available_entries(self) -> list[Entry]:
        """Everything of other work that it may have use for."""
        return [*self.inputs(), *(() if self.baseline_item is None else self.baseline_item.entries)]

    def failure(self) -> CompressError | None:
        """What it, or a stage before it, failed by."""
        return self.error or (self.previous.failure() if self.previous is not None else None)


@dataclass(eq=False)
class DagJob:
    """A journey on its way. ``stages`` may be other trips' too."""

    job: Job
    stages: list[WorkItem] = field(default_factory=list)
    baseline_evaluation: WorkItem | None = None
    evaluation: WorkItem | None = None
    timing: WorkItem | None = None
    """Measurement of times, during which nothing else runs."""

    @property
    def required_items(self) -> list[WorkItem]:
        """What has to be done for it, in this order."""
        return [*self.stages, *filter(None, (self.evaluation, self.timing))]

    @property
    def all_items(self) -> list[WorkItem]:
        """The same, and what others need not do then."""
        return [*filter(None, (self.baseline_evaluation,)), *self.required_items]

    @property
    def failure(self) -> CompressError | None:
        """What it failed by."""
        return next((found for work in self.required_items if (found := work.failure()) is not None), None)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or all(work.done for work in self.required_items)


WorkItems = dict[tuple[object, ...], WorkItem]
"""Work items by everything that determines their result."""


def build_dag(jobs: Sequence[Job], items: WorkItems) -> list[DagJob]:
    """The journeys with the work that each needs; what several need is one piece of work, added to ``works``."""
    dag_jobs = []
    for job in jobs:
        dag_job = DagJob(job)
        previous: WorkItem | None = None
        name, *names = _names(job.recipe)
        made: dict[str, tuple[WorkItem | None, tuple[object, ...]]] = {START: (None, name)}
        for label, name in zip(job.labels(), names, strict=False):
            previous = _shared(items, name, dag_job, label, previous)
            made[label] = previous, name
            dag_job.stages.append(previous)
        if job.evaluate_baseline is not None:
            at, named = made[job.recipe.baseline]
            dag_job.baseline_evaluation = _shared(items, (*named, job.evaluate_baseline), dag_job, None, at)
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
    found = items.get(name)
    if found is None or found.failure() is not None:
        found = items[name] = WorkItem(dag_job, label, previous)
    found.urgency = max(found.urgency, dag_job.job.seconds)
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
