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
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compress.plugins.registry.contents import contents_of, needed_by, parse_contents
from compress.plugins.registry.log import LOG, LogReader, is_valid_line
from compress.plugins.registry.object_store import OBJECTS
from compress.plugins.registry.registry import Registry, write_pulled
from compress.plugins.registry.state import State, Version
from compress.plugins.registry.trust import Trust
from compress.plugins.registry.upkeep import SILENT, Fault, object_faults
from compress.utils.errors import InputError, MissingExtraError, StorageError, UntrustedError, first_line
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import digest_file, flush, storage_errors

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
        self.url = without_password(url)
        with self._errors():
            try:
                import fsspec
                from fsspec.config import conf
            except ImportError as error:
                raise MissingExtraError("fsspec", "remote", "a remote registry") from error
            protocol = url.partition("://")[0] if "://" in url else "file"
            # sshfs verifies the key of a server only if it is given the file with the keys: () is ~/.ssh/known_hosts.
            needs_known_hosts = protocol in ("ssh", "sftp") and "known_hosts" not in conf.get(protocol, {})
            try:
                system, path = fsspec.core.url_to_fs(url, **({"known_hosts": ()} if needs_known_hosts else {}))
            except ImportError as error:
                if protocol in _PACKAGES:
                    raise MissingExtraError(_PACKAGES[protocol], "remote", f"{protocol}://") from error
                raise InputError(first_line(error), where=self.url, hint="install the package that it names") from error
            except ValueError as error:
                raise self._no_address(first_line(error).replace(url, self.url)) from error
        self._system, self._base = system, str(path).rstrip("/")
        self._contents_of_parts: dict[str, bytes] = {}

    def lines(self) -> list[bytes]:
        """Return the lines of its log, or nothing if it is empty.

        Raises `StorageError` if lines are missing, or if two machines send at this moment.
        """
        lines, problem = self._merged()
        if problem:
            raise self._incomplete(problem)
        return lines

    def _merged(self) -> tuple[list[bytes], str]:
        """Return the lines of all parts of the log, and why they are not the whole log, which is empty if they are.

        Two senders of the same registry may write parts that overlap, and a part that is still written grows.
        """
        lines: list[bytes] = []
        with self._errors():
            for part in sorted(sizes := self._parts(), key=_first):
                start = _first(part) - 1
                if start > len(lines):
                    return lines, f"line {len(lines) + 1} of its log is missing"
                content = self._read_part(part, sizes[part])
                # Lines that do not follow those before them are truncated or abandoned.
                added = _following(content, lines[start - 1][:64] if start else b"")
                common = min(len(added), len(lines) - start)
                if added[:common] != lines[start : start + common]:
                    return lines, f"{part} and another part of its log are by two who send at once"
                lines += added[common:]
        return lines, ""

    def _read_part(self, part: str, size: int) -> bytes:
        """Return a part of the log, which is read again only if it has grown."""
        if part not in self._contents_of_parts or len(self._contents_of_parts[part]) != size:
            self._contents_of_parts[part] = self._system.cat_file(self._path(LOG, part))
        return self._contents_of_parts[part]

    def add_lines(self, present: list[bytes], lines: list[bytes]) -> None:
        """Add lines after those that are present. Raises `InputError` if another machine adds some at this moment."""
        part, content = f"{len(present) + 1:010d}-{lines[-1][:16].decode()}", b"\n".join([*lines, b""])
        path = self._path(LOG, part)
        with self._errors():
            # Write first and look for rivals afterwards: of two senders, at least one sees the other's part and removes
            # its own. Another sender of the same registry is no rival.
            self._put(path, content)
            merged, problem = self._merged()
            if not problem and merged[: len(present) + len(lines)] == [*present, *lines]:
                return
            self._system.rm_file(path)
        if self._contents_of_parts.get(part, content) != content:
            raise StorageError("A part of the log did not arrive as it was sent.", where=path, hint="push again")
        raise InputError(
            "Somebody else is sending other entries to this address.",
            where=self.url,
            hint="look at them: compress registry fetch, into a new folder; or send again",
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

    def send(self, source: Path, digest: str, present: dict[str, int], is_verified: bool) -> int:
        """Send the pieces of a file that are not present at the address, and read each again.

        Args:
            source: The file.
            digest: Its digest.
            present: Sizes of the pieces at the address.
            is_verified: An entry at the address names the file, so that its pieces were read when they were sent.
                Otherwise a piece of the right size is compared, since it may be what an interrupted push left.

        Returns:
            The number of bytes sent.

        Raises:
            StorageError: A piece arrives with other contents.
        """
        sent = 0
        for name, content in _cut(source):
            path = self._path(OBJECTS, digest, name)
            with self._errors():
                if present.get(name) == len(content) and (is_verified or self._system.cat_file(path) == content):
                    continue
                self._put(path, content)
                # Read the piece back, since some storages report success too early.
                arrived = self._system.cat_file(path)
            if arrived != content:
                raise StorageError(
                    f"A piece of {digest[:12]} did not arrive as it was sent.", where=path, hint="push again"
                )
            sent += len(content)
        return sent

    def receive(self, digest: str, target: Path, pieces: dict[str, int]) -> int:
        """Download a file to ``target`` after the pieces that it already contains.

        Returns the number of bytes received. Raises `StorageError` and removes the file if its digest is wrong.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        size = target.stat().st_size if target.exists() else 0
        received = 0
        if not pieces or size != sum(pieces.values()) or digest_file(target) != digest:
            # Resume after the last complete piece, since the rest may be truncated.
            complete = size // PIECE_BYTES
            with storage_errors(target), target.open("r+b" if size else "wb") as file:
                file.truncate(complete * PIECE_BYTES)
                file.seek(0, os.SEEK_END)
                for name in sorted(pieces)[complete:]:
                    # Only reading can fail because of the remote.
                    with self._errors():
                        content = self._system.cat_file(self._path(OBJECTS, digest, name))
                    received += file.write(content)
        flush(target)
        if digest_file(target) != digest:
            target.unlink()
            raise StorageError(
                f"The file {digest[:12]} is {'damaged' if pieces else 'missing'} at the other end.",
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

    def _parts(self) -> dict[str, int]:
        """Return the sizes of the parts of the log by their names."""
        sizes = {posixpath.basename(path): about["size"] for path, about in self._find(LOG).items()}
        return {part: size for part, size in sizes.items() if _first(part)}

    def _find(self, below: str) -> dict[str, dict[str, Any]]:
        """Return the files below a path with their details."""
        # fsspec caches listings, which would hide the pieces of another sender.
        self._system.invalidate_cache()
        path = self._path(below)
        try:
            return dict(self._system.find(path, detail=True))
        except FileNotFoundError:
            return {}

    def _put(self, path: str, content: bytes) -> None:
        """Write a file."""
        self._system.makedirs(posixpath.dirname(path), exist_ok=True)
        self._system.pipe_file(path, content)

    def _path(self, *parts: str) -> str:
        """Return a path below the address."""
        return posixpath.join(self._base, *parts)

    def _no_address(self, reason: str) -> InputError:
        """Return the error for an address at which no registry can be."""
        return InputError(
            f"This is no address of a remote: {reason}",
            where=self.url,
            expected="s3://bucket/folder, sftp://user@host/folder, or another that fsspec knows",
        )

    def _incomplete(self, what: str) -> StorageError:
        """Return the error for a log with missing lines."""
        return StorageError(
            f"The registry at this address is not complete: {what}.",
            where=self.url,
            hint="look at it again in a minute; else send a complete registry to another address",
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of the storage's client to `StorageError`."""
        # A client can only raise its errors once it is imported, so an absent module needs no handling.
        classes = (getattr(sys.modules.get(module), name, None) for module, name in _CLIENTS)
        expected: tuple[type[Exception], ...] = (OSError, *filter(None, classes))
        try:
            yield
        except NotImplementedError as error:
            # Addresses such as data:,x contain a file and have no folders.
            raise self._no_address("this kind of address has no folders, or none that can be written to") from error
        except expected as error:
            raise StorageError(
                f"The remote cannot be reached, or went away: {first_line(error)}",
                where=self.url,
                expected="an address that fsspec opens, and the right to write there",
                hint="give the same command again: what has arrived is not sent again",
            ) from error


def without_password(url: str) -> str:
    """Return an address without the password of its user, for messages."""
    return re.sub(r"(://[^/:@]*):[^/]*@", r"\1:***@", url)


def _first(part: str) -> int:
    """Return the number of the first line of a part of the log, or 0 for another file."""
    number = part.partition("-")[0]
    return int(number) if number.isdigit() else 0


def _following(content: bytes, check: bytes) -> list[bytes]:
    """Return the complete lines at the beginning of a part of the log that follow ``check``."""
    lines: list[bytes] = []
    for line in content.split(b"\n")[:-1]:
        if not is_valid_line(check, line):
            break
        lines.append(line)
        check = line[:64]
    return lines


def _cut(source: Path) -> Iterable[tuple[str, bytes]]:
    """Yield the pieces of a file, at least one."""
    with source.open("rb") as file:
        number = 0
        # An empty file has one empty piece, so that its existence is recorded.
        while (content := file.read(PIECE_BYTES)) or not number:
            yield f"{number:05d}", content
            number += 1


FETCHED = "fetched"


class Transfer(Frozen):
    """Number of new entries of the log, files, and bytes that a transfer moved."""

    entries: int
    files: int
    bytes: int


def push(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Send what a remote lacks: first the files, each piece of which is read again, then the entries that name them.

    Raises `InputError` if the remote has entries that this registry lacks, and `UntrustedError` if the log must be
    signed and is not.
    """
    registry.state()
    registry.trust.check(registry.log.head, str(registry.log.path))
    lines, remote_lines = registry.log.lines(), remote.lines()
    _check_begins(lines, remote_lines, f"compress registry fetch {remote.url}, into a new folder, and register there")
    # Whether an entry at the address names a file, by its digest.
    pieces, sent, digests = remote.pieces(), 0, dict[str, bool]()
    remote_versions = LogReader(remote.url).apply(remote_lines).state.versions
    for version in registry.log.state_so_far.all():
        if not version.collected:
            is_there = version.number in remote_versions.get(version.name, {})
            for digest in needed_by(version, registry.contents(version)):
                digests[digest] = digests.get(digest, False) or is_there
    for digest, is_verified in progress.track(digests.items(), "sending files", len(digests)):
        sent += remote.send(registry.objects.verified_path(digest), digest, pieces.get(digest, {}), is_verified)
    # Send entries last: an entry on the remote only names files that are there.
    if len(lines) > len(remote_lines):
        remote.add_lines(remote_lines, lines[len(remote_lines) :])
    registry.trust.remember(lines)
    return Transfer(entries=len(lines) - len(remote_lines), files=len(digests), bytes=sent)


def fetch(registry: Registry, remote: Remote, progress: Progress = SILENT) -> Transfer:
    """Download what this registry lacks.

    Raises `InputError` if it has entries that the remote lacks, and the errors of `Trust.check_remote`.
    """
    lines, local_lines = remote.lines(), registry.log.lines()
    # The signature is checked before anything that the lines say is read.
    registry.trust.check_remote(lines, remote.url)
    state = _read(remote, lines)
    _check_begins(lines, local_lines, f"compress registry push {remote.url}, or fetch into a new folder")

    pieces, present, received = remote.pieces(), registry.objects.names(), 0
    # The folder has a fixed name, so that files of an interrupted fetch are used again.
    with registry.objects.incoming(FETCHED) as incoming:
        # Dictionaries with the value None serve as ordered sets.
        new: dict[str, None] = {}
        needed: dict[str, None] = {}

        def download(digest: str) -> int:
            if digest in present or digest in new:
                return 0
            new[digest] = None
            return remote.receive(digest, incoming.folder / digest, pieces.get(digest, {}))

        # The record of a version lists its files, so records come first.
        for version in state.all():
            if not version.collected:
                received += download(version.record)
                record_folder = incoming.folder if version.record in new else registry.objects.folder
                contents = parse_contents(version, (record_folder / version.record).read_bytes())
                needed.update(dict.fromkeys(needed_by(version, contents)))
        received += sum(map(download, progress.track(needed, "downloading files", len(needed))))
        # Both may have changed during the download. Compare again under the lock.
        with registry.log.writing():
            latest_lines = registry.log.lines()
            _check_begins(lines, latest_lines, "give the command again")
            if needed.keys() - new.keys() - registry.objects.names():
                raise InputError("Files were removed here meanwhile.", hint="give the command again, beside no `gc`")
            incoming.admit(new)
            registry.log.append(lines[len(latest_lines) :])
    return Transfer(entries=len(lines) - len(local_lines), files=len(new), bytes=received)


def _read(remote: Remote, lines: list[bytes]) -> State:
    """Return the state after the lines of a remote's log. Raises `InputError` if there are none."""
    if not lines:
        raise InputError(
            "There is no registry at this address.",
            where=remote.url,
            hint=f"send one there: compress registry push {remote.url}",
        )
    return LogReader(remote.url).apply(lines).state


def pull_remote(
    remote: Remote, reference: str, output: Path, replace: bool = False, trust: Trust | None = None
) -> Version:
    """Download one version into a folder, as `Registry.pull` does. An interrupted download is resumed.

    Args:
        remote: The remote.
        reference: Reference of the version.
        output: Folder to create.
        replace: Replace a folder that was pulled before.
        trust: Keys that must have signed the log.

    Returns:
        The version.
    """
    lines = remote.lines()
    if trust is not None:
        trust.check_remote(lines, remote.url)
    state = _read(remote, lines)
    version = state.require_active(state.find(reference))
    contents = contents_of(version, remote)
    pieces = remote.pieces()
    # The name is always the same, so that the next call finds and resumes an interrupted download.
    unfinished = output.with_name(f".{output.name}.part")

    def download(digest: str, target: Path) -> None:
        part = unfinished / digest
        remote.receive(digest, part, pieces.get(digest, {}))
        shutil.copyfile(part, target)

    write_pulled(version, contents, output, replace, download)
    shutil.rmtree(unfinished, ignore_errors=True)
    return version


def verify_remote(remote: Remote, progress: Progress = SILENT, trust: Trust | None = None) -> tuple[Fault, ...]:
    """Return every damaged, missing or surplus file of a remote after reading all, or only its log if it is untrusted.

    A broken log raises an error.
    """
    lines = remote.lines()
    try:
        if trust is not None:
            trust.check_remote(lines, remote.url)
    except UntrustedError as error:
        return (Fault(path=LOG, fault="untrusted", why=error.what),)
    return tuple(object_faults(_read(remote, lines), remote, progress))


def _check_begins(lines: list[bytes], beginning: list[bytes], hint: str) -> None:
    """Raise `InputError` unless ``lines`` begin with ``beginning``. One equal check stands for all lines before it."""
    if len(beginning) <= len(lines) and (not beginning or lines[len(beginning) - 1][:64] == beginning[-1][:64]):
        return
    # Name the first difference in the error.
    common = sum(line == other for line, other in zip(lines, beginning, strict=False))
    raise InputError(
        f"The two registries part after line {common} of their logs.",
        expected="one that has every entry of the other",
        hint=hint,
    )
