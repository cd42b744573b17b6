"""Finished work by content key: written beside, renamed into place, with a SHA-256 manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from compress.errors import StorageError
from compress.models.model import digest_file, size_bytes

MANIFEST = "manifest.json"
CONTENT = "content"
_PARTIAL = "partial-"


def cache_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of ``parts`` as canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of the distributions a stage calls; one that is missing is recorded as such."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@dataclass(frozen=True)
class Entry:
    """One finished piece of work. ``folder`` holds its files, ``record`` what was said of it."""

    key: str
    folder: Path
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and contents of all files, as hex."""
        return str(self.record["digest"])


class Cache:
    """A folder of entries that several runs may use at once.

    An entry exists once its folder has its final name; a killed writer leaves only a partial folder, which the next
    writer of the same key removes. Raises `StorageError` where the folder cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with _storage(root):
            root.mkdir(parents=True, exist_ok=True)

    def find(self, key: str, on_damage: Callable[[str], None] | None = None) -> Entry | None:
        """The entry of ``key`` after checking every file against the manifest.

        A damaged entry is removed, and ``on_damage`` is told what was wrong with it.
        """
        folder = self.root / key
        with _storage(folder):
            if not folder.exists():
                return None
            wrong, record = _check(folder)
            if wrong is None:
                return Entry(key, folder / CONTENT, record)
            if on_damage is not None:
                on_damage(f"cache entry {key[:12]} ({record.get('name', 'unknown')}): {wrong}; it is made again")
            shutil.rmtree(folder)
        return None

    def peek(self, key: str) -> Entry | None:
        """The entry of ``key`` if its manifest is there, without reading its files."""
        record = _manifest(self.root / key)
        return None if record is None else Entry(key, self.root / key / CONTENT, record)

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other runs from making the same entry; ``on_wait`` is called if another run is making it now."""
        lock = FileLock(self.root / f"{key}.lock")
        with _storage(self.root):
            try:
                lock.acquire(timeout=0.05)
            except TimeoutError:
                on_wait()
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def store(self, key: str, write: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Let ``write`` fill a folder and return its record, then give it its final name.

        Call it within `lock`. Whatever goes wrong, no entry is left; what an earlier, killed run left is removed.
        """
        partial = self.root / f"{_PARTIAL}{key}"
        with _storage(self.root):
            shutil.rmtree(partial, ignore_errors=True)
            (partial / CONTENT).mkdir(parents=True)
        try:
            with _storage(partial):
                record = self._seal(key, partial, dict(write(partial / CONTENT)))
                partial.replace(self.root / key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return Entry(key, self.root / key / CONTENT, record)

    def _seal(self, key: str, partial: Path, record: dict[str, Any]) -> dict[str, Any]:
        files = {}
        for path in sorted(path for path in (partial / CONTENT).rglob("*") if path.is_file()):
            _flush(path)
            name = path.relative_to(partial / CONTENT).as_posix()
            files[name] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
        record |= {"key": key, "files": files, "digest": _digest(files), "created": time.time()}
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps(record, indent=1, sort_keys=True))
        _flush(manifest)
        return record

    def entries(self) -> list[Entry]:
        """Every entry, oldest first, by manifest alone."""
        found = []
        for folder in self.root.iterdir():
            record = _manifest(folder) if folder.is_dir() and not folder.name.startswith(_PARTIAL) else None
            if record is not None and "key" in record:
                found.append(Entry(folder.name, folder / CONTENT, record))
        return sorted(found, key=lambda entry: (entry.record["created"], entry.key))

    def remove(self, key: str) -> int:
        """Remove an entry unless a run is making it; returns the bytes freed."""
        folder = self.root / key
        with _storage(folder), FileLock(self.root / f"{key}.lock", timeout=0.05):
            freed = size_bytes(folder)
            shutil.rmtree(folder)
        (self.root / f"{key}.lock").unlink(missing_ok=True)
        return freed

    def partial_folders(self) -> list[Path]:
        """What killed runs left behind."""
        return sorted(path for path in self.root.iterdir() if path.name.startswith(_PARTIAL))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{files[name]['sha256']}\0".encode())
    return total.hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _check(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with an entry, or ``None``, and its manifest."""
    record = _manifest(folder)
    if record is None or "files" not in record:
        return "its manifest cannot be read", {}
    content = folder / CONTENT
    present = {path.relative_to(content).as_posix() for path in content.rglob("*") if path.is_file()}
    if present != set(record["files"]):
        odd = sorted(present ^ set(record["files"]))[0]
        return f"{odd} is {'missing' if odd not in present else 'not in the manifest'}", record
    for name, facts in record["files"].items():
        if digest_file(content / name) != facts["sha256"]:
            return f"{name} has changed", record
    return None, record


@contextlib.contextmanager
def _storage(place: Path) -> Iterator[None]:
    """Turn the file system's errors into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (28, 122)
        raise StorageError(
            "The disk is full." if full else f"The cache cannot be used: {error.strerror or error}",
            where=str(place),
            mend="free space (`compress cache prune`) or name another folder with --artifacts, then run again; "
            "finished stages are kept"
            if full
            else "check the folder's permissions, or name another folder with --artifacts",
        ) from error
