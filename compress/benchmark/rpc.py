"""Remote calls to a subprocess: one JSON object in each line of its standard streams, with timeouts and errors."""

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
from typing import Any

from compress.utils import errors
from compress.utils.errors import CompressError

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
    kinds = {
        kind.__name__: kind for kind in (errors.InputError, errors.ModelError, errors.DataError, errors.StageError)
    }
    kind = kinds.get(fields["kind"], errors.StageError)
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
