"""The process that profiles one artifact: the file as it ships, its optimized graph with notes, and the machine.

    {"do": "open", "artifact", "target": {...}, "threads", "cores", "batches", "folder"} -> {"nodes", "settings"}
    {"do": "turn", "profiled": bool, "calls": [i, ...], "untimed": n}  -> {"latencies_ms", "cpu_seconds"}
    {"do": "limits", "buffers": [bytes, ...]}   -> {"bytes_per_s", "fp32_per_s", "int8_per_s", "cpu_seconds"}
    {"do": "end"}                               -> {"profile": path, "optimized": path}

Both sessions live in one process, so that they are equally warm and on the same cores.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import onnx_ir as ir

from compress.bench.machine import measure_rates
from compress.bench.service import Reply, serve_standard_streams
from compress.bench.worker import read_batches, timed
from compress.models.onnx_model import find_graph
from compress.runtimes import get_runtime
from compress.runtimes.onnxruntime_profile import ProfiledSession, write_optimized
from compress.runtimes.runtime import Batch, Session
from compress.targets import Target


class ProfileWorker:
    """One artifact, opened twice."""

    def __init__(self) -> None:
        self._plain: Session | None = None
        self._profiled: ProfiledSession | None = None
        self._optimized = Path()
        self._batches: list[Batch] = []
        self._threads = 1

    def open(self, message: Reply) -> Reply:
        """Open the artifact, then the graph that the runtime makes of it."""
        if message["cores"] and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, message["cores"])
        target, self._threads = Target(**message["target"]), message["threads"]
        artifact = Path(message["artifact"])
        self._batches = read_batches(Path(message["batches"]))
        self._plain = get_runtime(target.runtime).open(artifact, target, self._threads)
        self._optimized = write_optimized(find_graph(artifact), Path(message["folder"]), self._threads)
        self._profiled = ProfiledSession(self._optimized, self._threads)
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"nodes": len(ir.load(self._optimized).graph), "settings": self._plain.settings}

    def turn(self, message: Reply) -> Reply:
        """Time one call for each batch that is named, with or without notes; the first few are run once before."""
        assert self._plain is not None and self._profiled is not None, "open comes first"
        session: Session = self._profiled.session if message["profiled"] else self._plain
        for index in message["calls"][: message["untimed"]]:
            session.predict(self._batches[index])
        latencies_ms, _ = timed(session, self._batches, message["calls"])
        return self._done({"latencies_ms": latencies_ms})

    def limits(self, message: Reply) -> Reply:
        """Measure the machine."""
        rates = measure_rates(self._threads, message["buffers"])
        bandwidths = {str(size): samples for size, samples in rates.bytes_per_s.items()}
        return self._done({"bytes_per_s": bandwidths, "fp32_per_s": rates.fp32_per_s, "int8_per_s": rates.int8_per_s})

    def end(self, message: Reply) -> Reply:
        """Write the notes down."""
        assert self._profiled is not None, "open comes first"
        return {"profile": str(self._profiled.end()), "optimized": str(self._optimized)}

    def _done(self, reply: Reply) -> Reply:
        return {**reply, "cpu_seconds": time.process_time()}


def main() -> None:
    """Serve on the standard streams."""
    worker = ProfileWorker()
    serve_standard_streams({"open": worker.open, "turn": worker.turn, "limits": worker.limits, "end": worker.end})


if __name__ == "__main__":
    main()
