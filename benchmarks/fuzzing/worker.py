"""Worker processes that mutate and read files, with limits on time and memory, and the record of what failed."""

from __future__ import annotations

import fnmatch
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fuzzing.contents import mutate_bytes
from fuzzing.targets import BrokenPromiseError, Target

LIMIT_SECONDS = 20
LIMIT_BYTES = 2 * 2**30
"""Address space that a worker may gain after its imports."""
LIMIT_CONTENT = 3_000_000
"""Bytes of a mutated file."""
LIMIT_MESSAGE = 100_000
"""Characters of an error message."""
SAVED_PER_FAILURE = 3
_STATE = struct.Struct("<QQQQQdQdQ")
"""The fields of `State`."""


class HangError(BaseException):
    """The reader did not return. Not an `Exception`, so that no reader catches it."""


@dataclass
class State:
    """Counts of a worker, which its parent sees while it runs."""

    index: int = 0
    accepted: int = 0
    rejected: int = 0
    failures: int = 0
    peak_bytes: int = 0
    started: float = 0.0
    fallbacks: int = 0
    longest: float = 0.0
    longest_index: int = 0


def read_state(shared: mmap.mmap) -> State:
    """Return what a worker wrote last."""
    return State(*_STATE.unpack_from(shared))


def load_seeds(target: Target) -> list[dict[str, bytes]]:
    """Build the valid folders of a kind, and return the content of each of their files by relative path."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        target.seeds(root)
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        return [
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for folder in folders
        ]


def mutated(
    target: Target, seeds: Sequence[Mapping[str, bytes]], seed: int, index: int
) -> tuple[int, str, bytes, bool]:
    """Return the number of a seed, one of its files and its mutated content, from seed and index alone.

    The last value says whether the structure could not be mutated, so that bytes were.
    """
    chance = random.Random(f"{target.kind}/{seed}/{index}")
    number = chance.randrange(len(seeds))
    fuzzed = [
        (name, mutator)
        for name in seeds[number]
        for pattern, mutator in target.mutators.items()
        if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition("/")[2], pattern)
    ]
    name, mutator = chance.choice(fuzzed)
    content = seeds[number][name]
    others = [files[name] for files in seeds if name in files and files[name] != content]
    try:
        return number, name, mutator(chance, content, others)[:LIMIT_CONTENT], False
    except Exception:  # noqa: BLE001, the results count it
        return number, name, mutate_bytes(chance, content, others), True


class Sandbox:
    """Folder with the files of one seed, of which single files are replaced and restored."""

    def __init__(self, folder: Path, files: Mapping[str, bytes], scan: bool) -> None:
        self.folder, self.files, self.scan = folder, files, scan
        self.changed: set[str] = set()
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def put(self, target: Target, name: str, content: bytes) -> None:
        """Replace a file, and mend the digests that depend on it."""
        (self.folder / name).write_bytes(content)
        self.changed.add(name)
        if target.finish is not None:
            self.changed.update(target.finish(self.folder, name))

    def restore(self) -> None:
        """Undo all changes."""
        if self.scan:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.folder).as_posix() not in self.files:
                    path.unlink()
        for name in self.changed:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).write_bytes(self.files[name])
        self.changed.clear()


def scratch_root() -> Path | None:
    """Return a folder in memory, if there is one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


def read_case(target: Target, folder: Path) -> bool:
    """Read a folder. Return whether it was accepted; raise whatever is a failure."""
    from compress.utils.errors import CompressError
    from compress.utils.terminal import printable

    try:
        found = target.read(folder)
    except CompressError as error:
        text = str(error)
        printable(text).encode()
        json.dumps(error.as_dict())
        if len(text) > LIMIT_MESSAGE:
            raise BrokenPromiseError(f"an error of {len(text)} characters") from None
        return False
    if target.compare is not None:
        target.compare(folder, found)
    return True


def timed(target: Target, folder: Path) -> tuple[bool, BaseException | None]:
    """Return whether a folder was accepted, and what the reader raised that it may not; `HangError` after the limit."""
    from compress.utils.errors import panics_as_errors

    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
        try:
            with panics_as_errors():
                return read_case(target, folder), None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, HangError) as error:  # noqa: BLE001, whatever a reader raises is recorded
        return False, error


def signature(error: BaseException) -> str:
    """Return the type of an exception and the last line of this project that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}compress{os.sep}" in frame.filename]
    last = (ours or frames)[-1]
    name = last.filename.rpartition(f"{os.sep}compress{os.sep}")[2]
    detail = f": {str(error)[:60]}" if isinstance(error, BrokenPromiseError) else ""
    return f"{type(error).__name__} at {name}:{last.lineno}{detail}"


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise HangError(f"no result after {LIMIT_SECONDS} s")


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def prepare(target: Target, seeds: Sequence[Mapping[str, bytes]], folder: Path) -> list[Sandbox]:
    """Write every seed, and read it once, which imports what the readers need. Raise if a seed is refused."""
    sandboxes = []
    for number, files in enumerate(seeds):
        sandbox = Sandbox(folder / str(number), files, target.writes)
        target.read(sandbox.folder)
        sandbox.restore()
        sandboxes.append(sandbox)
    return sandboxes


def work(
    target: Target,
    seeds: Sequence[Mapping[str, bytes]],
    seed: int,
    indices: Iterator[int],
    shared: mmap.mmap,
    failures: Path,
) -> None:
    """Read mutations in this process until ``indices`` end; write counts and failures."""
    warnings.simplefilter("ignore")
    state = read_state(shared)
    state.started = time.time()
    shared[: _STATE.size] = _STATE.pack(*vars(state).values())
    with tempfile.TemporaryDirectory(dir=scratch_root(), prefix="fuzz-") as name:
        sandboxes = prepare(target, seeds, Path(name))
        used = _memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
        Path("/proc/self/clear_refs").write_text("5")
        at_start = _memory("VmRSS")
        signal.signal(signal.SIGALRM, _on_alarm)
        for index in indices:
            state.index, state.started = index, time.time()
            shared[: _STATE.size] = _STATE.pack(*vars(state).values())
            number, file, content, fallback = mutated(target, seeds, seed, index)
            state.fallbacks += fallback
            sandbox = sandboxes[number]
            sandbox.put(target, file, content)
            accepted, error = timed(target, sandbox.folder)
            if error is not None:
                state.failures += 1
                report_failure(failures, target, seed, index, signature(error), error, sandbox)
            else:
                state.accepted, state.rejected = state.accepted + accepted, state.rejected + (not accepted)
            if time.time() - state.started > state.longest:
                state.longest, state.longest_index = time.time() - state.started, index
            sandbox.restore()
            if index % 64 == 0 or state.longest > 1:
                state.peak_bytes = max(state.peak_bytes, _memory("VmHWM") - at_start)
        state.peak_bytes = max(state.peak_bytes, _memory("VmHWM") - at_start)
        state.started = 0.0
        shared[: _STATE.size] = _STATE.pack(*vars(state).values())


def report_failure(
    failures: Path,
    target: Target,
    seed: int,
    index: int,
    name: str,
    error: BaseException | None,
    sandbox: Sandbox | None,
) -> None:
    """Append a failure to the record, and keep the folder of the first ones of a kind."""
    record: dict[str, Any] = {"kind": target.kind, "seed": seed, "index": index, "signature": name}
    if error is not None:
        record["traceback"] = "".join(traceback.format_exception(error))[-3000:]
    log = failures / "failures.jsonl"
    seen = log.read_text().count(json.dumps(name)) if log.exists() else 0
    if sandbox is not None and seen < SAVED_PER_FAILURE:
        saved = failures / f"{target.kind}-{seed}-{index}"
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(sandbox.folder, saved, symlinks=True)
        record["input"] = str(saved)
    if seen < 100:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")


def silence() -> None:
    """Send what libraries print to nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(null, 1)
    os.dup2(null, 2)
