"""The far end of a measured process: JSON messages on standard input, one line each, answered likewise."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from compress import errors
from compress.errors import CompressError

Reply = dict[str, Any]
Actions = Mapping[str, Callable[[Reply], Reply]]


def serve(source: TextIO, sink: TextIO, actions: Actions) -> None:
    """Answer each message by the action that its ``do`` names, until ``quit`` or the end of the source.

    An expected error becomes ``{"error": {...}}``, which `Child.ask` raises again.
    """
    for line in source:
        message = json.loads(line)
        if message["do"] == "quit":
            return
        try:
            reply = actions[message["do"]](message)
        except CompressError as error:
            reply = error_reply(error)
        sink.write(json.dumps(reply) + "\n")
        sink.flush()


def error_reply(error: CompressError) -> Reply:
    """An expected error as a message, which `raised_error` reads."""
    details = {"what": error.what, "where": error.where, "expected": error.expected, "mend": error.mend}
    return {"error": {"kind": type(error).__name__, **details}}


def raised_error(told: Mapping[str, Any]) -> CompressError:
    """The error of an `error_reply`, to be raised again."""
    kinds = {
        kind.__name__: kind for kind in (errors.InputError, errors.ModelError, errors.DataError, errors.StageError)
    }
    kind = kinds.get(told["kind"], errors.StageError)
    return kind(told["what"], where=told["where"], expected=told["expected"], mend=told["mend"])


def serve_standard_streams(actions: Actions) -> None:
    """Serve on the standard streams; what native code prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin, sink, actions)
    except BrokenPipeError:
        os._exit(1)
