"""Files of a registry, each stored once under the SHA-256 of its contents, and files that are being added."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from compress.utils.errors import InputError
from compress.utils.storage import digest_file, flush, storage_errors

OBJECTS = "objects"
INCOMING = "incoming"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Incoming:
    """Folder of files that are being added. It belongs to its process while that lives."""

    def __init__(self, folder: Path, objects: ObjectStore) -> None:
        self.folder = folder
        self.sealed: set[str] = set()
        """Digests of the complete files."""
        self._objects = objects

    def take(self, source: Path) -> str:
        """Link a file into the folder, or copy it if a link is impossible. Return its digest."""
        target = self.folder / uuid.uuid4().hex
        try:
            # A hard link costs no space, and the file stays if the run's folder is removed.
            os.link(source.resolve(), target)
        except OSError as error:
            # A copy would fail as well on a full disk.
            if error.errno in _NO_ROOM:
                raise
            shutil.copyfile(source, target)
        return self.seal(target)

    def put(self, content: bytes) -> str:
        """Write a file and return its digest."""
        target = self.folder / uuid.uuid4().hex
        target.write_bytes(content)
        return self.seal(target)

    def seal(self, path: Path) -> str:
        """Rename a file of the folder to its digest once its contents are on the disk. Return the digest."""
        # Flush before the rename, so that a file under its digest is complete even after a power failure.
        flush(path)
        digest = digest_file(path)
        path.replace(self.folder / digest)
        self.sealed.add(digest)
        return digest

    def admit(self, digests: Iterable[str]) -> None:
        """Move files to the objects, also in place of damaged ones. The caller holds the lock of the registry."""
        # Flush the parent folder, so that the new folder itself survives a power failure.
        if not self._objects.folder.exists():
            self._objects.folder.mkdir()
            flush(self._objects.root)
        for digest in digests:
            (self.folder / digest).replace(self._objects.path(digest))
        # The files' names must be on the disk before an entry refers to them.
        flush(self._objects.folder)


class ObjectStore:
    """Folder `objects` of a registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / OBJECTS

    def path(self, digest: str) -> Path:
        """Return the path of the file with a digest."""
        return self.folder / digest

    @contextlib.contextmanager
    def incoming(self, resumable: str | None = None) -> Iterator[Incoming]:
        """Open a folder for files that are being added; it is removed at the end.

        A folder with the name ``resumable`` remains after an error. One process at a time holds it.
        """
        token = resumable or uuid.uuid4().hex
        folder = self.root / INCOMING / token
        with storage_errors(self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(token):
                folder.mkdir(exist_ok=True)
                try:
                    yield Incoming(folder, self)
                except BaseException:
                    if resumable is None:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, token: str, wait_seconds: float = -1) -> Iterator[None]:
        """Hold the lock of a folder of incoming files."""
        path = self.root / INCOMING / f"{token}.lock"
        with FileLock(path, wait_seconds):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def abandoned(self) -> list[str]:
        """Return the names within `incoming` that killed writers left."""
        tokens = []
        for token in sorted({path.stem for path in self._within(INCOMING)}):
            lock = self.root / INCOMING / f"{token}.lock"
            # A running writer creates its lock before its folder. A lock that can be taken at once is nobody's.
            with contextlib.suppress(TimeoutError), FileLock(lock, 0) if lock.exists() else contextlib.nullcontext():
                tokens.append(token)
        return tokens

    def remove_abandoned(self) -> int:
        """Remove what killed writers left, and return the number of bytes that this frees."""
        freed = 0
        for token in self.abandoned():
            with contextlib.suppress(TimeoutError), self._lock(token, 0):
                folder = self.root / INCOMING / token
                freed += sum(freed_bytes(path) for path in (folder, *folder.rglob("*")) if path.is_file())
                folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
        return freed

    def names(self) -> set[str]:
        """Return the names of all files."""
        return {path.name for path in self._within(OBJECTS)}

    def verified_path(self, digest: str) -> Path:
        """Return the path of the file with a digest. Raises `InputError` if it is missing or damaged."""
        if fault := self.fault(digest):
            raise InputError(
                f"The file {digest[:12]} of the registry is {fault}.",
                where=str(self.path(digest)),
                hint="`compress registry verify` names the versions that need it; register the run of one again",
            )
        return self.path(digest)

    def read(self, digest: str) -> bytes:
        """Return the bytes of a small file."""
        return self.path(digest).read_bytes()

    def fault(self, digest: str, size_bytes: int | None = None, thorough: bool = True) -> str | None:
        """Return `missing`, `damaged` or None. Without ``thorough`` a file of the right size counts as undamaged."""
        path = self.path(digest)
        if not path.is_file():
            return "missing"
        # The size is checked first, since it costs nothing.
        if size_bytes is not None and path.stat().st_size != size_bytes:
            return "damaged"
        return "damaged" if thorough and digest_file(path) != digest else None

    def _within(self, name: str) -> list[Path]:
        """Return the entries of a folder of the registry."""
        folder = self.root / name
        return sorted(folder.iterdir()) if folder.is_dir() else []


def freed_bytes(path: Path) -> int:
    """Return the bytes that removing a file frees: 0 if it has another hard link, as in its run's folder."""
    status = path.stat()
    return status.st_size if status.st_nlink == 1 else 0
