"""The measured process: opens one artifact, times it when told to, and answers in JSON, one line a message.

Nothing is imported beyond the standard library, numpy and the runtime, so that memory and start-up are the
model's own. Messages, each answered by one line, or by ``{"error": {...}}``:

    {"do": "open", "artifact", "target": {...}, "threads", "cores", "batches"}   load a model
    {"do": "round", "calls": [i, ...], "untimed": n} -> {"latencies_ms": [...]}  one timed call for each batch
    {"do": "memory"}                       -> {"peak_bytes", "cpu_seconds"}
    {"do": "quit"}
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from compress.errors import CompressError
from compress.runtimes import get_runtime
from compress.runtimes.runtime import Batch, Session
from compress.targets import Target

Reply = dict[str, Any]


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


def peak_bytes() -> int:
    """Peak resident memory of this process since it began."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # On Linux this would count the parent's memory at the fork; macOS gives bytes and starts anew.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(session: Session, batches: Sequence[Batch], calls: Sequence[int]) -> list[float]:
    """Milliseconds of one call for each entry of ``calls``."""
    clock = time.perf_counter_ns
    nanoseconds = []
    for index in calls:
        batch = batches[index]
        start = clock()
        session.predict(batch)
        nanoseconds.append(clock() - start)
    return [value / 1e6 for value in nanoseconds]


class Worker:
    """The model that was opened and its batches."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._batches: list[Batch] = []

    def open(self, message: Reply) -> Reply:
        """Load the artifact; ``before_bytes`` is the peak of the runtime alone, before the model came."""
        if message["cores"] and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, message["cores"])
        target = Target(**message["target"])
        runtime = get_runtime(target.runtime)
        self._batches = read_batches(Path(message["batches"]))
        before = peak_bytes()
        start = time.perf_counter_ns()
        self._session = runtime.open(Path(message["artifact"]), target, message["threads"])
        load_ms = (time.perf_counter_ns() - start) / 1e6
        # A collection in the middle of a timed call would be taken for the model's own time.
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"session_load_ms": load_ms, "before_bytes": before, "settings": self._session.settings}

    def round(self, message: Reply) -> Reply:
        """Time one call for each batch that is named.

        The first ``untimed`` of them are run once before, since another process has just used the caches.
        """
        assert self._session is not None, "open comes first"
        for index in message["calls"][: message["untimed"]]:
            self._session.predict(self._batches[index])
        return {"latencies_ms": timed(self._session, self._batches, message["calls"])}

    def memory(self, message: Reply) -> Reply:
        """Peak memory and processor time so far."""
        return {"peak_bytes": peak_bytes(), "cpu_seconds": time.process_time()}


def serve(source: TextIO, sink: TextIO) -> None:
    """Answer messages until ``quit``, or until whoever sends them is gone."""
    worker = Worker()
    actions: dict[str, Callable[[Reply], Reply]] = {
        "open": worker.open,
        "round": worker.round,
        "memory": worker.memory,
    }
    for line in source:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            reply = actions[message["do"]](message)
        except CompressError as error:
            details = {
                "what": error.what,
                "where": error.where,
                "expected": error.expected,
                "mend": error.mend,
            }
            reply = {"error": {"kind": type(error).__name__, **details}}
        sink.write(json.dumps(reply) + "\n")
        sink.flush()


def main() -> None:
    """Serve on the standard streams; what native code prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin, sink)
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
