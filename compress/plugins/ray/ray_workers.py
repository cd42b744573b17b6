"""Workers on a Ray cluster: each stage is one task that runs once. Outputs also enter this machine's cache."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from compress.pipeline.cache import Cache, Entry
from compress.pipeline.runner import StageRunner
from compress.plugins.ray.cluster import Cluster, ClusterNode
from compress.plugins.ray.jobs import (
    DagJob,
    Job,
    JobContext,
    JobResult,
    Speculation,
    Workers,
    WorkItem,
    WorkItems,
    build_dag,
)
from compress.plugins.ray.task import MissingInputs, TransferredEntry, WorkFailure, WorkResult, execute, unpack
from compress.plugins.ray.upload import Uploader
from compress.utils.errors import CompressError, DeviceError, InputError, StageError, StorageError, first_line
from compress.utils.progress import Progress

_TRIES = 3
"""Lost workers after which a work item counts as failed."""
_STOPS_WITHIN = 10.0
_BESIDE = 1.5
"""Longest speculative job, as a multiple of the time that running work still takes."""


class RayWorkers:
    """`Workers` on a cluster. Jobs share their common stages, and the longest job begins first."""

    def __init__(self, cluster: Cluster, context: JobContext) -> None:
        self.cluster, self.context, self.ray = cluster, context, cluster.ray
        self.cache = Cache(context.artifacts / "cache")
        self._running: dict[Any, tuple[WorkItem, ClusterNode]] = {}
        self._seconds_of_entries: dict[str, float] = {}
        """Seconds of new cache entries that no result has reported yet, by key."""
        self._prefetched: list[DagJob] = []
        self._works: WorkItems = {}
        self._runners: dict[DagJob, StageRunner] = {}
        self._guess: Speculation | None = None
        self._guessed: tuple[int, Sequence[Job]] = -1, ()
        """Jobs that may come next, and the number of results that they were guessed from."""
        self._sending = Uploader(cluster, str(context.artifacts.resolve()))

    @property
    def width(self) -> int:
        """Number of work items that the cluster runs at once."""
        return max(1, sum(node.slots for node in self.cluster.nodes.values()))

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Add jobs that idle machines may run, because they will be requested later."""
        self._prefetched += build_dag(jobs, self._works)

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """Yield the result of each job, in the order of the jobs.

        Args:
            jobs: Jobs to run.
            guess: Returns jobs that may come next, for machines that are idle.

        Raises:
            DeviceError: No worker is left.
            StorageError: The driver's disk is full or cannot be written.
        """
        # Machines may have joined or left since the last call.
        self.cluster.refresh()
        dag_jobs = build_dag(list(jobs), self._works)
        self._guess, self._guessed = guess, (-1, ())
        try:
            for dag_job in dag_jobs:
                while not dag_job.is_finished:
                    self._start_work(dag_jobs)
                    if not self._measure_here(dag_jobs) and not dag_job.is_finished:
                        self._wait()
                yield self._result(dag_job, final=True)
            dag_jobs = []
        finally:
            if dag_jobs:  # it was broken off
                self.cancel()
            unfinished = {*self._prefetched, *(item.dag_job for item, _ in self._running.values())}
            self._works = {
                name: item for name, item in self._works.items() if item.dag_job in unfinished or item.is_guessed
            }
            self._runners = {dag_job: runner for dag_job, runner in self._runners.items() if dag_job in unfinished}
            self._sending.forget_entries()

    def close(self) -> None:
        """Stop running work and leave the cluster."""
        self.cancel()
        self.cluster.close()

    def cancel(self) -> None:
        """Stop running work."""
        for reference in self._running:
            self.ray.cancel(reference, force=True)
        if self._running:
            # Ray ends the processes in the background. Wait, so that no later timing is disturbed.
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=_STOPS_WITHIN)
        for item, node in self._running.values():
            item.is_running, node.busy = False, node.busy - 1
        self._running.clear()

    # What begins

    def _start_work(self, dag_jobs: Sequence[DagJob]) -> None:
        """Give every free machine the most urgent work, and optional work last."""
        while ready := self._ready_items(dag_jobs) or self._optional_items(dag_jobs):
            is_started = False
            for item in ready:
                node = None if item.label and item.key in self._running_keys() else self._node_for(item)
                if node is not None:
                    self._submit(item, node, ())
                    is_started = True
            if not is_started:
                return

    def _optional_items(self, dag_jobs: Sequence[DagJob]) -> list[WorkItem]:
        """Return work that no job waits for yet.

        This is prefetched work, or speculative work that ends at about the same time as the running work.
        """
        if any(dag_job.timing is not None and not dag_job.is_finished for dag_job in dag_jobs) or not any(
            node.busy < node.slots for node in self.cluster.nodes.values()
        ):
            return []
        if prefetched := self._ready_items(self._prefetched):
            return prefetched
        if self._guess is None or sum(not dag_job.is_finished for dag_job in dag_jobs) >= self.width:
            return []  # the inputs that jobs wait for may be complete in a moment
        now = time.perf_counter()
        remaining_seconds = max((item.urgency - (now - item.began) for item, _ in self._running.values()), default=0.0)
        results = {
            index: self._result(dag_job, final=False) for index, dag_job in enumerate(dag_jobs) if dag_job.is_finished
        }
        # Ask the search again when more results are known.
        if len(results) != self._guessed[0]:
            self._guessed = len(results), self._guess(results)
        jobs = [job for job in self._guessed[1] if job.seconds <= _BESIDE * remaining_seconds]
        guessed = build_dag(jobs, self._works)
        for item in (item for dag_job in guessed for item in dag_job.all_items):
            item.is_guessed = True
        return self._ready_items(guessed)

    def _ready_items(self, dag_jobs: Sequence[DagJob]) -> list[WorkItem]:
        """Return the work that can begin, the most urgent first. Stages whose outputs are cached are left out."""
        while True:
            items = (item for dag_job in dag_jobs if not dag_job.failure for item in dag_job.all_items)
            items_once = dict.fromkeys(item for item in items if item.is_ready)
            ready = [item for item in items_once if not item.is_timing or self._has_timing_worker()]
            for item in ready:
                self._look_up(item)
            # A cached output makes the stages after it ready, so look again until nothing changes.
            if not any(item.done or item.error for item in ready):
                running_keys = self._running_keys()
                ready = [item for item in ready if item.label is None or item.key not in running_keys]
                return sorted(ready, key=lambda item: (item.is_timing, item.is_baseline_evaluation, -item.urgency))

    def _look_up(self, item: WorkItem) -> None:
        """Compute the key of a stage, and take its output from the cache if it is there."""
        if item.label is None or item.is_looked_up:
            return
        try:
            item.key = item.key or self._runner(item.dag_job).stage_key(item.label)
        except CompressError as error:
            item.error = error
            return
        if item.key not in self._running_keys():
            item.is_looked_up, item.entry = True, self.cache.find(item.key, self.cluster.progress.note)
            item.done = item.entry is not None

    def _running_keys(self) -> set[str]:
        """Return the keys of the stages that run now, so that no stage with the same output runs twice."""
        return {item.key for item, _ in self._running.values() if item.key is not None}

    def _node_for(self, item: WorkItem) -> ClusterNode | None:
        """Return the free machine that already has most of the item's inputs.

        Machines that were lost while they ran the item come last.
        """
        nodes = list(self.cluster.nodes.values())
        if item.is_timing:
            # Other nodes on the same machine must be idle too.
            busy = {node.machine.host for node in nodes if node.busy}
            return next((node for node in nodes if node.has_target and node.machine.host not in busy), None)
        # Work on the same host would disturb a timing, so such hosts get nothing else.
        timing = {node.machine.host for other, node in self._running.values() if other.is_timing}
        free = [node for node in nodes if node.busy < node.slots and node.machine.host not in timing]
        if item.label is None:
            free = [node for node in free if self.cluster.can_evaluate(node)]
        inputs = item.available_entries()

        def merit(node: ClusterNode) -> tuple[bool, int, float]:
            held_bytes = sum(entry.size_bytes for entry in inputs if entry.key in node.holds)
            return node.id not in item.lost_on, held_bytes, -node.busy / node.slots

        return max(free, key=merit, default=None)

    def _submit(self, item: WorkItem, node: ClusterNode, missing: Iterable[str]) -> None:
        order = self._sending.order(item, self._runner(item.dag_job))
        references = self._sending.references(item, order, missing)
        # A timing needs the whole machine, which `_node_for` has checked. Ray must not wait for free processors.
        processors = 0 if item.is_timing else self.cluster.threads
        reference = self.cluster.remote(execute, node.id, processors).remote(order, references)
        item.is_running, item.began = True, time.perf_counter()
        node.busy += 1
        self._running[reference] = item, node

    def _runner(self, dag_job: DagJob) -> StageRunner:
        """Return the driver's own runner of a job, with the stages that are finished.

        Raises the errors of the recipe's sources.
        """
        runner = self._runners.get(dag_job)
        if runner is None:
            runner = self._runners[dag_job] = self.context.runner(dag_job.job.recipe)
        for item in dag_job.stages:
            if item.entry is not None and item.label is not None and item.label not in runner.results:
                runner.use_cached(item.label, item.entry)
        return runner

    # Taking times

    def _has_timing_worker(self) -> bool:
        return any(node.has_target for node in self.cluster.nodes.values())

    def _measure_here(self, dag_jobs: Sequence[DagJob]) -> bool:
        """Time one job's models on this machine if one is ready and nothing runs here. Return True if it did."""
        timings = (dag_job.timing for dag_job in dag_jobs if dag_job.timing is not None and not dag_job.failure)
        timing = next((item for item in timings if item.is_ready), None)
        busy = any(self.cluster.is_local(node) for _, node in self._running.values())
        if timing is None or busy or self._has_timing_worker():
            return False
        dag_job, began = timing.dag_job, time.perf_counter()
        assert dag_job.job.measure is not None
        try:
            timing.output, timing.done = dag_job.job.measure(self._runner(dag_job)), True
        except StorageError:
            raise
        except CompressError as error:
            timing.error = error
        timing.seconds = time.perf_counter() - began
        return True

    # What ends

    def _wait(self) -> None:
        """Wait for the next work to end, and handle its answer."""
        if not self._running:
            nodes_before = set(self.cluster.nodes)
            self.cluster.refresh()
            self.cluster.check_any()
            if nodes_before == set(self.cluster.nodes):
                raise DeviceError(
                    "No worker can evaluate the models.",
                    expected=f"a machine whose processor is of the kind {self.cluster.here.processor_class}",
                    hint="start a worker on one and continue with --resume; finished stages are kept",
                )
            return
        ended, _ = self.ray.wait(list(self._running), num_returns=1)
        for reference in ended:
            item, node = self._running.pop(reference)
            item.is_running, node.busy = False, node.busy - 1
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ImportError):
                    raise error.as_instanceof_cause() from None
                self._drop(node, f"it cannot import what the recipe needs ({first_line(error.cause)})")
            except self.ray.exceptions.RayError as error:
                # A worker died: somebody else does its work.
                item.tries += 1
                item.lost_on.add(node.id)
                self.cluster.refresh()
                reason = type(error).__name__
                name = item.label or "judging"
                self.cluster.progress.note(f"{name}: worker {node.name} was lost ({reason}); the work is repeated")
                if item.tries == _TRIES:
                    item.error = StageError(
                        f"Stage {name!r}: {_TRIES} workers were lost while running it, the last one by {reason}.",
                        hint="look at the memory of the machines; with more OMP_NUM_THREADS fewer tasks run at once",
                    )
                self.cluster.check_any()
            else:
                self._handle_answer(item, node, answer)

    def _drop(self, node: ClusterNode, why: str) -> None:
        self.cluster.drop(node, why)
        self.cluster.check_any()

    def _handle_answer(
        self, item: WorkItem, node: ClusterNode, answer: MissingInputs | WorkFailure | WorkResult
    ) -> None:
        match answer:
            case MissingInputs():
                # The machine lacks inputs, so send the same order again with them.
                self._submit(item, node, answer.digests)
            case WorkFailure() if answer.storage:
                self._drop(node, f"{answer.what} ({answer.where})")
            case WorkFailure():
                item.error = StageError(answer.what, where=answer.where, expected=answer.expected, hint=answer.hint)
            case WorkResult() if item.label is not None and answer.entries[0].key != item.key:
                # Another key means that the machine computes something else, such as with another package version.
                self._drop(node, "its output files differ from those of this machine")
            case WorkResult():
                entries = [self._receive_entry(sent) for sent in answer.entries]
                node.holds |= {entry.key for entry in (*entries, *item.available_entries())}
                item.seconds, item.output, item.done = answer.seconds, answer.output, True
                if item.label is None:
                    item.entries = tuple(entries)
                else:
                    item.entry = entries[0]
                    self._seconds_of_entries[entries[0].key] = answer.seconds

    def _receive_entry(self, sent: TransferredEntry) -> Entry:
        """Return a worker's entry as an entry of the driver's cache."""
        if sent.content is not None:
            return self.cache.admit(sent.key, sent.record, partial(unpack, sent.content))
        entry = self.cache.find(sent.key)
        if entry is None:
            raise StorageError(f"The cache entry {sent.key[:12]} was removed.", where=str(self.cache.root))
        return entry

    def _result(self, dag_job: DagJob, final: bool) -> JobResult:
        """Return the result of a job. If it is ``final``, later jobs do not count the seconds of its entries again."""
        # The evaluation of a baseline counts for the job that began it.
        baseline = dag_job.baseline_evaluation
        shared = None if baseline is None or baseline.dag_job is not dag_job else baseline
        evaluations = filter(None, (shared, dag_job.evaluation, dag_job.timing))
        keys = [item.entry.key for item in dag_job.stages if item.entry is not None]
        own_seconds = {key: self._seconds_of_entries[key] for key in keys if key in self._seconds_of_entries}
        for key in own_seconds if final else ():
            del self._seconds_of_entries[key]
        seconds = sum(own_seconds.values()) + sum(item.seconds for item in evaluations)
        # The cost of failed work still counts.
        if (error := dag_job.failure) is not None:
            return JobResult(error=error, seconds=seconds)
        stages = []
        for finished in self._runner(dag_job).results.values():
            entry, record = finished.entry, finished.record
            if entry.key in own_seconds:
                times = {name: entry.record[name] for name in ("seconds", "check_seconds")}
                record = record.model_copy(update={"cached": False, **times})
            stages.append(record)
        evaluation, timings = (None if item is None else item.output for item in (dag_job.evaluation, dag_job.timing))
        return JobResult(tuple(stages), evaluation, timings, seconds)


def open_workers(option: str, context: JobContext, target: str, packages: Sequence[str], progress: Progress) -> Workers:
    """Open the workers that `--workers` names: `ray` or `ray:ADDRESS`.

    Args:
        option: Value of `--workers`.
        context: Folders and progress of the search.
        target: Name of the target that is timed.
        packages: Packages that workers must have in the same versions.
        progress: Shows notes on the machines.

    Raises:
        InputError: The value is invalid, or the cluster cannot be used; see `Cluster`.
    """
    kind, _, address = option.partition(":")
    if kind != "ray":
        raise InputError(
            f"There are no workers {option!r}.", where="--workers", expected="ray, ray:HOST:PORT or ray:auto"
        )
    import torch

    return RayWorkers(Cluster(address, target, packages, torch.get_num_threads(), progress), context)
