"""Journeys on a Ray cluster: one task a stage, each once; what comes of it lies in this machine's cache too."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compress.pipeline.cache import Cache, Entry
from compress.pipeline.runner import StageRunner
from compress.plugins.ray.archive import unpack
from compress.plugins.ray.cluster import Cluster, Node
from compress.plugins.ray.dag import Trip, Work, Works, tree
from compress.plugins.ray.jobs import Arrival, Guess, Journey, Roads, Workers
from compress.plugins.ray.task import Lacking, Made, Refused, Sent, work
from compress.plugins.ray.upload import Sending
from compress.utils.errors import CompressError, DeviceError, InputError, StageError, StorageError, first_line
from compress.utils.progress import Progress

_TRIES = 3
"""Workers that may be lost at one piece of work before it counts as what ended them."""
_STOPS_WITHIN = 10.0
_BESIDE = 1.5
"""Of what is under way, how much longer a guess may take."""


class RayWorkers:
    """`Workers` on a cluster. Work that many journeys share is done once; the longest begins first."""

    def __init__(self, cluster: Cluster, roads: Roads) -> None:
        self.cluster, self.roads, self.ray = cluster, roads, cluster.ray
        self.cache = Cache(roads.artifacts / "cache")
        self._running: dict[Any, tuple[Work, Node]] = {}
        self._made: dict[str, float] = {}
        """Seconds of entries that were made here and that no arrival has told of, by key."""
        self._ahead: list[Trip] = []
        self._works: Works = {}
        self._roads: dict[Trip, StageRunner] = {}
        self._guess = Guessing(None)
        self._sending = Sending(cluster, str(roads.artifacts.resolve()))

    @property
    def width(self) -> int:
        """Pieces of work that the cluster takes at once."""
        return max(1, sum(node.places for node in self.cluster.nodes.values()))

    def ahead(self, journeys: Sequence[Journey]) -> None:
        """What machines do that would have nothing to do."""
        self._ahead += tree(journeys, self._works)

    def together(self, journeys: Iterable[Journey], guess: Guess | None = None) -> Iterator[Arrival]:
        """What comes of each, in their order. Raises `DeviceError` where no worker is left, `StorageError`."""
        self.cluster.refresh()
        trips = tree(list(journeys), self._works)
        self._guess = Guessing(guess)
        try:
            for trip in trips:
                while not trip.has_arrived:
                    self._begin(trips)
                    if not self._time_here(trips) and not trip.has_arrived:
                        self._wait()
                yield self._arrival(trip, told=True)
            trips = []
        finally:
            if trips:  # it was broken off
                self.rest()
            kept = {*self._ahead, *(one.trip for one, _ in self._running.values())}
            self._works = {name: one for name, one in self._works.items() if one.trip in kept or one.is_guessed}
            self._roads = {trip: runner for trip, runner in self._roads.items() if trip in kept}
            self._sending.forget_entries()

    def close(self) -> None:
        """Stop what runs, and leave the cluster."""
        self.rest()
        self.cluster.close()

    def rest(self) -> None:
        """Stop what runs."""
        for reference in self._running:
            self.ray.cancel(reference, force=True)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=_STOPS_WITHIN)
        for one, node in self._running.values():
            one.under_way, node.busy = False, node.busy - 1
        self._running.clear()

    # What begins

    def _begin(self, trips: Sequence[Trip]) -> None:
        """Give every machine that is free what is most urgent; what may wait, last."""
        while ready := self._ready(trips) or self._later(trips):
            if not sum(self._begun(one) for one in ready):
                return

    def _later(self, trips: Sequence[Trip]) -> list[Work]:
        """What nobody waits for yet: sure to be wanted, or guessed to be, if it is done about when the others are."""
        if any(trip.timed is not None and not trip.has_arrived for trip in trips) or not self._has_place():
            return []
        if sure := self._ready(self._ahead):
            return sure
        if sum(not trip.has_arrived for trip in trips) >= self.width:
            return []  # what they wait for now may be done in a moment
        now = time.perf_counter()
        left = max((one.urgency - (now - one.began) for one, _ in self._running.values()), default=0.0)
        arrived = {place: self._arrival(trip, told=False) for place, trip in enumerate(trips) if trip.has_arrived}
        short = [one for one in self._guess.journeys(arrived) if one.seconds <= _BESIDE * left]
        guessed = tree(short, self._works)
        for one in (one for trip in guessed for one in trip.works):
            one.is_guessed = True
        return self._ready(guessed)

    def _has_place(self) -> bool:
        return any(node.busy < node.places for node in self.cluster.nodes.values())

    def _ready(self, trips: Sequence[Trip]) -> list[Work]:
        """Stages and looks that can begin, the most urgent first; of stages those that the cache doesn't have."""
        while True:
            found = {id(one): one for trip in trips if not trip.failure for one in trip.works if one.is_ready}
            ready = [one for one in found.values() if not one.is_timing or self._times_elsewhere()]
            for one in ready:
                self._look_up(one)
            if not any(one.done or one.error for one in ready):
                at_it = self._at_it()
                ready = [one for one in ready if one.label is None or one.key not in at_it]
                return sorted(ready, key=lambda one: (one.is_timing, one.is_early, -one.urgency))

    def _look_up(self, one: Work) -> None:
        """Find out a stage's key, and take its output from the cache if it is there."""
        if one.label is None or one.looked_up:
            return
        try:
            one.key = one.key or self._road(one.trip).stage_key(one.label)
        except CompressError as error:
            one.error = error
            return
        if one.key not in self._at_it():
            one.looked_up, one.entry = True, self.cache.find(one.key, self.cluster.progress.note)
            one.done = one.entry is not None

    def _at_it(self) -> set[str]:
        """Keys of the stages that run now: what comes to the same is not done twice."""
        return {one.key for one, _ in self._running.values() if one.key is not None}

    def _begun(self, one: Work) -> bool:
        node = None if one.label is not None and one.key in self._at_it() else self._node_for(one)
        if node is not None:
            self._submit(one, node, ())
        return node is not None

    def _node_for(self, one: Work) -> Node | None:
        """A free machine: of those that were not lost at it the one that has most of what it needs."""
        nodes = list(self.cluster.nodes.values())
        if one.is_timing:
            return next((node for node in nodes if node.has_target and not self._load(node)), None)
        timing = {node.facts.host for other, node in self._running.values() if other.is_timing}
        free = [node for node in nodes if node.busy < node.places and node.facts.host not in timing]
        if one.label is None:
            free = [node for node in free if self.cluster.judges(node)]
        before = one.reads()

        def merit(node: Node) -> tuple[bool, int, float]:
            has = sum(entry.size_bytes for entry in before if entry.key in node.holds)
            return node.id not in one.avoided, has, -node.busy / node.places

        return max(free, key=merit, default=None)

    def _submit(self, one: Work, node: Node, lacking: Iterable[str]) -> None:
        order = self._sending.order(one, self._road(one.trip))
        parcels = self._sending.parcels(one, order, lacking)
        processors = 0 if one.is_timing else self.cluster.threads
        reference = self.cluster.remote(work, node.id, processors).remote(order, parcels)
        one.under_way, one.began = True, time.perf_counter()
        node.busy += 1
        self._running[reference] = one, node

    def _road(self, trip: Trip) -> StageRunner:
        """The driver's own runner of a journey, as far as it has come. Raises what the recipe's sources do."""
        runner = self._roads.get(trip)
        if runner is None:
            runner = self._roads[trip] = self.roads.road(trip.journey.recipe)
        for one in trip.stages:
            if one.entry is not None and one.label is not None and one.label not in runner.results:
                runner.use_cached(one.label, one.entry)
        return runner

    # Taking times

    def _times_elsewhere(self) -> bool:
        return any(node.has_target for node in self.cluster.nodes.values())

    def _load(self, node: Node) -> int:
        """What runs now on the machine that it is on."""
        return sum(each.busy for each in self.cluster.nodes.values() if each.facts.host == node.facts.host)

    def _time_here(self, trips: Sequence[Trip]) -> bool:
        """Take one journey's times on this machine, if one is ready and nothing runs here; whether that was so."""
        ready = [trip for trip in trips if trip.timed is not None and trip.timed.is_ready and not trip.failure]
        busy = any(self.cluster.is_here(node) for _, node in self._running.values())
        if not ready or busy or self._times_elsewhere():
            return False
        trip, began = ready[0], time.perf_counter()
        assert trip.timed is not None and trip.journey.alone is not None
        try:
            trip.timed.found, trip.timed.done = trip.journey.alone(self._road(trip)), True
        except StorageError:
            raise
        except CompressError as error:
            trip.timed.error = error
        trip.timed.seconds = time.perf_counter() - began
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
            one, node = self._running.pop(reference)
            one.under_way, node.busy = False, node.busy - 1
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ImportError):
                    raise error.as_instanceof_cause() from None
                self._drop(node, f"it can't load what the recipe needs ({first_line(error.cause)})")
            except self.ray.exceptions.RayError as error:
                self._lost(one, node, error)
            else:
                self._answered(one, node, answer)

    def _drop(self, node: Node, why: str) -> None:
        self.cluster.drop(node, why)
        self.cluster.check_any()

    def _answered(self, one: Work, node: Node, answer: Lacking | Refused | Made) -> None:
        match answer:
            case Lacking():
                self._submit(one, node, answer.digests)
            case Refused() if answer.storage:
                self._drop(node, f"{answer.what} ({answer.where})")
            case Refused():
                one.error = StageError(answer.what, where=answer.where, expected=answer.expected, hint=answer.hint)
            case Made() if one.label is not None and answer.entries[0].key != one.key:
                self._drop(node, "it makes other files than this machine would")
            case Made():
                entries = [self._received(sent) for sent in answer.entries]
                node.holds |= {entry.key for entry in (*entries, *one.reads())}
                one.seconds, one.found, one.done = answer.seconds, answer.found, True
                if one.label is None:
                    one.entries = tuple(entries)
                else:
                    one.entry = entries[0]
                    self._made[entries[0].key] = answer.seconds

    def _received(self, sent: Sent) -> Entry:
        """A worker's entry in the driver's cache."""
        if sent.content is not None:
            content = sent.content
            return self.cache.admit(sent.key, sent.record, lambda files: unpack(content, files))
        found = self.cache.find(sent.key)
        if found is None:
            raise StorageError(f"The cache entry {sent.key[:12]} has gone.", where=str(self.cache.root))
        return found

    def _lost(self, one: Work, node: Node, error: Exception) -> None:
        """A worker died: somebody else does its work."""
        one.tries += 1
        one.avoided.add(node.id)
        self.cluster.refresh()
        why = type(error).__name__
        what = one.label or "judging"
        self.cluster.progress.note(f"{what}: worker {node.name} was lost ({why}); it is done again")
        if one.tries == _TRIES:
            one.error = StageError(
                f"Stage {what!r}: {_TRIES} workers were lost at it, the last one by {why}.",
                hint="look at the memory of the machines; fewer pieces of work run at once with more OMP_NUM_THREADS",
            )
        self.cluster.check_any()

    def _arrival(self, trip: Trip, told: bool) -> Arrival:
        """What came of a journey; once it is ``told``, the work is no other's any more."""
        early = trip.early if trip.early is not None and trip.early.trip is trip else None
        looks = [one for one in (early, trip.look, trip.timed) if one is not None]
        keys = [one.entry.key for one in trip.stages if one.entry is not None]
        own = {key: self._made[key] for key in keys if key in self._made}
        if told:
            self._made = {key: seconds for key, seconds in self._made.items() if key not in own}
        seconds = sum(own.values()) + sum(one.seconds for one in looks)
        if (error := trip.failure) is not None:
            return Arrival(error=error, seconds=seconds)
        stages = []
        for finished in self._road(trip).results.values():
            entry, record = finished.entry, finished.record
            if entry.key in own:
                times = {name: entry.record[name] for name in ("seconds", "check_seconds")}
                record = record.model_copy(update={"cached": False, **times})
            stages.append(record)
        found, timed = (None if one is None else one.found for one in (trip.look, trip.timed))
        return Arrival(tuple(stages), found, timed, seconds)


class Guessing:
    """What a search may ask for next; asked again once more is known."""

    def __init__(self, guess: Guess | None) -> None:
        self._guess = guess
        self._known: tuple[int, Sequence[Journey]] = -1, ()

    def journeys(self, arrived: Mapping[int, Arrival]) -> Sequence[Journey]:
        """Those that it says by what has arrived."""
        if self._guess is None:
            return ()
        if len(arrived) != self._known[0]:
            self._known = len(arrived), self._guess(arrived)
        return self._known[1]


def open_workers(told: str, roads: Roads, target: str, packages: Sequence[str], progress: Progress) -> Workers:
    """What `--workers` names: `ray`, or `ray:ADDRESS`. Raises as `Cluster`."""
    kind, _, address = told.partition(":")
    if kind != "ray":
        raise InputError(
            f"There are no workers {told!r}.", where="--workers", expected="ray, ray:HOST:PORT or ray:auto"
        )
    import torch

    return RayWorkers(Cluster(address, target, packages, torch.get_num_threads(), progress), roads)
