"""The files of a registry, each once, by the SHA-256 of its contents; and what is on its way in."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from compress.utils.append_log import flush
from compress.utils.digests import digest_file
from compress.utils.errors import InputError
from compress.utils.storage import storage_errors

OBJECTS = "objects"
INCOMING = "incoming"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Incoming:
    """A folder of files that are on their way in. It is its process's own as long as that lives."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self.folder = folder
        self.sealed: set[str] = set()
        """Digests of the files that are whole."""
        self._objects = objects

    def take(self, source: Path) -> str:
        """Link a file, or copy it where that cannot be done; its digest."""
        beside = self.folder / uuid.uuid4().hex
        try:
            os.link(source.resolve(), beside)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            shutil.copyfile(source, beside)
        return self.seal(beside)

    def put(self, content: bytes) -> str:
        """Write a file; its digest."""
        beside = self.folder / uuid.uuid4().hex
        beside.write_bytes(content)
        return self.seal(beside)

    def seal(self, beside: Path) -> str:
        """Give a file within the folder the name of its digest, its contents on the disk; the digest."""
        flush(beside)
        digest = digest_file(beside)
        beside.replace(self.folder / digest)
        self.sealed.add(digest)
        return digest

    def admit(self, digests: Iterable[str]) -> None:
        """Put files among the objects, also in the place of damaged ones; the registry is held meanwhile."""
        if not self._objects.folder.exists():
            self._objects.folder.mkdir()
            flush(self._objects.root)
        for digest in digests:
            (self.folder / digest).replace(self._objects.path(digest))
        flush(self._objects.folder)


class Objects:
    """The folder `objects` of a registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / OBJECTS

    def path(self, digest: str) -> Path:
        """Where the file of a digest lies."""
        return self.folder / digest

    @contextlib.contextmanager
    def incoming(self, kept: str | None = None) -> Iterator[Incoming]:
        """A folder for files on their way in, which is removed at the end.

        One with a name is kept where something goes wrong, and gone on with; one process at a time has it.
        """
        token = kept or uuid.uuid4().hex
        folder = self.root / INCOMING / token
        with storage_errors(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._own(token):
                folder.mkdir(exist_ok=True)
                try:
                    yield Incoming(folder, self)
                except BaseException:
                    if kept is None:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _own(self, token: str, wait_seconds: float = -1) -> Iterator[None]:
        path = self.root / INCOMING / f"{token}.lock"
        with FileLock(path, wait_seconds):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def left_behind(self) -> list[str]:
        """What writers that were killed left: names within `incoming`."""
        found = []
        for token in sorted({path.stem for path in self._within(INCOMING)}):
            lock = self.root / INCOMING / f"{token}.lock"
            # A writer that lives has its lock before its folder.
            if not lock.exists():
                found.append(token)
                continue
            with contextlib.suppress(TimeoutError), FileLock(lock, 0):
                found.append(token)
        return found

    def remove_left_behind(self) -> int:
        """Remove that; how many bytes it took that nothing else holds."""
        freed = 0
        for token in self.left_behind():
            with contextlib.suppress(TimeoutError), self._own(token, 0):
                folder = self.root / INCOMING / token
                freed += sum(freed_by(path) for path in (folder, *folder.rglob("*")) if path.is_file())
                folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
        return freed

    def names(self) -> set[str]:
        """What lies in the folder."""
        return {path.name for path in self._within(OBJECTS)}

    def sound(self, digest: str) -> Path:
        """Where the file of a digest lies. Raises `InputError` where it is missing or damaged."""
        fault = self.fault(digest)
        if fault is not None:
            raise InputError(
                f"The file {digest[:12]} of the registry is {fault}.",
                where=str(self.path(digest)),
                hint="`compress registry verify` names the versions that need it; register the run of one again",
            )
        return self.path(digest)

    def read(self, digest: str) -> bytes:
        """The bytes of a small file."""
        return self.path(digest).read_bytes()

    def fault(self, digest: str, size_bytes: int | None = None, thorough: bool = True) -> str | None:
        """`missing` or `damaged`, or ``None``; without ``thorough`` a file of the right size is taken for sound."""
        path = self.path(digest)
        if not path.is_file():
            return "missing"
        if size_bytes is not None and path.stat().st_size != size_bytes:
            return "damaged"
        return "damaged" if thorough and digest_file(path) != digest else None

    def _within(self, name: str) -> list[Path]:
        folder = self.root / name
        return sorted(folder.iterdir()) if folder.is_dir() else []


def freed_by(path: Path) -> int:
    """Bytes that removing a file frees: none where it has another name, such as that in its run's folder."""
    found = path.stat()
    return found.st_size if found.st_nlink == 1 else 0
