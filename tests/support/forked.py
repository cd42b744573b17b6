"""Commands in processes that are forked from one which has imported the libraries: that is most of a tiny run's work.

Each is a process of its own all the same, to be killed and interrupted. A test of how the program starts, or of two
programs that differ in what a start draws (the seed of Python's hashes), begins one by `tiny_run.compress_anew`.
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
    """A command of `compress`, as `subprocess.Popen` has one. It leads a process group; its output is kept."""

    def __init__(self, arguments: Sequence[str], folder: Path, surroundings: Mapping[str, str]) -> None:
        self._kept = Path(tempfile.mkdtemp(prefix="compress-forked-"))
        self._streams = [self._kept / name for name in ("stdout", "stderr")]
        self._said = ("", "")
        given = (list(arguments), folder, dict(surroundings), self._streams)
        self._process = _server().Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code once it has ended: negative where a signal ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        return self.returncode

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to standard output and error. Raises `subprocess.TimeoutExpired`."""
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
    """The process that is forked; it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_from"])
    here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with mock.patch.dict(os.environ, here):
        forkserver.ensure_running()
    return context


class _Forking(subprocess.Popen[Any]):
    """Begins `python -m compress`, as a night does for each entry, by a fork as well; anything else as ever."""

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
    # A shell that started the tests in the background has them ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(surroundings)
    sys.argv = ["compress", *arguments]
    from compress.cli import main

    main()
