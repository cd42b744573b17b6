"""Commands in processes forked from one that has imported the libraries, since imports dominate the time of a tiny run.

Each command is still a separate process, which can be killed and interrupted. Tests of the program's startup, or of two
runs with different hash seeds, start a new interpreter with `tiny_run.compress_anew` instead.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock


class Forked:
    """A `compress` command with the interface of `subprocess.Popen`.

    It leads a process group of its own, and its output is kept in files.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, surroundings: Mapping[str, str]) -> None:
        self._kept = Path(tempfile.mkdtemp(prefix="compress-forked-"))
        self._streams = [self._kept / name for name in ("stdout", "stderr")]
        self._said = ("", "")
        given = (list(arguments), folder, dict(surroundings), self._streams)
        self._process = _server().Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit code, negative after a signal, or None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self.returncode

    def kill(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return standard output and error; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("compress", timeout or 0.0)
        if self._kept.exists():
            stdout, stderr = (stream.read_text() if stream.exists() else "" for stream in self._streams)
            self._said = stdout, stderr
            shutil.rmtree(self._kept)
        return self._said


@functools.cache
def _server() -> ForkServerContext:
    """Return the context of the fork server, which ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_from"])
    here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, here):
        forkserver.ensure_running()
    return context


class _Forking(subprocess.Popen[Any]):
    """`Popen` that forks for `python -m compress`, as a search starts each candidate, and starts others as usual."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        whole = super()._execute_child  # type: ignore[misc]
        if list(args[:3]) != [sys.executable, "-m", "compress"]:
            whole(args, *others)
            return
        given = inspect.signature(whole).bind(args, *others).arguments
        assert given["cwd"] is None and given["start_new_session"]
        self.pid = os.fork()
        if self.pid == 0:
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
                os.dup2(given[name], number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code: Any = 1
            try:
                _command([*args[3:]], given["env"] or dict(os.environ))
            except SystemExit as ended:
                code = ended.code
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code or 0)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


def _run(arguments: list[str], folder: Path, surroundings: dict[str, str], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        file = os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    subprocess.Popen = _Forking  # type: ignore[misc]
    _command(arguments, surroundings)


def _command(arguments: list[str], surroundings: dict[str, str]) -> None:
    os.setsid()
    # Tests that a shell started in the background ignore interrupts by default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(surroundings)
    sys.argv = ["compress", *arguments]
    from compress.cli import main

    main()
