"""The log of a registry: lines `CHECK JSON`, where CHECK is the SHA-256 of the check before and of the JSON.

So a changed byte is known from a line that was cut short, and a log is another's beginning where one check agrees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from compress.appended import AppendedLines
from compress.cache import storage_errors
from compress.errors import InputError
from compress.registry.entry import ENTRY, VERSION, Began, Entry
from compress.registry.state import State

LOG = "log"
LOCK = "log.lock"


def check_of(before: bytes, body: bytes) -> bytes:
    """The check of a line whose entry is ``body``, behind the check ``before``; that is empty for the first."""
    return hashlib.sha256(before + body).hexdigest().encode()


def is_line(before: bytes, line: bytes) -> bool:
    """Whether a line is whole and follows the one with the check ``before``."""
    check, space, body = line[:64], line[64:65], line[65:]
    return space == b" " and check == check_of(before, body)


class Log:
    """The file in a registry's folder, read on from where it was read to.

    Raises `InputError` for a damaged log, or one that a newer compress began, and `StorageError`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lines = AppendedLines(root / LOG)
        self._forget()

    @property
    def path(self) -> Path:
        """The file."""
        return self._lines.path

    def state(self) -> State:
        """What all entries up to now come to."""
        if self.path.stat().st_size < self._read:
            self._forget()
        lines, rest = self._lines.read(self._read)
        for line in lines:
            self.state_so_far.apply(self._entry(line))
        if rest and is_line(self._check, rest[:-1]):
            raise self._damaged("its line break has changed")
        return self.state_so_far

    def unfinished(self) -> int:
        """Bytes of a line that was cut short; the next writer takes them off."""
        return len(self._lines.read()[1])

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Entry], None]]:
        """Hold the registry, its state up to date; gives what adds an entry, which counts once that returns."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with storage_errors(self.root), FileLock(self.root / LOCK):
            if self.path.exists():
                self.state()
                self._lines.mend()
            yield self._add

    def take(self, lines: list[bytes]) -> None:
        """Add lines that another registry wrote behind the same ones; call it within `writing`."""
        check = self._check
        for line in lines:
            if not is_line(check, line):
                raise self._damaged("what should follow is not what was written")
            check = line[:64]
            ENTRY.validate_json(line[65:])
        if lines:
            self._lines.add(b"\n".join(lines))
        self.state()

    def lines(self) -> list[bytes]:
        """Every line, each checked."""
        self.state()
        return self._lines.read()[0]

    def _add(self, entry: Entry) -> None:
        body = entry.model_dump_json().encode()
        self._lines.add(check_of(self._check, body) + b" " + body)
        self.state()

    def _forget(self) -> None:
        self._read, self._number, self._check = 0, 0, b""
        self.state_so_far = State()

    def _entry(self, line: bytes) -> Entry:
        """The entry of the next line."""
        if not is_line(self._check, line):
            raise self._damaged("it is not what was written")
        body = line[65:]
        if not self._number:
            self._check_version(body)
        try:
            entry = ENTRY.validate_json(body)
        except ValidationError as error:
            raise self._damaged(f"it cannot be read ({error.error_count()} fields)") from error
        if isinstance(entry, Began) != (not self._number):
            raise self._damaged("only the first line begins a registry")
        self._read += len(line) + 1
        self._number += 1
        self._check = line[:64]
        return entry

    def _check_version(self, body: bytes) -> None:
        found = json.loads(body).get("version")
        if isinstance(found, int) and found > VERSION:
            raise InputError(
                f"The registry is of version {found}, which is newer than this compress reads.",
                where=str(self.root),
                expected=f"a registry of version {VERSION}",
                mend="pip install --upgrade compress",
            )

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"Line {self._number + 1} of the registry's log is damaged: {what}.",
            where=str(self.path),
            expected="lines as `compress registry` wrote them; nothing is added behind a damaged one",
            mend=f"put a sound copy of the file {LOG} in its place, from a backup or with `compress registry fetch`; "
            "`compress registry verify` names whatever else is damaged",
        )
