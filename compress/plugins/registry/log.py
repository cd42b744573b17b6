"""Log of a registry: lines `CHECK JSON`, where CHECK is the SHA-256 of the previous check and of the rest of the line.

A changed byte can thus be distinguished from a truncated line, and one equal check shows that a log is the beginning
of another. In a signed log, a line is `CHECK JSON SIGNATURE`; `LogHead` says what is signed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock
from pydantic import ValidationError

from compress import DISTRIBUTION
from compress.plugins.registry.state import ENTRY, KINDS, VERSION, Began, Entry, State
from compress.utils.errors import InputError
from compress.utils.read_limits import parse_json
from compress.utils.storage import AppendOnlyFile, storage_errors

LOG = "log"
LOCK = "log.lock"
_SIGNATURE = re.compile(rb"(?s)(.*) (U1NIU0lH[A-Za-z0-9+/]+={0,2})")
"""An entry and its signature, whose magic SSHSIG is this base64."""

LogSigner = Callable[[bytes], bytes]
"""Function that returns the signature of a text as base64."""


class NewerRegistryError(InputError):
    """Log with entries of a version that this compress does not read."""


def line_check(previous: bytes, body: bytes) -> bytes:
    """Return the check of a line with the entry ``body`` after the check ``previous``, which is empty at first."""
    return hashlib.sha256(previous + body).hexdigest().encode()


def is_valid_line(previous: bytes, line: bytes) -> bool:
    """Return True if a line is complete and follows the line with the check ``previous``."""
    check, space, body = line[:64], line[64:65], line[65:]
    return space == b" " and check == line_check(previous, body)


def split_signature(body: bytes) -> tuple[bytes, bytes]:
    """Return the entry of a line, and its signature or nothing."""
    match = _SIGNATURE.fullmatch(body)
    return (match[1], match[2]) if match else (body, b"")


@dataclass(frozen=True)
class LogHead:
    """Last line of a log, after a line with the check ``previous``; ``number`` is 0 if there is no line."""

    number: int = 0
    previous: bytes = b""
    line: bytes = b""

    @property
    def check(self) -> bytes:
        """Return the check, which stands for all lines up to this one."""
        return self.line[:64]

    @property
    def signature(self) -> bytes:
        """Return the signature, or nothing."""
        return split_signature(self.line[65:])[1]

    @property
    def signed_text(self) -> bytes:
        """Return the text that the signature covers."""
        return signed_text(self.number, self.previous, split_signature(self.line[65:])[0])


def signed_text(number: int, previous: bytes, entry: bytes) -> bytes:
    """Return the text that is signed for an entry: the number of its line, and the check that it has unsigned.

    This check depends on all lines before, so that the signature fits no other log and no other line.
    """
    return b"compress registry, line %d: %s\n" % (number, line_check(previous, entry))


def head_of(lines: list[bytes]) -> LogHead:
    """Return the last of the lines of a log, whose checks were compared."""
    return LogHead(len(lines), lines[-2][:64] if len(lines) > 1 else b"", lines[-1]) if lines else LogHead()


class LogReader:
    """State while lines are read and checked; ``where`` is their origin for messages.

    Raises `InputError` for a damaged line, or a log that a newer compress began.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.state = State()
        self.head = LogHead()

    def apply(self, lines: Iterable[bytes]) -> Self:
        """Check lines and apply their entries to the state."""
        for line in lines:
            if not is_valid_line(self.head.check, line):
                raise self.damaged("it is not what was written")
            body, _ = split_signature(line[65:])
            try:
                entry = ENTRY.validate_json(body)
            except ValidationError as error:
                # The fields of a newer version may be unknown.
                self._refuse_newer(body)
                raise self.damaged(f"it cannot be read ({error.error_count()} fields)") from error
            if isinstance(entry, Began) and entry.version > VERSION:
                self._refuse_newer(body)
            # A second beginning would reset the versions without a trace.
            if isinstance(entry, Began) != (not self.head.number):
                raise self.damaged("only the first line begins a registry")
            try:
                self.state.apply(entry)
            except ValueError as error:
                raise self.damaged(str(error)) from error
            self.head = LogHead(self.head.number + 1, self.head.check, line)
        return self

    def _refuse_newer(self, body: bytes) -> None:
        """Raise `NewerRegistryError` if a line is of a newer version: its kind is unknown, or it states that version.

        The first line states the version. A newer compress that adds to an older log states its own as `upgraded`.
        """
        try:
            content = parse_json(body)
        except ValueError:
            return
        kind, version = (content.get("kind"), content.get("version")) if isinstance(content, dict) else (None, None)
        if kind in ("began", "upgraded") and isinstance(version, int) and version > VERSION:
            since = f", since line {self.head.number + 1} of its log" if self.head.number else ""
            what = f"The registry is of version {version}{since}, which is newer than this compress reads."
        elif isinstance(kind, str) and kind not in KINDS:
            what = (
                f"Line {self.head.number + 1} of the registry's log is of the kind {kind[:40]!r}. "
                f"Version {VERSION} has no such lines: a newer compress wrote it."
            )
        else:
            return
        raise NewerRegistryError(
            what,
            where=self.where,
            expected=f"a registry of version {VERSION}",
            hint=f"pip install --upgrade {DISTRIBUTION}",
        )

    def damaged(self, reason: str) -> InputError:
        """Return the error for the next line."""
        return InputError(
            f"Line {self.head.number + 1} of the registry's log is damaged: {reason}.",
            where=self.where,
            expected="lines as `compress registry` wrote them; nothing is added behind a damaged one",
            hint=f"put a sound copy of the file {LOG} in its place, from a backup or a remote; "
            "`compress registry verify` names whatever else is damaged",
        )


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

    @property
    def head(self) -> LogHead:
        """Return the last line that was read."""
        return self._reader.head

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
        if unfinished and is_valid_line(self.head.check, unfinished[:-1]):
            raise self._reader.damaged("its line break has changed")
        return self.state_so_far

    def unfinished(self) -> int:
        """Return the bytes of a truncated last line, which the next writer removes."""
        return len(self._lines.read()[1])

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Entry, LogSigner | None], None]]:
        """Lock the registry, update its state, and yield a function that adds an entry durably, signed or not."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        # The lock covers reading and writing, so that an entry always follows from the latest state.
        with storage_errors(self.root), FileLock(self.root / LOCK):
            if self.path.exists():
                self.state()
                # Remove the truncated line of a killed writer before adding another one.
                self._lines.repair()

            def add(entry: Entry, signer: LogSigner | None) -> None:
                body = entry.model_dump_json().encode()
                # The signature is a part of the line, so that a killed writer cannot leave an entry without it.
                if signer is not None:
                    body += b" " + signer(signed_text(self.head.number + 1, self.head.check, body))
                self._lines.add(line_check(self.head.check, body) + b" " + body)
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
