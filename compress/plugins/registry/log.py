"""Log of a registry: lines `CHECK JSON`, where CHECK is the SHA-256 of the previous check and of the JSON.

A changed byte can thus be distinguished from a truncated line, and one equal check shows that a log is the beginning
of another.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from filelock import FileLock
from pydantic import ValidationError

from compress import DISTRIBUTION
from compress.plugins.registry.state import ENTRY, VERSION, Began, Entry, State
from compress.utils.errors import InputError
from compress.utils.read_limits import parse_json
from compress.utils.storage import AppendOnlyFile, storage_errors

LOG = "log"
LOCK = "log.lock"


def line_check(previous: bytes, body: bytes) -> bytes:
    """Return the check of a line with the entry ``body`` after the check ``previous``, which is empty at first."""
    return hashlib.sha256(previous + body).hexdigest().encode()


def is_valid_line(previous: bytes, line: bytes) -> bool:
    """Return True if a line is complete and follows the line with the check ``previous``."""
    check, space, body = line[:64], line[64:65], line[65:]
    return space == b" " and check == line_check(previous, body)


class LogReader:
    """State while lines are read and checked; ``where`` is their origin for messages.

    Raises `InputError` for a damaged line, or a log that a newer compress began.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.state = State()
        self.check = b""
        self.number = 0

    def apply(self, lines: Iterable[bytes]) -> Self:
        """Check lines and apply their entries to the state."""
        for line in lines:
            if not is_valid_line(self.check, line):
                raise self.damaged("it is not what was written")
            body = line[65:]
            # Check the version before the fields, since the fields of a newer version may be unknown.
            if not self.number:
                version = _version(body)
                if version > VERSION:
                    raise InputError(
                        f"The registry is of version {version}, which is newer than this compress reads.",
                        where=self.where,
                        expected=f"a registry of version {VERSION}",
                        hint=f"pip install --upgrade {DISTRIBUTION}",
                    )
            try:
                entry = ENTRY.validate_json(body)
            except ValidationError as error:
                raise self.damaged(f"it cannot be read ({error.error_count()} fields)") from error
            # A second beginning would reset the versions without a trace.
            if isinstance(entry, Began) != (not self.number):
                raise self.damaged("only the first line begins a registry")
            try:
                self.state.apply(entry)
            except ValueError as error:
                raise self.damaged(str(error)) from error
            # The check of a line stands for all lines up to it.
            self.check = line[:64]
            self.number += 1
        return self

    def damaged(self, reason: str) -> InputError:
        """Return the error for the next line."""
        return InputError(
            f"Line {self.number + 1} of the registry's log is damaged: {reason}.",
            where=self.where,
            expected="lines as `compress registry` wrote them; nothing is added behind a damaged one",
            hint=f"put a sound copy of the file {LOG} in its place, from a backup or a remote; "
            "`compress registry verify` names whatever else is damaged",
        )


def _version(body: bytes) -> int:
    """Return the version that the first line of a log states, or 0 if it states none."""
    try:
        content = parse_json(body)
    except ValueError:
        return 0
    version = content.get("version") if isinstance(content, dict) else None
    return version if isinstance(version, int) else 0


class Log:
    """Log file in a registry's folder, which is read from where the last reading ended.

    Raises `InputError` for a damaged log, or one that a newer compress began, and `StorageError`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lines = AppendOnlyFile(root / LOG)
        self._restart()

    @property
    def path(self) -> Path:
        """Return the path of the file."""
        return self._lines.path

    @property
    def state_so_far(self) -> State:
        """Return the state after the entries that were read."""
        return self._reader.state

    def state(self) -> State:
        """Return the state after all present entries."""
        # A shorter file is another log, such as a backup that was put in its place.
        if self.path.stat().st_size < self._read_bytes:
            self._restart()
        lines, unfinished = self._lines.read(self._read_bytes)
        for line in lines:
            self._reader.apply([line])
            self._read_bytes += len(line) + 1
        # A valid entry with a wrong line break was damaged. Other bytes are a truncated line, which the next writer
        # removes.
        if unfinished and is_valid_line(self._reader.check, unfinished[:-1]):
            raise self._reader.damaged("its line break has changed")
        return self.state_so_far

    def unfinished(self) -> int:
        """Return the bytes of a truncated last line, which the next writer removes."""
        return len(self._lines.read()[1])

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Entry], None]]:
        """Lock the registry, update its state, and yield a function that adds an entry durably."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        # The lock covers reading and writing, so that an entry always follows from the latest state.
        with storage_errors(self.root), FileLock(self.root / LOCK):
            if self.path.exists():
                self.state()
                # Remove the truncated line of a killed writer before adding another one.
                self._lines.repair()

            def add(entry: Entry) -> None:
                body = entry.model_dump_json().encode()
                self._lines.add(line_check(self._reader.check, body) + b" " + body)
                self.state()

            yield add

    def append(self, lines: list[bytes]) -> None:
        """Add checked lines that another registry wrote after the same lines; only within `writing`."""
        if lines:
            # All lines are added in one write.
            self._lines.add(b"\n".join(lines))
        self.state()

    def lines(self) -> list[bytes]:
        """Return every line after checking it, or nothing if there is no file."""
        if not self.path.is_file():
            return []
        self.state()
        return self._lines.read()[0]

    def _restart(self) -> None:
        """Start reading from the beginning."""
        self._read_bytes, self._reader = 0, LogReader(str(self.path))
