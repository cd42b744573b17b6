"""The near end of a measured process: starts it, talks to it, and sees that it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import Drawing, Generation, Turn
from compress.benchmark.rpc import Piped, raised_error
from compress.formats.target_profile import Target
from compress.models.remote_code import allowed_code
from compress.utils.errors import StageError

_QUIT_SECONDS = 5.0


def serving(module: str) -> list[str]:
    """What runs a module's `main`, with this process's module path and without the current folder."""
    start = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
    return [sys.executable, "-P", "-c", start, json.dumps(sys.path)]


class Child:
    """A running `compress.benchmark.worker`; a context manager, which leaves no process behind."""

    def __init__(
        self, label: str, command: Sequence[str] | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start the process. ``label`` names the model in messages; ``command`` replaces the worker.

        ``variables`` are added to the environment that it inherits.
        """
        self.label = label
        self.began = time.perf_counter()
        self._piped = Piped(command or serving("compress.benchmark.worker"), variables)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._piped.process.pid

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
                "code": {reference: str(folder) for reference, folder in allowed_code().items()},
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

    def draw(self, call: int, steps: int | None, size: int | None, timeout: float, untimed: int = 0) -> Drawing:
        """One timed picture of the numbered batch; ``untimed`` steps come before it.

        In ``steps`` and of ``size`` pixels a side, or as many as the model has of its own.
        """
        message = {"do": "draw", "call": call, "steps": steps, "size": size, "untimed": untimed}
        return Drawing(**self.ask(message, timeout))

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
        try:
            self._piped.write(json.dumps(message).encode() + b"\n", timeout)
            line = self._piped.line(timeout)
        except TimeoutError:
            raise self._failure(f"gave no answer to {message['do']!r} within {timeout:.0f} s and was stopped") from None
        if line is None:
            raise self._dead()
        try:
            reply: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise self._failure(f"said {line[:200]!r} where an answer was expected") from None
        if "error" in reply:
            raise raised_error(reply["error"])
        return reply

    def close(self) -> None:
        """End the process: asked first, then killed."""
        try:
            self._piped.write(b'{"do": "quit"}\n', _QUIT_SECONDS)
            self._piped.process.wait(_QUIT_SECONDS)
        except (TimeoutError, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """End the process at once and free what it held."""
        self._piped.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _dead(self) -> StageError:
        try:
            code = self._piped.process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            return self._failure("closed its output without ending")
        if code >= 0:
            return self._failure(f"ended by itself with exit code {code}")
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return self._failure(f"was ended by {name}{hint}")

    def _failure(self, what: str) -> StageError:
        self._piped.process.kill()
        self._piped.process.wait()
        tail = self._piped.last_words()
        said = f"\nIts last words:\n{tail}" if tail else ""
        return StageError(f"The process that measures {self.label!r} {what}.{said}", where="benchmark")
