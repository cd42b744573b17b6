"""A process that answers in lines: its near end with a limit on time, its far end, and errors on the way between."""

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


def serve(served: object) -> None:
    """Answer each line on standard input by the method of ``served`` that its ``do`` names, until ``quit`` or the end.

    An expected error becomes ``{"error": {...}}``, which `Child.ask` raises again. What native code prints goes to
    standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            reply: Reply = getattr(served, message["do"])(message)
        except CompressError as error:
            reply = error_reply(error)
        try:
            sink.write(json.dumps(reply) + "\n")
            sink.flush()
        except BrokenPipeError:
            os._exit(1)


def error_reply(error: CompressError) -> Reply:
    """An expected error as a message, which `raised_error` reads."""
    details = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
    return {"error": {"kind": type(error).__name__, **details}}


def raised_error(told: Mapping[str, Any]) -> CompressError:
    """The error of an `error_reply`, to be raised again."""
    kinds = {
        kind.__name__: kind for kind in (errors.InputError, errors.ModelError, errors.DataError, errors.StageError)
    }
    kind = kinds.get(told["kind"], errors.StageError)
    return kind(told["what"], where=told["where"], expected=told["expected"], hint=told["hint"])


class Piped:
    """The running process; ``kill`` must end its use."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None, apart: bool = False) -> None:
        """Start it with ``variables`` added to the environment; one that is ``apart`` doesn't get this one's Ctrl-C."""
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
        """Pass it on. Raises `TimeoutError`; where the process has ended, `line` says so."""
        left, deadline = memoryview(content), time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):
            while left:
                if not select.select([], [self._stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise TimeoutError
                left = left[os.write(self._stdin.fileno(), left) :]

    def line(self, seconds: float) -> bytes | None:
        """The next line, or None where the process writes no more. Raises `TimeoutError`."""
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

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()

    def kill(self) -> None:
        """End the process at once and free what it held."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self._stdin, self._stdout, self._errors):
            stream.close()
