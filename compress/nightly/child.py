"""One entry's run in a process of its own, ended when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

GRACE_SECONDS = 20.0
"""From the request to end (SIGTERM) to the end without asking (SIGKILL)."""


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal), how long it took, whether its time was up."""

    exit_code: int
    seconds: float
    timed_out: bool


def run_process(
    command: Sequence[str], output: Path, log: Path, limit_seconds: float, grace_seconds: float = GRACE_SECONDS
) -> Ended:
    """Run ``command`` with its standard output and error in files, and no input, for at most ``limit_seconds``.

    It and everything it started are ended when its time is up, and when this process is interrupted.
    """
    began = time.monotonic()
    with output.open("wb") as out, log.open("wb") as err:
        # A session of its own, so that a Ctrl-C at the terminal reaches this process alone, which then ends it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, env=dict(os.environ)
        )
        try:
            timed_out = not _ends_within(process, limit_seconds)
        finally:
            _end(process, grace_seconds)
    return Ended(process.returncode, time.monotonic() - began, timed_out)


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End the process and its descendants: first asked, then killed. What has ended already is left alone."""
    family = _family(process.pid)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        _ends_within(process, grace_seconds)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        whole = psutil.Process(pid)
        return [whole, *whole.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
