"""The near end of a measured process: starts it, talks to it, and sees that it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from compress.bench.reference import ReferenceTimes
from compress.bench.rounds import Generation, Turn
from compress.bench.service import raised_error
from compress.errors import StageError
from compress.targets import Target

_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from compress.bench.worker import main; main()"
"""As `python -m compress.bench.worker`, with this process's module path and without the current folder."""
_TAIL_CHARACTERS = 2000
_QUIT_SECONDS = 5.0


class Child:
    """A running `compress.bench.worker`; a context manager, which leaves no process behind."""

    def __init__(
        self, label: str, command: Sequence[str] | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start the process. ``label`` names the model in messages; ``command`` replaces the worker.

        ``variables`` are added to the environment that it inherits.
        """
        self.label = label
        self.began = time.perf_counter()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by `kill`
        self._buffer = b""
        self._process = subprocess.Popen(
            command or [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**os.environ, **(variables or {})},
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def open(
        self,
        artifact: Path,
        target: Target,
        threads: int,
        cores: Sequence[int],
        batches: Path,
        timeout: float,
    ) -> dict[str, Any]:
        """Have it load a model; see `Worker.open`."""
        return self.ask(
            {
                "do": "open",
                "artifact": str(artifact.absolute()),
                "target": asdict(target),
                "threads": threads,
                "cores": list(cores),
                "batches": str(batches),
            },
            timeout,
        )

    def load(self, batches: Path, timeout: float) -> str | None:
        """Have it read all batches; why energy can't be measured there, if it can't."""
        reason: str | None = self.ask({"do": "load", "batches": str(batches)}, timeout)["no_energy"]
        return reason

    def round(self, calls: Sequence[int], timeout: float, untimed: int = 0) -> Turn:
        """One timed call for each numbered batch, after the first ``untimed`` were run once."""
        return Turn(**self.ask({"do": "round", "calls": list(calls), "untimed": untimed}, timeout))

    def arrivals(self, calls: Sequence[int], gaps_ms: Sequence[float], timeout: float) -> list[float]:
        """Milliseconds from arrival to answer of requests that arrive after ``gaps_ms``, one a call."""
        message = {"do": "arrivals", "calls": list(calls), "gaps_ms": list(gaps_ms)}
        latencies: list[float] = self.ask(message, timeout)["latencies_ms"]
        return latencies

    def generate(self, ids: Sequence[int], tokens: int, timeout: float, untimed: int = 0) -> Generation:
        """One timed generation of a prompt and ``tokens`` after the first, following ``untimed`` steps."""
        message = {"do": "generate", "ids": list(ids), "tokens": tokens, "untimed": untimed}
        return Generation(**self.ask(message, timeout))

    def reference(self, cores: Sequence[int], timeout: float) -> ReferenceTimes:
        """What the reference kernels take now, on the first of ``cores``."""
        return ReferenceTimes(**self.ask({"do": "reference", "cores": list(cores[:1])}, timeout))

    def pulse(self, cores: Sequence[int], timeout: float) -> float:
        """Milliseconds that a small product takes now on the slowest of ``cores``."""
        return float(self.ask({"do": "pulse", "cores": list(cores)}, timeout)["pulse_ms"])

    def memory(self) -> dict[str, Any]:
        """Peak memory and processor time so far; see `Worker.memory`."""
        return self.ask({"do": "memory"}, timeout=60.0)

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a message and wait up to ``timeout`` seconds for its answer.

        Raises the error that the worker met, or `StageError` when it died, said something else, or hangs.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise self._dead() from None
        line = self._line(time.monotonic() + timeout, message["do"], timeout)
        try:
            reply: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise self._failure(f"said {line[:200]!r} where an answer was expected") from None
        if "error" in reply:
            raise raised_error(reply["error"])
        return reply

    def close(self) -> None:
        """End the process: asked first, then killed."""
        if self._process.poll() is None:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"do": "quit"}\n')
                self._process.wait(_QUIT_SECONDS)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass
        self.kill()

    def kill(self) -> None:
        """End the process at once and free what it held."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _line(self, deadline: float, doing: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure(f"gave no answer to {doing!r} within {timeout:.0f} s and was stopped")
            received = os.read(descriptor, 1 << 16)
            if not received:
                raise self._dead()
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _dead(self) -> StageError:
        try:
            code = self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            return self._failure("closed its output without ending")
        if code >= 0:
            return self._failure(f"ended by itself with exit code {code}")
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return self._failure(f"was ended by {name}{hint}")

    def _failure(self, what: str) -> StageError:
        self._process.kill()
        self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()
        said = f"\nIts last words:\n{tail}" if tail else ""
        return StageError(f"The process that measures {self.label!r} {what}.{said}", where="benchmark")
