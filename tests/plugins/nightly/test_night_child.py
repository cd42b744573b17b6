"""Processes of a night: their exit codes, their limits, and that nothing of them is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from compress.plugins.nightly.entry_run import EndedProcess, run_process

FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY


def run(folder: Path, script: str, limit: float = 60.0, grace: float = 5.0) -> EndedProcess:
    return run_process([sys.executable, "-c", script], folder / "out", folder / "log", limit, grace)


def are_gone(pids: list[int]) -> bool:
    """Whether no process of these lives, zombies apart."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.02)
    return False


def test_output_error_and_code_are_kept(tmp_path: Path) -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(len(sys.stdin.read()) + 7)"
    ended = run(tmp_path, script)
    assert (ended.exit_code, ended.timed_out) == (7, False)
    assert (tmp_path / "out").read_text() == "out\n"
    assert (tmp_path / "log").read_text() == "err\n"


def test_a_killed_process_has_its_signal(tmp_path: Path) -> None:
    ended = run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (ended.exit_code, ended.timed_out) == (-signal.SIGKILL, False)


@pytest.mark.parametrize(("script", "code"), [(FAMILY, -signal.SIGTERM), (STUBBORN, -signal.SIGKILL)])
def test_one_that_hangs_is_ended_with_all_it_started(tmp_path: Path, script: str, code: int) -> None:
    ended = run(tmp_path, script, limit=2.0, grace=0.5)
    assert (ended.exit_code, ended.timed_out) == (code, True)
    assert ended.seconds >= 2.0
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(pids) == 2
    assert are_gone(pids)


INTERRUPTED = f"""
import signal, sys
from pathlib import Path
from compress.plugins.nightly.entry_run import run_process
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    run_process([sys.executable, "-c", {FAMILY!r}], Path("out"), Path("log"), 60.0, 5.0)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_ends_the_process_too(tmp_path: Path) -> None:
    """A process of its own is interrupted: this one has libraries that look after signals in their ways."""
    night = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=tmp_path)
    out, end = tmp_path / "out", time.monotonic() + 30
    while time.monotonic() < end and not (out.exists() and out.read_text()):
        time.sleep(0.02)
    night.send_signal(signal.SIGINT)
    assert night.wait(timeout=30) == 130
    pids = [int(pid) for pid in out.read_text().split()]
    assert len(pids) == 2
    assert are_gone(pids)
