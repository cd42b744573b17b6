"""The measured process: opens one artifact, times it when told to, and answers in JSON, one line a message.

Nothing is imported beyond the standard library, numpy and the runtime, so that memory and start-up are the
model's own. Messages, each answered by one line, or by ``{"error": {...}}``:

    {"do": "open", "artifact", "target": {...}, "threads", "cores", "batches", "code": {...}}
                                                                                 load a model and a first batch
    {"do": "load", "batches"}                                                    all batches, in place of the first
    {"do": "round", "calls": [i, ...], "untimed": n}  one timed call for each batch
                                           -> {"latencies_ms", "disturbed", "cpu_ms", "energy_mj"}
    {"do": "arrivals", "calls", "gaps_ms"} -> {"latencies_ms"}                   calls that come when they come
    {"do": "generate", "ids": [...], "tokens": n, "untimed": m}  a prompt, then n tokens one by one
                                           -> {"first_ms", "steps_ms", "disturbed", "tokens", "cached", "vocabulary"}
    {"do": "draw", "call": i, "steps": n, "size": s, "untimed": m}  a picture of s pixels a side in n steps; or null
                                           -> {"picture_ms", "text_ms", "steps_ms", "decoder_ms", "disturbed"}
    {"do": "reference", "cores"}           -> {"matmul_ms", "copy_ms"}           fixed work, without a model
    {"do": "pulse", "cores"}               -> {"pulse_ms"}                       less of it, on each of the cores
    {"do": "memory"}                       -> {"peak_bytes", "cpu_seconds"}
    {"do": "quit"}

A session that `TimesItself` has its model in another process, which is given the batches and times the calls itself.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from compress.benchmark.energy import EnergyMeter, find_meter
from compress.benchmark.reference_timing import ReferenceKernels
from compress.benchmark.rpc import Reply, serve
from compress.benchmark.workloads.image_sampling import draw, elsewhere, load_loop, preemptions, start_up_of
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target
from compress.models.remote_code import allow
from compress.runtimes.decoder import GreedyDecoder, WritesItself, open_decoder
from compress.runtimes.runtime import Batch, Session, TimesItself
from compress.utils.errors import StageError


def read_batches(path: Path) -> list[Batch]:
    """Batches from an `.npz` whose entries are named ``index/input``."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as entries:
        for key in entries.files:
            index, name = key.split("/", 1)
            batches.setdefault(int(index), {})[name] = entries[key]
    return [batches[index] for index in range(len(batches))]


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """What `read_batches` reads."""
    entries = {f"{i}/{name}": array for i, batch in enumerate(batches) for name, array in batch.items()}
    np.savez(path, allow_pickle=False, **entries)


class Answering(Protocol):
    """Whatever answers a batch."""

    def predict(self, batch: Batch) -> object:
        """The answer, which is not looked at."""


def peak_bytes() -> int:
    """Peak resident memory of this process since it began."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # On Linux this would count the parent's memory at the fork; macOS gives bytes and starts anew.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(session: Answering, batches: Sequence[Batch], calls: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Milliseconds of one call for each entry of ``calls``, and whether the system took the processor away in it.

    Of a session that times itself the latter isn't known, and no call is marked.
    """
    if isinstance(session, TimesItself):
        return session.time(calls), [False] * len(calls)
    clock = time.perf_counter_ns
    nanoseconds, disturbed = [], []
    for index in calls:
        batch = batches[index]
        switches = preemptions()
        start = clock()
        session.predict(batch)
        nanoseconds.append(clock() - start)
        disturbed.append(preemptions() != switches)
    return [value / 1e6 for value in nanoseconds], disturbed


def arrivals(session: Session, batches: Sequence[Batch], calls: Sequence[int], gaps_ms: Sequence[float]) -> list[float]:
    """Milliseconds from each arrival to its answer, of requests that wait for those before them.

    Arrivals don't wait for answers (an open system: Schroeder et al. 2006, "Open versus closed"), so that
    time spent in the queue counts.
    """
    if isinstance(session, TimesItself):
        return session.arrivals(calls, gaps_ms)
    clock = time.perf_counter_ns
    due = clock()
    nanoseconds = []
    for index, gap_ms in zip(calls, gaps_ms, strict=True):
        due += int(gap_ms * 1e6)
        wait = (due - clock()) / 1e9
        if wait > 0:
            time.sleep(wait)
        session.predict(batches[index])
        nanoseconds.append(clock() - due)
    return [value / 1e6 for value in nanoseconds]


def generate(decoder: GreedyDecoder, ids: Sequence[int], tokens: int) -> Reply:
    """Milliseconds from a prompt to the token after it, and of each of ``tokens`` that follow; see `Generation`.

    If the decoder generates the whole text itself, each token has the mean time, and interruptions are not counted.
    """
    if isinstance(decoder, WritesItself):
        found, first_ms, all_ms = decoder.write(ids, tokens + 1)
        steps_ms = [(all_ms - first_ms) / max(tokens, 1)] * tokens
        return {"first_ms": first_ms, "steps_ms": steps_ms, "disturbed": [False] * (tokens + 1), "tokens": found}
    clock = time.perf_counter_ns
    found = []
    nanoseconds, disturbed = [], []
    for place in range(tokens + 1):
        switches = preemptions()
        start = clock()
        token = decoder.step(found[-1]) if place else decoder.prefill(ids)
        nanoseconds.append(clock() - start)
        disturbed.append(preemptions() != switches)
        found.append(token)
    first_ms, *steps_ms = (value / 1e6 for value in nanoseconds)
    return {"first_ms": first_ms, "steps_ms": steps_ms, "disturbed": disturbed, "tokens": found}


class Worker:
    """The model that was opened and its batches."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._artifact = ""
        self._decoder: GreedyDecoder | None = None
        self._batches: list[Batch] = []
        self._meter: EnergyMeter | None = None
        self._kernels: ReferenceKernels | None = None

    def open(self, message: Reply) -> Reply:
        """Load the artifact; ``before_bytes`` is the peak of the runtime alone, before the model came.

        ``start_up`` is what else a session that times itself has to tell of its start.
        """
        _pin(message["cores"])
        target = Target(**message["target"])
        for reference, folder in message.get("code", {}).items():
            allow(reference, Path(folder))
        runtime = get_runtime(target.runtime)
        self._batches = read_batches(Path(message["batches"]))
        self._artifact = message["artifact"]
        load_loop(Path(self._artifact))
        before = peak_bytes()
        start = time.perf_counter_ns()
        self._session = runtime.open(Path(self._artifact), target, message["threads"])
        load_ms = (time.perf_counter_ns() - start) / 1e6
        reply = {"session_load_ms": load_ms, "before_bytes": before, "start_up": {}}
        others = elsewhere(self._session)
        if others:
            reply = {
                "session_load_ms": sum(one.session_load_ms for one in others),
                "before_bytes": sum(one.runtime_bytes for one in others),
                "start_up": start_up_of(others),
            }
        if isinstance(self._session, TimesItself):
            self._session.hold(self._batches)
        return {**reply, "settings": self._session.settings}

    def load(self, message: Reply) -> Reply:
        """Take another set of batches, and get ready for timing."""
        self._batches = read_batches(Path(message["batches"]))
        if isinstance(self._session, TimesItself):
            self._session.hold(self._batches)
        meter = find_meter()
        self._meter = meter if isinstance(meter, EnergyMeter) else None
        # A collection in the middle of a timed call would be taken for the model's own time.
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"no_energy": meter if isinstance(meter, str) else None}

    def round(self, message: Reply) -> Reply:
        """Time one call for each batch that is named.

        The first ``untimed`` of them are run once before, since another process has just used the caches.
        """
        session = self._opened()
        if message["untimed"]:
            timed(session, self._batches, message["calls"][: message["untimed"]])
        energy = self._meter.read() if self._meter else ()
        processor = self._processor_seconds()
        latencies, disturbed = timed(session, self._batches, message["calls"])
        cpu_ms = 1e3 * (self._processor_seconds() - processor)
        used = self._meter.between_mj(energy, self._meter.read()) if self._meter else None
        return {"latencies_ms": latencies, "disturbed": disturbed, "cpu_ms": cpu_ms, "energy_mj": used}

    def arrivals(self, message: Reply) -> Reply:
        """Answer calls that arrive after the given gaps."""
        return {"latencies_ms": arrivals(self._opened(), self._batches, message["calls"], message["gaps_ms"])}

    def generate(self, message: Reply) -> Reply:
        """Time one generation, after as many steps that aren't timed, since another process has used the caches."""
        if isinstance(self._opened(), TimesItself):
            raise StageError(
                f"Text generation isn't timed on {self._opened().settings['runtime']}.",
                expected="a runtime in this process, since keys and values pass at each token",
                where="benchmark",
                hint="time it on the target cpu",
            )
        if self._decoder is None:
            self._decoder = open_decoder(self._opened(), self._artifact)
        if message["untimed"]:
            generate(self._decoder, message["ids"][:1], message["untimed"])
        reply = generate(self._decoder, message["ids"], message["tokens"])
        return {**reply, "cached": self._decoder.cached, "vocabulary": self._decoder.vocabulary}

    def draw(self, message: Reply) -> Reply:
        """Time a picture of a batch of one prompt."""
        how = (message[name] for name in ("steps", "size", "untimed"))
        return draw(self._opened(), self._batches[message["call"]], *how)

    def reference(self, message: Reply) -> Reply:
        """Time the reference kernels."""
        _pin(message["cores"])
        return self._reference_kernels().time()._asdict()

    def pulse(self, message: Reply) -> Reply:
        """Time the small product on each of the cores, where processes can be bound to cores; the longest counts."""
        found = []
        for cores in [[core] for core in message["cores"]] or [[]]:
            _pin(cores)
            found.append(self._reference_kernels().pulse_ms())
        return {"pulse_ms": max(found)}

    def _reference_kernels(self) -> ReferenceKernels:
        if self._kernels is None:
            self._kernels = ReferenceKernels()
        return self._kernels

    def memory(self, message: Reply) -> Reply:
        """Peak memory of the process with the model, and all processor time so far."""
        others = elsewhere(self._session)
        peak = sum(one.peak_bytes() for one in others) if others else peak_bytes()
        own = time.process_time() if others else 0.0
        return {"peak_bytes": peak, "cpu_seconds": own + self._processor_seconds()}

    def _processor_seconds(self) -> float:
        """Of the process that the model runs in."""
        others = elsewhere(self._session)
        return sum(one.cpu_seconds() for one in others) if others else time.process_time()

    def _opened(self) -> Session:
        assert self._session is not None, "open comes first"
        return self._session


def _pin(cores: Sequence[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def main() -> None:
    """Serve the messages named above."""
    serve(Worker())


if __name__ == "__main__":
    main()
