"""Copy of a registry at any address that fsspec opens, such as `s3://bucket/models` or `sftp://user@host/models`.

Files are stored in pieces, `objects/DIGEST/00000`, so that an interrupted transfer can be resumed on any storage. The
log is stored in parts, `log/FIRST-CHECK`, which are only added. Nothing is renamed or changed, and the files that an
entry names are stored before the entry. A truncated part ends where the checks of its lines end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.plugins.registry.log import LOG, is_line
from compress.plugins.registry.objects import OBJECTS
from compress.utils.append_log import flush
from compress.utils.digests import digest_file
from compress.utils.errors import InputError, MissingExtraError, StorageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PIECE_BYTES = 16 * 2**20
_CLIENTS = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("asyncssh", "Error"),
            ("aiohttp", "ClientError"), ("paramiko", "SSHException"))  # fmt: skip
"""Errors other than `OSError` that storage packages raise, for packages that are imported."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "ssh": "sshfs", "sftp": "sshfs"}


class Remote:
    """Copy of a registry at ``url``.

    Raises:
        StorageError: The address cannot be reached.
        InputError: The address is invalid.
        MissingExtraError: fsspec is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with self._errors():
            self._system, base = _opened(url)
        self._base = base.rstrip("/")

    def lines(self) -> list[bytes]:
        """Return the lines of its log, or nothing if it is empty.

        Raises `StorageError` if lines are missing, or if two machines send at this moment.
        """
        log_lines: list[bytes] = []
        check = b""
        with self._errors():
            parts = self._parts()
            while True:
                rivals = [part for part in parts if _first(part) == len(log_lines) + 1]
                contents = {part: lines for part in rivals if (lines := self._lines_of(part, check))}
                if len(contents) > 1:
                    raise self._incomplete(f"{' and '.join(contents)} in its log are by two who send at once")
                if not contents:
                    break
                log_lines += next(iter(contents.values()))
                check = log_lines[-1][:64]
        if any(_first(part) > len(log_lines) + 1 for part in parts):
            raise self._incomplete(f"line {len(log_lines) + 1} of its log is missing")
        return log_lines

    def _lines_of(self, part: str, check: bytes) -> list[bytes]:
        """Return the complete lines of a part of the log that follow ``check``."""
        lines: list[bytes] = []
        for line in self._system.cat_file(self._path(LOG, part)).split(b"\n")[:-1]:
            if not is_line(check, line):
                break
            lines.append(line)
            check = line[:64]
        return lines

    def add_lines(self, known: list[bytes], lines: list[bytes]) -> None:
        """Add lines after those that are ``known``. Raises `InputError` if another machine adds some at this moment.

        A sender that finds another's part beside its own removes its own, so at least one of two senders does.
        """
        name = f"{len(known) + 1:010d}-{lines[-1][:16].decode()}"
        check = known[-1][:64] if known else b""
        with self._errors():
            self._put(self._path(LOG, name), b"\n".join([*lines, b""]))
            others = [part for part in self._parts() if _first(part) == len(known) + 1 and part != name]
            if not any(self._lines_of(part, check) for part in others):
                return
            self._system.rm_file(self._path(LOG, name))
        raise InputError(
            "Somebody else is sending other entries to this address.",
            where=self.url,
            hint="look what they are: compress registry fetch, into a new folder; or send again",
        )

    def pieces(self) -> dict[str, dict[str, int]]:
        """Return the sizes of the pieces of every file, by digest and name of the piece."""
        sizes: dict[str, dict[str, int]] = defaultdict(dict)
        with self._errors():
            for path, about in self._find(OBJECTS).items():
                digest, _, piece = path.rpartition("/")
                sizes[posixpath.basename(digest)][piece] = about["size"]
        return sizes

    def names(self) -> set[str]:
        """Return the digests of all files."""
        return set(self.pieces())

    def send(self, source: Path, digest: str, there: dict[str, int]) -> int:
        """Send the pieces of a file that are not ``there``, and read each again.

        Returns the number of bytes sent. Raises `StorageError` if a piece arrives with other contents.
        """
        sent = 0
        for name, content in _cut(source):
            if there.get(name) == len(content):
                continue
            path = self._path(OBJECTS, digest, name)
            with self._errors():
                self._put(path, content)
                arrived = self._system.cat_file(path)
            if arrived != content:
                raise StorageError(
                    f"A piece of {digest[:12]} did not arrive as it was sent.", where=path, hint="push again"
                )
            sent += len(content)
        return sent

    def receive(self, digest: str, place: Path, there: dict[str, int]) -> int:
        """Download a file to ``place`` after the pieces that it already contains.

        Returns the number of bytes received. Raises `StorageError` and removes the file if its digest is wrong.
        """
        place.parent.mkdir(parents=True, exist_ok=True)
        size = place.stat().st_size if place.exists() else 0
        received = 0
        if not there or size != sum(there.values()) or digest_file(place) != digest:
            whole = size // PIECE_BYTES
            with self._errors(), place.open("r+b" if size else "wb") as file:
                file.truncate(whole * PIECE_BYTES)
                file.seek(0, os.SEEK_END)
                for name in sorted(there)[whole:]:
                    received += file.write(self._system.cat_file(self._path(OBJECTS, digest, name)))
        flush(place)
        if digest_file(place) != digest:
            place.unlink()
            raise StorageError(
                f"The file {digest[:12]} is {'damaged' if there else 'missing'} at the other end.",
                where=self._path(OBJECTS, digest),
                hint="send it there again from a registry that has it: `compress registry verify --remote` names it",
            )
        return received

    def read(self, digest: str) -> bytes:
        """Return the bytes of a small file."""
        with self._errors():
            return b"".join(self._contents(digest))

    def fault(self, digest: str, size_bytes: int | None = None) -> str | None:
        """Return `missing`, `damaged` or None after reading every byte."""
        total, size = hashlib.sha256(), 0
        with self._errors():
            for content in self._contents(digest):
                total.update(content)
                size += len(content)
        if total.hexdigest() == digest:
            return None
        return "damaged" if size else "missing"

    def _contents(self, digest: str) -> Iterator[bytes]:
        """Yield the pieces of a file."""
        for path in sorted(self._find(f"{OBJECTS}/{digest}")):
            yield self._system.cat_file(path)

    def _parts(self) -> list[str]:
        """Return the names of the parts of the log."""
        return sorted(posixpath.basename(path) for path in self._find(LOG))

    def _find(self, below: str) -> dict[str, Any]:
        """Return the files below a path with their details."""
        self._system.invalidate_cache()
        path = self._path(below)
        try:
            files: dict[str, Any] = self._system.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return files

    def _put(self, path: str, content: bytes) -> None:
        """Write a file."""
        self._system.makedirs(posixpath.dirname(path), exist_ok=True)
        self._system.pipe_file(path, content)

    def _path(self, *parts: str) -> str:
        """Return a path below the address."""
        return posixpath.join(self._base, *parts)

    def _incomplete(self, what: str) -> StorageError:
        """Return the error for a log with missing lines."""
        return StorageError(
            f"The registry at this address is not whole: {what}.",
            where=self.url,
            hint="look at it again in a minute; else send it anew, to another address, from a registry that is whole",
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of the storage's client to `StorageError`."""
        try:
            yield
        except _client_errors() as error:
            raise StorageError(
                f"The remote cannot be reached, or went away: {first_line(error)}",
                where=self.url,
                expected="an address that fsspec opens, and the right to write there",
                hint="give the same command again: what has arrived is not sent again",
            ) from error


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the path in it."""
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError as error:
        raise MissingExtraError("fsspec", "remote", "a remote registry") from error
    protocol = url.partition("://")[0] if "://" in url else "file"
    # sshfs asks no server for its key unless it is told where keys are known from: () is ~/.ssh/known_hosts.
    needs_known_hosts = protocol in ("ssh", "sftp") and "known_hosts" not in conf.get(protocol, {})
    try:
        system, path = fsspec.core.url_to_fs(url, **({"known_hosts": ()} if needs_known_hosts else {}))
    except ImportError as error:
        if protocol in _PACKAGES:
            raise MissingExtraError(_PACKAGES[protocol], "remote", f"{protocol}://") from error
        raise InputError(first_line(error), where=url, hint="install the package that it names") from error
    except ValueError as error:
        raise InputError(
            f"This is no address of a remote: {first_line(error)}",
            where=url,
            expected="s3://bucket/folder, sftp://user@host/folder, or another that fsspec knows",
        ) from error
    return system, str(path)


def _client_errors() -> tuple[type[Exception], ...]:
    """Return the errors that the imported storage packages raise."""
    classes = (getattr(sys.modules.get(module), name, None) for module, name in _CLIENTS)
    return (OSError, *(error for error in classes if error is not None))


def _first(part: str) -> int:
    """Return the number of the first line of a part of the log, or 0 for another file."""
    number = part.partition("-")[0]
    return int(number) if number.isdigit() else 0


def _cut(source: Path) -> Iterable[tuple[str, bytes]]:
    """Yield the pieces of a file, at least one."""
    with source.open("rb") as file:
        number = 0
        while (content := file.read(PIECE_BYTES)) or not number:
            yield f"{number:05d}", content
            number += 1
