"""Process that runs one artifact with and without the runtime's profiler, alternately: its client and its worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from compress.benchmark.machine import measure_rates
from compress.benchmark.profiled_calls import ProfiledCalls
from compress.benchmark.subprocess_client import Reply, WorkerProcess, module_command, serve
from compress.benchmark.worker import Predictor, pin, read_batches, stop_garbage_collection, time_calls, write_batches
from compress.formats.generation.decoder import open_decoder
from compress.formats.onnx.model import find_graph
from compress.formats.onnx.runtimes.profile import CallRun, ProfiledSession, read_profile, write_optimized
from compress.formats.runtime import Batch, Session, get_runtime
from compress.formats.target_profile import Target
from compress.utils.errors import StageError

FEWEST_PASSES = 7
SETTLE_SECONDS = 0.02
_WARM_UP_PASSES = 3
_UNTIMED = 2
_MOST_EVENTS = 60_000
"""Largest number of events. ONNX Runtime keeps every event until the end, as a kilobyte of JSON each."""


@dataclass(frozen=True)
class NodeProfile:
    """Profile of nodes: the graph that the runtime ran, and every node's times in [passes][calls]."""

    optimized: Path
    graph: ir.Graph
    runs: list[list[CallRun]]


class ProfiledProcess(WorkerProcess):
    """Process that opens one artifact twice. As a context manager, it leaves no process behind.

    ``unprofiled_ms`` and ``profiled_ms`` are times in ms, [passes][calls]. ``cpu_seconds`` is its processor time.
    """

    def __init__(self, artifact: Path, calls: ProfiledCalls, scratch: Path, timeout_seconds: float) -> None:
        """Start the process.

        Args:
            artifact: Model folder or file.
            calls: Calls that are profiled.
            scratch: Empty folder for files that both processes use.
            timeout_seconds: Longest wait for one answer.
        """
        super().__init__(artifact.name, module_command("compress.benchmark.profile_worker"))
        self._artifact, self._calls, self._scratch, self._timeout = artifact, calls, scratch, timeout_seconds
        self._order: list[int | None] = []
        self.unprofiled_ms: list[list[float]] = []
        self.profiled_ms: list[list[float]] = []
        self.cpu_seconds = 0.0
        self.settings: dict[str, Any] = {}
        self.most_passes = FEWEST_PASSES

    def open_twice(self, target: Target, threads: int, cores: Sequence[int]) -> None:
        """Load the artifact, then the graph that the runtime optimizes from it."""
        path = self._scratch / "batches.npz"
        write_batches(path, self._calls.batches)
        message = {"do": "open", "artifact": str(self._artifact.absolute()), "target": asdict(target)}
        options = {"threads": threads, "cores": list(cores), "batches": str(path), "folder": str(self._scratch)}
        opened = self.ask({**message, **options, "text": None if self._calls.phase == "batch" else self._calls.prompt})
        self.settings = opened["settings"]
        self.most_passes = max(FEWEST_PASSES, _MOST_EVENTS // (opened["nodes"] * (len(self._calls) + _UNTIMED)))

    def warm_up(self) -> None:
        """Run passes that don't count."""
        for _ in range(_WARM_UP_PASSES):
            self._turn(False)
            self._turn(True)
        self._order = [None] * len(self._order)

    def run_pass(self, profiled_first: bool) -> None:
        """Run every call once with and once without profiling."""
        for profiled in (True, False) if profiled_first else (False, True):
            (self.profiled_ms if profiled else self.unprofiled_ms).append(self._turn(profiled))

    def end(self) -> NodeProfile:
        """Stop profiling. Raises `StageError` if calls are missing from the profile."""
        ended = self.ask({"do": "end"})
        optimized = Path(ended["optimized"])
        calls = read_profile(Path(ended["profile"]))
        if len(calls) != len(self._order):
            raise StageError(f"ONNX Runtime recorded {len(calls)} calls of {len(self._order)}.", where="its profile")
        # Warm-up and untimed calls have no index.
        timed = [run for run, index in zip(calls, self._order, strict=True) if index is not None]
        size = len(self._calls)
        runs = [timed[start : start + size] for start in range(0, len(timed), size)]
        return NodeProfile(optimized, ir.load(optimized).graph, runs)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and note the processor time; see `WorkerProcess.request`."""
        reply = self.request(message, self._timeout)
        self.cpu_seconds = reply.get("cpu_seconds", self.cpu_seconds)
        return reply

    def _turn(self, profiled: bool) -> list[float]:
        time.sleep(SETTLE_SECONDS)
        begin = bool(self._calls.prompt)
        untimed = 0 if begin else min(_UNTIMED, len(self._calls))
        numbers = list(range(len(self._calls)))
        message = {"do": "turn", "profiled": profiled, "calls": numbers, "begin": begin, "untimed": untimed}
        latencies: list[float] = self.ask(message)["latencies_ms"]
        if profiled:
            self._order += [*[None] * (begin + untimed), *numbers]
        return latencies


class _Reader:
    """Decoder that is called with batches: each is a prompt, or the next token of the text that a prompt began."""

    def __init__(self, session: Session, where: str, prompt: Sequence[int]) -> None:
        self._decoder, self._prompt = open_decoder(session, where), prompt

    def begin(self) -> None:
        """Read the prompt."""
        self._decoder.prefill(self._prompt)

    def predict(self, batch: Batch) -> int:
        """Return the token that follows."""
        ids: list[int] = batch["input_ids"][0].tolist()
        return self._decoder.step(ids[0]) if self._prompt else self._decoder.prefill(ids)


class ProfileWorker:
    """Worker that has one artifact open twice, with and without profiling."""

    def __init__(self) -> None:
        self._plain: Predictor | None = None
        self._noted: Predictor | None = None
        self._profiled: ProfiledSession | None = None
        self._optimized = Path()
        self._batches: list[Batch] = []
        self._threads = 1

    def open(self, message: Reply) -> Reply:
        """Open the artifact, then the graph that the runtime optimizes from it."""
        pin(message["cores"])
        target, self._threads = Target(**message["target"]), message["threads"]
        artifact = Path(message["artifact"])
        self._batches = read_batches(Path(message["batches"]))
        plain = get_runtime(target.runtime).open(artifact, target, self._threads)
        self._optimized = write_optimized(find_graph(artifact), Path(message["folder"]), self._threads)
        self._profiled = ProfiledSession(self._optimized, self._threads)
        self._plain, self._noted = plain, self._profiled.session
        if message["text"] is not None:
            sessions = plain, self._profiled.session
            self._plain, self._noted = (_Reader(session, str(artifact), message["text"]) for session in sessions)
        stop_garbage_collection()
        return {"nodes": len(ir.load(self._optimized).graph), "settings": plain.settings}

    def turn(self, message: Reply) -> Reply:
        """Time one call for each batch in the message, with or without profiling, after the untimed ones."""
        session = self._noted if message["profiled"] else self._plain
        assert session is not None, "open comes first"
        if message["begin"]:
            assert isinstance(session, _Reader), "only generation tasks have a prompt"
            session.begin()
        for index in message["calls"][: message["untimed"]]:
            session.predict(self._batches[index])
        latencies_ms, _ = time_calls(session, self._batches, message["calls"])
        return {"latencies_ms": latencies_ms, "cpu_seconds": time.process_time()}

    def limits(self, message: Reply) -> Reply:
        """Measure the machine."""
        return {**asdict(measure_rates(self._threads, message["buffers"])), "cpu_seconds": time.process_time()}

    def end(self, message: Reply) -> Reply:
        """Write the profile."""
        assert self._profiled is not None, "open comes first"
        return {"profile": str(self._profiled.end()), "optimized": str(self._optimized)}


def main() -> None:
    """Answer messages on the standard streams."""
    serve(ProfileWorker())
