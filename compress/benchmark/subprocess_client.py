"""Client of a worker process: starts the process, sends it requests, and ensures that it ends."""

from __future__ import annotations

import contextlib
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
from typing import Any, Self

from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import GenerationTimes, ImageTimes, RoundTimes
from compress.formats.target_profile import Target
from compress.models.config_checks import allowed_code
from compress.utils import errors
from compress.utils.errors import CompressError, ModelError, StageError
from compress.utils.isolation import CRASH_HINT, CRASHES, MEMORY_VARIABLE

Reply = dict[str, Any]
_TAIL_CHARACTERS = 2000


def serve(handler: object) -> None:
    """Answer each line of standard input until ``quit`` or the end of input.

    The method of ``handler`` that the message names as ``do`` gives the answer. An expected error becomes
    ``{"error": {...}}``, which `WorkerProcess.request` raises again. Output of native code goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Native libraries print to file descriptor 1. It now leads to standard error, and answers go to a copy of it.
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            reply: Reply = getattr(handler, message["do"])(message)
        except CompressError as error:
            reply = error_reply(error)
        except MemoryError:
            what, hint = "The model needs more memory than its process may use.", f"raise {MEMORY_VARIABLE}"
            reply = error_reply(ModelError(what, where=message.get("artifact"), hint=hint))
        try:
            sink.write(json.dumps(reply) + "\n")
            sink.flush()
        except BrokenPipeError:
            os._exit(1)


def error_reply(error: CompressError) -> Reply:
    """Return an expected error as a message, which `error_from_reply` reads."""
    details = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
    return {"error": {"kind": type(error).__name__, **details}}


def error_from_reply(fields: Mapping[str, Any]) -> CompressError:
    """Return the error of an `error_reply`, to be raised again."""
    known = fields["kind"] in ("InputError", "ModelError", "DataError")
    kind: type[CompressError] = getattr(errors, fields["kind"]) if known else StageError
    return kind(fields["what"], where=fields["where"], expected=fields["expected"], hint=fields["hint"])


class PipedProcess:
    """Subprocess that is written to and read from with timeouts. `kill` must end its use."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None, apart: bool = False) -> None:
        """Start the process.

        Args:
            command: Program and arguments.
            variables: Variables that are added to the environment.
            apart: Whether the process has its own session, so that Ctrl-C in the terminal doesn't reach it.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `kill`
        self._buffer = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, **(variables or {})},
            start_new_session=apart,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self._stdin.fileno(), False)

    def write(self, content: bytes, seconds: float) -> None:
        """Write ``content`` to the process. Raises `TimeoutError`.

        If the process has ended, nothing is raised, and `line` returns None afterwards.
        """
        left, deadline = memoryview(content), time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            while left:
                if not select.select([], [self._stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise TimeoutError
                left = left[os.write(self._stdin.fileno(), left) :]

    def line(self, seconds: float) -> bytes | None:
        """Return the next line, or None if the process has closed its output. Raises `TimeoutError`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([self._stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            received = os.read(self._stdout.fileno(), 1 << 16)
            if not received:
                return None
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def stderr_tail(self) -> str:
        """Return the end of the process's standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()

    def kill(self) -> None:
        """End the process at once and free its resources."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self._stdin, self._stdout, self._errors):
            stream.close()


_QUIT_SECONDS = 5.0


def module_command(module: str) -> list[str]:
    """Return the command that runs a module's `main` with this process's module path and without the current folder."""
    start = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
    return [sys.executable, "-P", "-c", start, json.dumps(sys.path)]


class WorkerProcess:
    """Running `compress.benchmark.worker`. As a context manager, it leaves no process behind."""

    def __init__(
        self, label: str, command: Sequence[str] | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start the process.

        Args:
            label: Name of the model in messages.
            command: Command that replaces the worker.
            variables: Variables that are added to the inherited environment.
        """
        self.label = label
        self._opened: Path | None = None
        self.began = time.perf_counter()
        self._piped = PipedProcess(command or module_command("compress.benchmark.worker"), variables)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._piped.process.pid

    def open(
        self, artifact: Path, target: Target, threads: int, cores: Sequence[int], batches: Path, timeout: float
    ) -> dict[str, Any]:
        """Let the process load a model; see `Worker.open`.

        Args:
            artifact: Model folder or file.
            target: Target that it runs on.
            threads: Number of threads.
            cores: Cores that the process is bound to.
            batches: File with a first batch.
            timeout: Longest wait for the answer in seconds.
        """
        self._opened = artifact
        message = {"do": "open", "artifact": str(artifact.absolute()), "target": asdict(target), "threads": threads}
        return self.request({**message, "cores": list(cores), "batches": str(batches), "code": allowed_code()}, timeout)

    def load(self, batches: Path, timeout: float) -> str | None:
        """Let the process read all batches, and return why energy can't be measured there, or None if it can."""
        reason: str | None = self.request({"do": "load", "batches": str(batches)}, timeout)["energy_unavailable"]
        return reason

    def round(self, calls: Sequence[int], timeout: float, untimed: int = 0) -> RoundTimes:
        """Time one call for each numbered batch, after the first ``untimed`` of them were run once."""
        return RoundTimes(**self.request({"do": "round", "calls": list(calls), "untimed": untimed}, timeout))

    def serve_requests(self, calls: Sequence[int], gaps_ms: Sequence[float], timeout: float) -> list[float]:
        """Return the ms from arrival to answer of requests that arrive ``gaps_ms`` after one another."""
        message = {"do": "serve_requests", "calls": list(calls), "gaps_ms": list(gaps_ms)}
        latencies: list[float] = self.request(message, timeout)["latencies_ms"]
        return latencies

    def generate(self, ids: Sequence[int], tokens: int, timeout: float, untimed: int = 0) -> GenerationTimes:
        """Time the generation of ``tokens`` tokens after the first one that follows a prompt.

        Args:
            ids: Token ids of the prompt.
            tokens: Number of tokens after the first.
            timeout: Longest wait for the answer in seconds.
            untimed: Number of decoding steps before the timed ones.
        """
        message = {"do": "generate", "ids": list(ids), "tokens": tokens, "untimed": untimed}
        return GenerationTimes(**self.request(message, timeout))

    def generate_image(
        self, call: int, steps: int | None, size: int | None, timeout: float, untimed: int = 0
    ) -> ImageTimes:
        """Time the generation of one image from the numbered batch.

        Args:
            call: Number of the batch.
            steps: Number of denoising steps. None uses the model's own number.
            size: Side of the image in pixels. None uses the model's own size.
            timeout: Longest wait for the answer in seconds.
            untimed: Number of denoising steps before the timed ones.
        """
        message = {"do": "generate_image", "call": call, "steps": steps, "size": size, "untimed": untimed}
        return ImageTimes(**self.request(message, timeout))

    def reference(self, cores: Sequence[int], timeout: float) -> ReferenceTimes:
        """Return the current times of the reference kernels on the first of ``cores``."""
        return ReferenceTimes(**self.request({"do": "reference", "cores": list(cores[:1])}, timeout))

    def time_small_product(self, cores: Sequence[int], timeout: float) -> float:
        """Return the current time of the small product on the slowest of ``cores`` in ms."""
        return float(self.request({"do": "time_small_product", "cores": list(cores)}, timeout)["product_ms"])

    def memory(self) -> dict[str, Any]:
        """Return the peak memory and the processor time so far; see `Worker.memory`."""
        return self.request({"do": "memory"}, timeout=60.0)

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a message and wait up to ``timeout`` seconds for its answer.

        Raises the error that the worker met, or `StageError` if the worker died, hung, or wrote something else.
        """
        try:
            self._piped.write(json.dumps(message).encode() + b"\n", timeout)
            line = self._piped.line(timeout)
        # A process that hangs would block the session, so it is ended.
        except TimeoutError:
            raise self._failure(f"did not answer {message['do']!r} within {timeout:.0f} s and was stopped") from None
        if line is None:
            raise self._dead()
        try:
            reply: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise self._failure(f"wrote {line[:200]!r} instead of a response") from None
        if "error" in reply:
            raise error_from_reply(reply["error"])
        return reply

    def close(self) -> None:
        """End the process: ask it to quit, then kill it."""
        try:
            self._piped.write(b'{"do": "quit"}\n', _QUIT_SECONDS)
            self._piped.process.wait(_QUIT_SECONDS)
        except (TimeoutError, subprocess.TimeoutExpired):
            pass
        # Also after a regular end: this frees the pipes.
        self.kill()

    def kill(self) -> None:
        """End the process at once and free its resources."""
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
            return self._failure("closed its output without exiting")
        if code >= 0:
            return self._failure(f"ended with exit code {code}")
        # A negative exit code is the number of the signal that ended the process.
        number = signal.Signals(-code)
        if self._opened is not None and number in (*CRASHES, signal.SIGXCPU):
            # The fault is that of the file, as if it had been refused. Native code writes pages of addresses.
            what = f"The process that measures {self.label!r} was killed by {number.name}."
            expected = "a model that its runtime can run"
            error = StageError(what, where=str(self._opened), expected=expected, hint=CRASH_HINT)
            error.exit_code = 2
            return error
        hint = " (the system may have run out of memory)" if number == signal.SIGKILL else ""
        return self._failure(f"was killed by {number.name}{hint}")

    def _failure(self, what: str) -> StageError:
        self._piped.process.kill()
        self._piped.process.wait()
        tail = self._piped.stderr_tail()
        output = f"\nIts last output:\n{tail}" if tail else ""
        return StageError(f"The process that measures {self.label!r} {what}.{output}", where="benchmark")
