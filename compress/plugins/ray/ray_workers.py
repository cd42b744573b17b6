"""Journeys on a Ray cluster: one task a stage, each once; what comes of it lies in this machine's cache too."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compress.pipeline.cache import Cache, Entry
from compress.pipeline.runner import StageRunner
from compress.plugins.ray.archive import unpack
from compress.plugins.ray.cluster import Cluster, ClusterNode
from compress.plugins.ray.dag import DagJob, WorkItem, WorkItems, build_dag
from compress.plugins.ray.jobs import Job, JobContext, JobResult, Speculation, Workers
from compress.plugins.ray.task import MissingInputs, TransferredEntry, WorkFailure, WorkResult, execute
from compress.plugins.ray.upload import Uploader
from compress.utils.errors import CompressError, DeviceError, InputError, StageError, StorageError, first_line
from compress.utils.progress import Progress

_TRIES = 3
"""Lost workers after which a work item counts as failed."""
_STOPS_WITHIN = 10.0
_BESIDE = 1.5
"""Longest speculative job, as a multiple of the time that running work still takes."""


class RayWorkers:
    """`Workers` on a cluster. Work that many journeys share is done once; the longest begins first."""

    def __init__(self, cluster: Cluster, context: JobContext) -> None:
        self.cluster, self.context, self.ray = cluster, context, cluster.ray
        self.cache = Cache(context.artifacts / "cache")
        self._running: dict[Any, tuple[WorkItem, ClusterNode]] = {}
        self._seconds_of_entries: dict[str, float] = {}
        """Seconds of new cache entries that no result has reported yet, by key."""
        self._prefetched: list[DagJob] = []
        self._works: WorkItems = {}
        self._runners: dict[DagJob, StageRunner] = {}
        self._speculation = SpeculativeScheduler(None)
        self._sending = Uploader(cluster, str(context.artifacts.resolve()))

    @property
    def width(self) -> int:
        """Pieces of work that the cluster takes at once."""
        return max(1, sum(node.slots for node in self.cluster.nodes.values()))

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """What machines do that would have nothing to do."""
        self._prefetched += build_dag(jobs, self._works)

    def run_all(self, jobs: Iterable[Job], guess: Speculation | None = None) -> Iterator[JobResult]:
        """What comes of each, in their order. Raises `DeviceError` where no worker is left, `StorageError`."""
        self.cluster.refresh()
        dag_jobs = build_dag(list(jobs), self._works)
        self._speculation = SpeculativeScheduler(guess)
        try:
            for dag_job in dag_jobs:
                while not dag_job.is_finished:
                    self._start_work(dag_jobs)
                    if not self._measure_here(dag_jobs) and not dag_job.is_finished:
                        self._wait()
                yield self._result(dag_job, told=True)
            dag_jobs = []
        finally:
            if dag_jobs:  # it was broken off
                self.cancel()
            kept = {*self._prefetched, *(item.dag_job for item, _ in self._running.values())}
            self._works = {name: item for name, item in self._works.items() if item.dag_job in kept or item.is_guessed}
            self._runners = {dag_job: runner for dag_job, runner in self._runners.items() if dag_job in kept}
            self._sending.forget_entries()

    def close(self) -> None:
        """Stop what runs, and leave the cluster."""
        self.cancel()
        self.cluster.close()

    def cancel(self) -> None:
        """Stop what runs."""
        for reference in self._running:
            self.ray.cancel(reference, force=True)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=_STOPS_WITHIN)
        for item, node in self._running.values():
            item.is_running, node.busy = False, node.busy - 1
        self._running.clear()

    # What begins

    def _start_work(self, dag_jobs: Sequence[DagJob]) -> None:
        """Give every machine that is free what is most urgent; what may wait, last."""
        while ready := self._ready_items(dag_jobs) or self._optional_items(dag_jobs):
            if not sum(self._start_item(item) for item in ready):
                return

    def _optional_items(self, dag_jobs: Sequence[DagJob]) -> list[WorkItem]:
        """What nobody waits for yet: sure to be wanted, or guessed to be, if it is done about when the others are."""
        if any(dag_job.timing is not None and not dag_job.is_finished for dag_job in dag_jobs) or not any(
            node.busy < node.slots for node in self.cluster.nodes.values()
        ):
            return []
        if sure := self._ready_items(self._prefetched):
            return sure
        if sum(not dag_job.is_finished for dag_job in dag_jobs) >= self.width:
            return []  # what they wait for now may be done in a moment
        now = time.perf_counter()
        left = max((item.urgency - (now - item.began) for item, _ in self._running.values()), default=0.0)
        arrived = {
            place: self._result(dag_job, told=False) for place, dag_job in enumerate(dag_jobs) if dag_job.is_finished
        }
        short = [item for item in self._speculation.jobs(arrived) if item.seconds <= _BESIDE * left]
        guessed = build_dag(short, self._works)
        for item in (item for dag_job in guessed for item in dag_job.all_items):
            item.is_guessed = True
        return self._ready_items(guessed)

    def _ready_items(self, dag_jobs: Sequence[DagJob]) -> list[WorkItem]:
        """Stages and looks that can begin, the most urgent first; of stages those that the cache doesn't have."""
        while True:
            found = {
                id(item): item
                for dag_job in dag_jobs
                if not dag_job.failure
                for item in dag_job.all_items
                if item.is_ready
            }
            ready = [item for item in found.values() if not item.is_timing or self._has_timing_worker()]
            for item in ready:
                self._look_up(item)
            if not any(item.done or item.error for item in ready):
                at_it = self._running_keys()
                ready = [item for item in ready if item.label is None or item.key not in at_it]
                return sorted(ready, key=lambda item: (item.is_timing, item.is_baseline_evaluation, -item.urgency))

    def _look_up(self, item: WorkItem) -> None:
        """Find out a stage's key, and take its output from the cache if it is there."""
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
        """Keys of the stages that run now: what comes to the same is not done twice."""
        return {item.key for item, _ in self._running.values() if item.key is not None}

    def _start_item(self, item: WorkItem) -> bool:
        node = None if item.label is not None and item.key in self._running_keys() else self._node_for(item)
        if node is not None:
            self._submit(item, node, ())
        return node is not None

    def _node_for(self, item: WorkItem) -> ClusterNode | None:
        """A free machine: of those that were not lost at it the one that has most of what it needs."""
        nodes = list(self.cluster.nodes.values())
        if item.is_timing:
            # What runs now on the machine that it is on.
            return next(
                (
                    node
                    for node in nodes
                    if node.has_target
                    and not sum(
                        each.busy for each in self.cluster.nodes.values() if each.machine.host == node.machine.host
                    )
                ),
                None,
            )
        timing = {node.machine.host for other, node in self._running.values() if other.is_timing}
        free = [node for node in nodes if node.busy < node.slots and node.machine.host not in timing]
        if item.label is None:
            free = [node for node in free if self.cluster.can_evaluate(node)]
        before = item.available_entries()

        def merit(node: ClusterNode) -> tuple[bool, int, float]:
            has = sum(entry.size_bytes for entry in before if entry.key in node.holds)
            return node.id not in item.lost_on, has, -node.busy / node.slots

        return max(free, key=merit, default=None)

    def _submit(self, item: WorkItem, node: ClusterNode, missing: Iterable[str]) -> None:
        order = self._sending.order(item, self._runner(item.dag_job))
        references = self._sending.references(item, order, missing)
        processors = 0 if item.is_timing else self.cluster.threads
        reference = self.cluster.remote(execute, node.id, processors).remote(order, references)
        item.is_running, item.began = True, time.perf_counter()
        node.busy += 1
        self._running[reference] = item, node

    def _runner(self, dag_job: DagJob) -> StageRunner:
        """The driver's own runner of a journey, as far as it has come. Raises what the recipe's sources do."""
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
        """Take one journey's times on this machine, if one is ready and nothing runs here; whether that was so."""
        ready = [
            dag_job
            for dag_job in dag_jobs
            if dag_job.timing is not None and dag_job.timing.is_ready and not dag_job.failure
        ]
        busy = any(self.cluster.is_local(node) for _, node in self._running.values())
        if not ready or busy or self._has_timing_worker():
            return False
        dag_job, began = ready[0], time.perf_counter()
        assert dag_job.timing is not None and dag_job.job.measure is not None
        try:
            dag_job.timing.output, dag_job.timing.done = dag_job.job.measure(self._runner(dag_job)), True
        except StorageError:
            raise
        except CompressError as error:
            dag_job.timing.error = error
        dag_job.timing.seconds = time.perf_counter() - began
        return True

    # What ends

    def _wait(self) -> None:
        """Take what ends next."""
        if not self._running:
            known = set(self.cluster.nodes)
            self.cluster.refresh()
            self.cluster.check_any()
            if known == set(self.cluster.nodes):
                raise DeviceError(
                    "No worker can judge what was made.",
                    expected=f"a machine whose processor is of the kind {self.cluster.here.processor_class}",
                    hint="start a worker on one and go on with --resume; finished stages are kept",
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
                self._drop(node, f"it can't load what the recipe needs ({first_line(error.cause)})")
            except self.ray.exceptions.RayError as error:
                # A worker died: somebody else does its work.
                item.tries += 1
                item.lost_on.add(node.id)
                self.cluster.refresh()
                why = type(error).__name__
                what = item.label or "judging"
                self.cluster.progress.note(f"{what}: worker {node.name} was lost ({why}); it is done again")
                if item.tries == _TRIES:
                    item.error = StageError(
                        f"Stage {what!r}: {_TRIES} workers were lost at it, the last one by {why}.",
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
                self._submit(item, node, answer.digests)
            case WorkFailure() if answer.storage:
                self._drop(node, f"{answer.what} ({answer.where})")
            case WorkFailure():
                item.error = StageError(answer.what, where=answer.where, expected=answer.expected, hint=answer.hint)
            case WorkResult() if item.label is not None and answer.entries[0].key != item.key:
                self._drop(node, "it makes other files than this machine would")
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
        """A worker's entry in the driver's cache."""
        if sent.content is not None:
            content = sent.content
            return self.cache.admit(sent.key, sent.record, lambda files: unpack(content, files))
        found = self.cache.find(sent.key)
        if found is None:
            raise StorageError(f"The cache entry {sent.key[:12]} has gone.", where=str(self.cache.root))
        return found

    def _result(self, dag_job: DagJob, told: bool) -> JobResult:
        """What came of a journey; once it is ``told``, the work is no other's any more."""
        early = (
            dag_job.baseline_evaluation
            if dag_job.baseline_evaluation is not None and dag_job.baseline_evaluation.dag_job is dag_job
            else None
        )
        looks = [item for item in (early, dag_job.evaluation, dag_job.timing) if item is not None]
        keys = [item.entry.key for item in dag_job.stages if item.entry is not None]
        own = {key: self._seconds_of_entries[key] for key in keys if key in self._seconds_of_entries}
        if told:
            self._seconds_of_entries = {
                key: seconds for key, seconds in self._seconds_of_entries.items() if key not in own
            }
        seconds = sum(own.values()) + sum(item.seconds for item in looks)
        if (error := dag_job.failure) is not None:
            return JobResult(error=error, seconds=seconds)
        stages = []
        for finished in self._runner(dag_job).results.values():
            entry, record = finished.entry, finished.record
            if entry.key in own:
                times = {name: entry.record[name] for name in ("seconds", "check_seconds")}
                record = record.model_copy(update={"cached": False, **times})
            stages.append(record)
        found, timed = (None if item is None else item.output for item in (dag_job.evaluation, dag_job.timing))
        return JobResult(tuple(stages), found, timed, seconds)


class SpeculativeScheduler:
    """What a search may ask for next; asked again once more is known."""

    def __init__(self, guess: Speculation | None) -> None:
        self._speculation = guess
        self._last: tuple[int, Sequence[Job]] = -1, ()

    def jobs(self, arrived: Mapping[int, JobResult]) -> Sequence[Job]:
        """Those that it says by what has arrived."""
        if self._speculation is None:
            return ()
        if len(arrived) != self._last[0]:
            self._last = len(arrived), self._speculation(arrived)
        return self._last[1]


def open_workers(told: str, context: JobContext, target: str, packages: Sequence[str], progress: Progress) -> Workers:
    """What `--workers` names: `ray`, or `ray:ADDRESS`. Raises as `Cluster`."""
    kind, _, address = told.partition(":")
    if kind != "ray":
        raise InputError(
            f"There are no workers {told!r}.", where="--workers", expected="ray, ray:HOST:PORT or ray:auto"
        )
    import torch

    return RayWorkers(Cluster(address, target, packages, torch.get_num_threads(), progress), context)
