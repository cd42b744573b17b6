"""Child process for commands that open models of strangers: limits on memory and processor time, and no network.

The child is forked before libraries are loaded. It has the arguments, the streams and the terminal of the command. The
parent waits, passes signals on and turns a crash of native code into an error about the model. Linux only.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import fcntl
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from compress.utils.errors import ModelError

MEMORY_VARIABLE, CPU_VARIABLE = "COMPRESS_MEMORY_LIMIT_GB", "COMPRESS_CPU_LIMIT_SECONDS"
NETWORK_VARIABLE = "COMPRESS_NETWORK"
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
"""Signals that end a process because of a fault of its native code."""
CRASH_HINT = "the file is damaged, or made to attack its reader: write it again, or use one that you trust"
_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_NO_NAMESPACE = 99
"""Exit code of a child that lost its rights on the way to a namespace. It is started again without one."""
_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_PDEATHSIG, _SIOCSIFFLAGS, _IFF_UP = 0x10000000, 0x40000000, 1, 0x8914, 1
_REPEATED_SECONDS = 1.0
_COPY_SECONDS = 20
Result = TypeVar("Result")


class NativeCrashError(Exception):
    """Native code crashed in a copy of this process; the text is the name of the signal."""


@dataclass(frozen=True)
class Limits:
    """Limits of a process. None stands for no limit.

    Attributes:
        memory_bytes: Private writable memory (RLIMIT_DATA), which address space that a runtime reserves is no part of.
        address_bytes: Address space (RLIMIT_AS), also of files that are mapped.
        cpu_seconds: Processor time of all threads (RLIMIT_CPU).
        network: Whether the network can be reached.
    """

    memory_bytes: int | None = None
    address_bytes: int | None = None
    cpu_seconds: int | None = None
    network: bool = True

    def __str__(self) -> str:
        memory = "unlimited memory" if self.memory_bytes is None else f"{self.memory_bytes / 1e9:.1f} GB of memory"
        time_ = "unlimited" if self.cpu_seconds is None else f"{self.cpu_seconds:,} s of"
        return f"{memory}, {time_} processor time, {'with' if self.network else 'no'} network"


@dataclass
class _State:
    """Limits of this process, and the models that it opens."""

    limits: Limits = Limits()
    subject: str | None = None


_state = _State()


def current_limits() -> Limits:
    """Return the limits of this process."""
    return _state.limits


def isolation_record() -> dict[str, int | bool | None]:
    """Return the limits of this process as plain values, for JSON."""
    return asdict(current_limits())


def network_is_blocked() -> bool:
    """Return whether this process was started without network."""
    return not current_limits().network


def network_hint() -> str | None:
    """Return how to allow the network, for the error of something that must be fetched; None if it is allowed."""
    if not network_is_blocked():
        return None
    return f"this command has no network: name your own recipe with --recipe, or set {NETWORK_VARIABLE}=1"


def memory_error(error: Exception) -> ModelError | None:
    """Return the error about the model if memory was used up in an isolated process, else None."""
    used_up = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "alloc" in str(error))
    if _state.subject is None or not used_up:
        return None
    return _error("It needs more memory than the command may use.", _state.subject, _state.limits, MEMORY_VARIABLE)


def isolate(subject: str, wanted: Limits) -> None:
    """Go on in a child process with limits. The parent never returns: it ends as the child ends.

    Args:
        subject: The models as the user named them.
        wanted: Limits of the child. One that the kernel does not grant is left out, and all in a process with threads.

    Raises:
        ModelError: In the parent, if native code crashed or a limit ended the child.
    """
    # A fork of a process with threads could wait forever for a lock that a thread holds.
    while sys.platform == "linux" and len(list(Path("/proc/self/task").iterdir())) == 1:
        parent = os.getpid()
        sys.stdout.flush(), sys.stderr.flush()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
        # The file is in memory, because the disk may be full.
        crash = os.memfd_create("crash")
        child = os.fork()
        if child == 0:
            _state.subject, _state.limits = subject, _apply(wanted, parent)
            faulthandler.enable(crash, all_threads=False)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            return
        status = _wait(child)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        if os.waitstatus_to_exitcode(status) != _NO_NAMESPACE:
            _end(status, subject, wanted, os.pread(crash, 1 << 16, 0))
        wanted = replace(wanted, network=True)


def call_in_copy(action: Callable[[], Result]) -> Result:
    """Return what a short ``action`` returns as JSON, called in a copy of this process, which it may crash. Linux only.

    The copy has one thread, so the action may use no thread pool. If it raises an exception or takes too long there, it
    is called here. What crashes by chance, such as a read beyond the end of memory, is thus never done here.

    Raises:
        NativeCrashError: The copy crashed.
    """
    if sys.platform != "linux":
        return action()
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of locks that other threads hold. An alarm ends the copy if it waits for one.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_COPY_SECONDS)
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with os.fdopen(sender, "w") as pipe:
                json.dump(action(), pipe)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES:
        raise NativeCrashError(signal.Signals(os.WTERMSIG(status)).name)
    result: Result = json.loads(sent) if status == 0 else action()
    return result


def _apply(wanted: Limits, parent: int) -> Limits:
    """Set limits for this process and return those that are in force."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = wanted.network or not _leave_network(libc)
    # The child ends with its parent, which may have ended already.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    in_force: dict[str, int | None] = {}
    for name, kind in (("memory_bytes", "DATA"), ("address_bytes", "AS"), ("cpu_seconds", "CPU")):
        number, value = getattr(resource, f"RLIMIT_{kind}"), getattr(wanted, name)
        soft, hard = resource.getrlimit(number)
        # The user's own limits stay, and children may set their own: the hard limit is unchanged.
        bounds = [bound for bound in (value, soft, hard) if bound is not None and bound != resource.RLIM_INFINITY]
        if value is not None:
            resource.setrlimit(number, (min(bounds), hard))
        in_force[name] = min(bounds, default=None)
    # llama.cpp would start a debugger when it crashes.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    interrupt = _interrupt_once()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, interrupt)
            # At its end, Python would restore the handler that kills the process.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    return Limits(**in_force, network=network)


def _interrupt_once() -> Callable[[int, FrameType | None], None]:
    """Return a handler that takes an interrupt of the group, which the parent passes on too, as one."""
    last = -_REPEATED_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _REPEATED_SECONDS:
            raise KeyboardInterrupt

    return interrupt


def _leave_network(libc: ctypes.CDLL) -> bool:
    """Move this process to a network of its own, which has the loopback device alone; return False if refused.

    Ends the process if the kernel grants the namespace without its rights.
    """
    user, group = os.geteuid(), os.getegid()
    # A user namespace would take from root the access to files of others, and root needs none.
    if libc.unshare(_CLONE_NEWNET if user == 0 else _CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    try:
        if user != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        # Pages of browsers and their server talk over the loopback device.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
            fcntl.ioctl(device, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    except OSError:
        os._exit(_NO_NAMESPACE)
    # Libraries of Hugging Face then look into their cache without a try at the network.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return True


def _wait(child: int) -> int:
    """Return the status of the child once it has ended. Signals of other processes are passed on."""
    while True:
        received = signal.sigwaitinfo(_FORWARDED | {signal.SIGCHLD})
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        # The kernel sends those of the terminal, whose code is positive, to the child too.
        elif received.si_code <= 0:
            os.kill(child, received.si_signo)


def _end(status: int, subject: str, limits: Limits, stack: bytes) -> NoReturn:
    """End as the child ended. Raises `ModelError` if its end says something about the model."""
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = signal.Signals(os.WTERMSIG(status))
    if number in CRASHES:
        # The first line that names a file is the innermost call.
        innermost = re.search(rb'File "([^"]*)"', stack)
        library = innermost and re.search(rb"/site-packages/(\w+)", innermost[1])
        name = library[1].decode() if library else "native code"
        raise ModelError(
            f"It made {name} crash ({number.name}).",
            where=subject,
            expected="a whole model that its own library can read",
            hint=CRASH_HINT,
        )
    if number == signal.SIGXCPU:
        raise _error("It needs more processor time than the command may use.", subject, limits, CPU_VARIABLE)
    if number == signal.SIGKILL:
        what = "Its process was killed, as the system does if memory is used up."
        raise _error(what, subject, limits, MEMORY_VARIABLE)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _error(what: str, subject: str, limits: Limits, variable: str) -> ModelError:
    hint = f"set {variable} to a higher limit if you trust the model"
    return ModelError(what, where=subject, expected=f"at most {limits}", hint=hint)
