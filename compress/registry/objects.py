"""The files of a registry, each once, by the SHA-256 of its contents; and what is on its way in."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from compress.appended import flush
from compress.cache import storage_errors
from compress.digests import digest_file

OBJECTS = "objects"
INCOMING = "incoming"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Incoming:
    """A folder of files that are on their way in. It is its process's own as long as that lives."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self.folder = folder
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
        return digest

    def admit(self) -> None:
        """Put every file among the objects, also in the place of a damaged one; the registry is held meanwhile."""
        if not self._objects.folder.exists():
            self._objects.folder.mkdir()
            flush(self._objects.root)
        for path in self.folder.iterdir():
            path.replace(self._objects.folder / path.name)
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
    def incoming(self) -> Iterator[Incoming]:
        """A folder for files on their way in; what is left in it at the end is removed."""
        token = uuid.uuid4().hex
        folder = self.root / INCOMING / token
        with storage_errors(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._own(token):
                folder.mkdir()
                try:
                    yield Incoming(folder, self)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _own(self, token: str, wait_seconds: float = -1) -> Iterator[None]:
        path = self.root / INCOMING / f"{token}.lock"
        with FileLock(path, wait_seconds):
            yield
            path.unlink(missing_ok=True)

    def left_behind(self) -> list[str]:
        """What writers that were killed left: names within `incoming`."""
        found = []
        for token in sorted({path.stem for path in self._within(INCOMING)}):
            with contextlib.suppress(TimeoutError), FileLock(self.root / INCOMING / f"{token}.lock", 0):
                found.append(token)
        return found

    def remove_left_behind(self) -> int:
        """Remove that; how many bytes it took that nothing else holds."""
        freed = 0
        for token in self.left_behind():
            with contextlib.suppress(TimeoutError), self._own(token, 0):
                folder = self.root / INCOMING / token
                freed += sum(freed_by(path) for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
        return freed

    def names(self) -> set[str]:
        """What lies in the folder."""
        return {path.name for path in self._within(OBJECTS)}

    def fault(self, digest: str, size_bytes: int | None, thorough: bool = True) -> str | None:
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
