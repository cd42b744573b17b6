"""The process that profiles one artifact: the file as it ships, its optimized graph with notes, and the machine.

    {"do": "open", "artifact", "target": {...}, "threads", "cores", "batches", "folder", "text"}
                                                -> {"nodes", "settings"}
    {"do": "turn", "profiled": bool, "calls": [i, ...], "begin": bool, "untimed": n}  -> {"latencies_ms", "cpu_seconds"}
    {"do": "limits", "buffers": [bytes, ...]}   -> {"bytes_per_s", "fp32_per_s", "int8_per_s", "cpu_seconds"}
    {"do": "end"}                               -> {"profile": path, "optimized": path}

``text`` is null for a graph that answers batches. For a decoder it is the prompt that every turn begins with, untimed,
and that each call adds a token to; where it is empty, each call is a prompt.

Both sessions live in one process, so that they are equally warm and on the same cores.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from compress.bench.machine import measure_rates
from compress.bench.service import Reply, serve_standard_streams
from compress.bench.worker import Answering, read_batches, timed
from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes.profile import ProfiledSession, write_optimized
from compress.formats.runtimes import get_runtime
from compress.runtimes.generation import open_decoder
from compress.runtimes.runtime import Batch, Session
from compress.targets import Target


class _Reader:
    """A decoder that is asked in batches: each is a prompt, or the next token of the text that a prompt began."""

    def __init__(self, session: Session, where: str, prompt: Sequence[int]) -> None:
        self._decoder, self._prompt = open_decoder(session, where), prompt

    def begin(self) -> None:
        """Read the prompt."""
        self._decoder.prefill(self._prompt)

    def predict(self, batch: Batch) -> int:
        """The token that follows."""
        ids: list[int] = batch["input_ids"][0].tolist()
        return self._decoder.step(ids[0]) if self._prompt else self._decoder.prefill(ids)


class ProfileWorker:
    """One artifact, opened twice."""

    def __init__(self) -> None:
        self._plain: Answering | None = None
        self._noted: Answering | None = None
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
        plain = get_runtime(target.runtime).open(artifact, target, self._threads)
        self._optimized = write_optimized(find_graph(artifact), Path(message["folder"]), self._threads)
        self._profiled = ProfiledSession(self._optimized, self._threads)
        self._plain, self._noted = plain, self._profiled.session
        if message["text"] is not None:
            self._plain, self._noted = (
                _Reader(session, str(artifact), message["text"]) for session in (plain, self._profiled.session)
            )
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"nodes": len(ir.load(self._optimized).graph), "settings": plain.settings}

    def turn(self, message: Reply) -> Reply:
        """Time one call for each batch that is named, with or without notes, after the untimed ones."""
        session = self._noted if message["profiled"] else self._plain
        assert session is not None, "open comes first"
        if message["begin"]:
            assert isinstance(session, _Reader), "only a text has a beginning"
            session.begin()
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
