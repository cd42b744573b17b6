"""Worker process of the benchmark: opens one model, times it on request, and answers in JSON, one line a message.

It imports only the standard library, numpy and the runtime, so that memory and start-up are the model's own.
Messages, each answered by one line, or by ``{"error": {...}}``:

    {"do": "open", "artifact", "target": {...}, "threads", "cores", "batches", "code": {...}}
        Load a model and a first batch.
    {"do": "load", "batches"}
        Load all batches, which replace the first.
    {"do": "round", "calls": [i, ...], "untimed": n}
        Time one call for each batch -> {"latencies_ms", "disturbed", "cpu_ms", "energy_mj"}
    {"do": "serve_requests", "calls", "gaps_ms"}
        Answer calls that arrive after gaps -> {"latencies_ms"}
    {"do": "generate", "ids": [...], "tokens": n, "untimed": m}
        Read a prompt, then generate n tokens one by one
        -> {"first_ms", "steps_ms", "disturbed", "tokens", "cached", "vocabulary"}
    {"do": "generate_image", "call": i, "steps": n, "size": s, "untimed": m}
        Generate an image of s pixels a side in n steps; null stands for the model's own numbers
        -> {"image_ms", "text_ms", "steps_ms", "decoder_ms", "disturbed"}
    {"do": "reference", "cores"}
        Time the reference kernels, without a model -> {"matmul_ms", "copy_ms"}
    {"do": "time_small_product", "cores"}
        Time a small product on each of the cores -> {"product_ms"}
    {"do": "memory"} -> {"peak_bytes", "cpu_seconds"}
    {"do": "quit"}

A session that `TimesItself` has its model in another process, which receives the batches and times the calls itself.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from compress.benchmark.reference_timing import ReferenceKernels
from compress.benchmark.subprocess_client import Reply, serve
from compress.formats.generation.decoder import GreedyDecoder, WritesItself, open_decoder
from compress.formats.runtime import Batch, ComponentSession, Session, TimesItself, get_runtime
from compress.formats.target_profile import Target
from compress.models.config_checks import allow_as
from compress.models.pipeline_folder import image_generation_hook, is_pipeline
from compress.utils.errors import StageError

_MODEL, _TRANSFER = "model_", "transfer_bytes"


def external_sessions(session: object) -> list[TimesItself]:
    """Return the sessions of a model whose graphs run in other processes. A model in this process has none."""
    sessions = session.parts.values() if isinstance(session, ComponentSession) else [session]
    return [part for part in sessions if isinstance(part, TimesItself)]


def combined_start_up(sessions: Sequence[TimesItself]) -> dict[str, float]:
    """Return the start-up times of components as if one process held them all: the runtime once, and each model."""
    first, *others = (session.start_up for session in sessions)
    combined = dict(first)
    for times in others:
        for name in combined:
            combined[name] += times[name] if name.startswith(_MODEL) else 0.0
        if _TRANSFER in combined:
            combined[_TRANSFER] += times[_MODEL + _TRANSFER]
    return combined


def preemptions() -> int:
    """Return how often a thread of this process had to stop for another process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


_ZONES = "sys/class/powercap"


@dataclass(frozen=True)
class EnergyMeter:
    """Counters of all processor packages. The energy is that of the whole package, for all processes."""

    zones: tuple[Path, ...]

    def read(self) -> tuple[int, ...]:
        """Return the microjoules counted by each package so far. Raises `StageError` if a counter has disappeared."""
        try:
            return tuple(int((zone / "energy_uj").read_text()) for zone in self.zones)
        except (OSError, ValueError) as error:
            raise StageError(f"The energy counter can no longer be read: {error}", where="benchmark") from error

    def between_mj(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Return the millijoules between two readings. A counter starts again at 0 past its range."""
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            if last < first:
                last += int((zone / "max_energy_range_uj").read_text())
            total += last - first
        return total / 1000


def find_meter(root: Path = Path("/")) -> EnergyMeter | str:
    """Return the meter of this machine, or why there is none."""
    zones = sorted(path for path in (root / _ZONES).glob("*-rapl:*") if path.name.count(":") == 1)
    if not zones:
        return f"the kernel shows no RAPL counter in /{_ZONES}"
    meter = EnergyMeter(tuple(zones))
    try:
        meter.read()
    except StageError as error:
        return f"the RAPL counter cannot be read ({error.__cause__}); it needs root, or read permission on energy_uj"
    return meter


def read_batches(path: Path) -> list[Batch]:
    """Read batches from an `.npz` whose entries are named ``index/input``."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as entries:
        for key in entries.files:
            index, name = key.split("/", 1)
            batches.setdefault(int(index), {})[name] = entries[key]
    return [batches[index] for index in range(len(batches))]


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write batches for `read_batches`."""
    entries = {f"{i}/{name}": array for i, batch in enumerate(batches) for name, array in batch.items()}
    np.savez(path, allow_pickle=False, **entries)


class Predictor(Protocol):
    """Object that predicts on a batch."""

    def predict(self, batch: Batch) -> object:
        """Predict on a batch. The result is ignored."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process since its start."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # On Linux this would count the parent's memory at the fork; macOS gives bytes and starts anew.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_calls(session: Predictor, batches: Sequence[Batch], calls: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Return the ms of one call for each entry of ``calls``, and whether the system interrupted the process in it.

    For a session that times itself, interruptions are unknown, and no call is marked.
    """
    if isinstance(session, TimesItself):
        return session.time(calls), [False] * len(calls)
    now_ns = time.perf_counter_ns
    nanoseconds, disturbed = [], []
    for index in calls:
        batch = batches[index]
        # The counter of involuntary context switches shows whether the call was interrupted.
        switches = preemptions()
        start = now_ns()
        session.predict(batch)
        nanoseconds.append(now_ns() - start)
        disturbed.append(preemptions() != switches)
    return [value / 1e6 for value in nanoseconds], disturbed


def time_requests(
    session: Session, batches: Sequence[Batch], calls: Sequence[int], gaps_ms: Sequence[float]
) -> list[float]:
    """Return the ms from each request's arrival to its answer. Requests wait for those before them.

    Arrivals don't wait for answers (an open system: Schroeder et al. 2006, "Open versus closed"), so time in the queue
    counts.

    Args:
        session: Open model.
        batches: Batches that calls refer to.
        calls: Batch of each request.
        gaps_ms: Time between successive requests in ms.
    """
    if isinstance(session, TimesItself):
        return session.queued_latencies(calls, gaps_ms)
    now_ns = time.perf_counter_ns
    due = now_ns()
    nanoseconds = []
    for index, gap_ms in zip(calls, gaps_ms, strict=True):
        # The next arrival does not depend on the answer, so a slow model accumulates a queue.
        due += int(gap_ms * 1e6)
        wait = (due - now_ns()) / 1e9
        if wait > 0:
            time.sleep(wait)
        session.predict(batches[index])
        nanoseconds.append(now_ns() - due)
    return [value / 1e6 for value in nanoseconds]


def time_generation(decoder: GreedyDecoder, ids: Sequence[int], tokens: int) -> Reply:
    """Time a prompt to its first token, and each of ``tokens`` that follow; see `GenerationTimes`.

    If the decoder generates the whole text itself, each token has the mean time, and interruptions are not counted.
    """
    if isinstance(decoder, WritesItself):
        generated, first_ms, all_ms = decoder.write(ids, tokens + 1)
        steps_ms = [(all_ms - first_ms) / max(tokens, 1)] * tokens
        return {"first_ms": first_ms, "steps_ms": steps_ms, "disturbed": [False] * (tokens + 1), "tokens": generated}
    now_ns = time.perf_counter_ns
    generated = []
    nanoseconds, disturbed = [], []
    for position in range(tokens + 1):
        switches = preemptions()
        start = now_ns()
        # The first step reads the prompt, each later one a single token.
        token = decoder.step(generated[-1]) if position else decoder.prefill(ids)
        nanoseconds.append(now_ns() - start)
        disturbed.append(preemptions() != switches)
        generated.append(token)
    first_ms, *steps_ms = (value / 1e6 for value in nanoseconds)
    return {"first_ms": first_ms, "steps_ms": steps_ms, "disturbed": disturbed, "tokens": generated}


class Worker:
    """Handler of the messages: the open model and its batches."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._artifact = ""
        self._decoder: GreedyDecoder | None = None
        self._batches: list[Batch] = []
        self._meter: EnergyMeter | None = None
        self._kernels: ReferenceKernels | None = None

    def open(self, message: Reply) -> Reply:
        """Load the model.

        In the answer, ``before_bytes`` is the peak memory of the runtime alone, before the model is loaded.
        ``start_up`` has the start-up times that a session in another process reports.
        """
        pin(message["cores"])
        target = Target(**message["target"])
        allow_as(message.get("code", {}))
        runtime = get_runtime(target.runtime)
        # Batches and libraries are loaded first, so that the memory and time below are the model's.
        self._batches = read_batches(Path(message["batches"]))
        self._artifact = message["artifact"]
        if is_pipeline(Path(self._artifact)):
            image_generation_hook("load_libraries")(Path(self._artifact))
        runtime_bytes = peak_bytes()
        start = time.perf_counter_ns()
        self._session = runtime.open(Path(self._artifact), target, message["threads"])
        load_ms = (time.perf_counter_ns() - start) / 1e6
        start_up: dict[str, float] = {}
        # A browser or Node process reports its own memory and load time. This process is only its client.
        if external := external_sessions(self._session):
            load_ms = sum(session.session_load_ms for session in external)
            runtime_bytes = sum(session.runtime_bytes for session in external)
            start_up = combined_start_up(external)
        if isinstance(self._session, TimesItself):
            self._session.hold(self._batches)
        reply = {"session_load_ms": load_ms, "before_bytes": runtime_bytes, "start_up": start_up}
        return {**reply, "settings": self._session.settings}

    def load(self, message: Reply) -> Reply:
        """Replace the batches, and prepare for timing."""
        self._batches = read_batches(Path(message["batches"]))
        if isinstance(self._session, TimesItself):
            self._session.hold(self._batches)
        meter = find_meter()
        self._meter = meter if isinstance(meter, EnergyMeter) else None
        stop_garbage_collection()
        return {"energy_unavailable": meter if isinstance(meter, str) else None}

    def round(self, message: Reply) -> Reply:
        """Time one call for each batch in the message.

        The first ``untimed`` of them run once before, because another process has just used the caches.
        """
        session = self._open_session()
        if message["untimed"]:
            time_calls(session, self._batches, message["calls"][: message["untimed"]])
        energy_before = self._meter.read() if self._meter else ()
        cpu_seconds_before = self._processor_seconds()
        latencies, disturbed = time_calls(session, self._batches, message["calls"])
        cpu_ms = 1e3 * (self._processor_seconds() - cpu_seconds_before)
        energy_mj = self._meter.between_mj(energy_before, self._meter.read()) if self._meter else None
        return {"latencies_ms": latencies, "disturbed": disturbed, "cpu_ms": cpu_ms, "energy_mj": energy_mj}

    def serve_requests(self, message: Reply) -> Reply:
        """Answer requests that arrive after the gaps in the message."""
        calls, gaps_ms = message["calls"], message["gaps_ms"]
        return {"latencies_ms": time_requests(self._open_session(), self._batches, calls, gaps_ms)}

    def generate(self, message: Reply) -> Reply:
        """Time one generation, after some untimed steps, because another process has just used the caches."""
        session = self._open_session()
        if isinstance(session, TimesItself):
            raise StageError(
                f"Text generation isn't timed on {session.settings['runtime']}.",
                expected="a runtime in this process, since keys and values pass at each token",
                where="benchmark",
                hint="time it on the target cpu",
            )
        # The decoder keeps buffers for the cache, so it is created once.
        if self._decoder is None:
            self._decoder = open_decoder(session, self._artifact)
        if message["untimed"]:
            time_generation(self._decoder, message["ids"][:1], message["untimed"])
        reply = time_generation(self._decoder, message["ids"], message["tokens"])
        return {**reply, "cached": self._decoder.cached, "vocabulary": self._decoder.vocabulary}

    def generate_image(self, message: Reply) -> Reply:
        """Time one image by the hook `time_image`."""
        session, batch = self._open_session(), self._batches[message["call"]]
        options = (message[name] for name in ("steps", "size", "untimed"))
        reply: Reply = image_generation_hook("time_image")(session, batch, *options)
        return reply

    def reference(self, message: Reply) -> Reply:
        """Time the reference kernels."""
        pin(message["cores"])
        return self._reference_kernels().time()._asdict()

    def time_small_product(self, message: Reply) -> Reply:
        """Time the small product on each of the cores, if processes can be bound to cores. The longest time counts."""
        # Any core may be the slow one, and the model uses all of them.
        times_ms = []
        for cores in [[core] for core in message["cores"]] or [[]]:
            pin(cores)
            times_ms.append(self._reference_kernels().small_product_ms())
        return {"product_ms": max(times_ms)}

    def _reference_kernels(self) -> ReferenceKernels:
        if self._kernels is None:
            self._kernels = ReferenceKernels()
        return self._kernels

    def memory(self, message: Reply) -> Reply:
        """Return the peak memory of the model's process, and all processor time so far."""
        external = external_sessions(self._session)
        peak = sum(session.peak_bytes() for session in external) if external else peak_bytes()
        client_seconds = time.process_time() if external else 0.0
        return {"peak_bytes": peak, "cpu_seconds": client_seconds + self._processor_seconds()}

    def _processor_seconds(self) -> float:
        """Return the processor time of the process that the model runs in."""
        external = external_sessions(self._session)
        return sum(session.cpu_seconds() for session in external) if external else time.process_time()

    def _open_session(self) -> Session:
        assert self._session is not None, "open comes first"
        return self._session


def pin(cores: Sequence[int]) -> None:
    """Bind this process to cores, if the system can."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def stop_garbage_collection() -> None:
    """Collect garbage now and never again, since a collection in a timed call would count as the model's time."""
    gc.collect()
    gc.freeze()
    gc.disable()


def main() -> None:
    """Answer the messages of the module's docstring."""
    serve(Worker())


if __name__ == "__main__":
    main()
