"""Cache of finished work by content key: written beside, renamed into place, with a SHA-256 manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from compress.utils.errors import StorageError
from compress.utils.storage import AT_ONCE_SECONDS, digest_file, flush, locked, size_bytes, storage_errors

MANIFEST = "manifest.json"
CONTENT = "content"
_PARTIAL = "partial-"
_OLD = ".old"
_WORK = ".work"


@dataclass(frozen=True)
class Entry:
    """One finished piece of work. ``folder`` holds its files, ``record`` its description."""

    key: str
    folder: Path
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return the SHA-256 over the names and contents of all files, as hex."""
        return str(self.record["digest"])

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all files according to the manifest."""
        return sum(file["bytes"] for file in self.record["files"].values())


@dataclass(frozen=True)
class Cache:
    """Folder of entries that several runs may use at once. Nothing is written before the first `store`.

    An entry exists once its folder has its final name. A killed writer leaves only a partial folder, which the next
    writer of the same key removes. Methods raise `StorageError` if the folder cannot be read or written.
    """

    root: Path

    def obtain(
        self,
        key: str,
        write: Callable[[Path], Mapping[str, Any]],
        on_damage: Callable[[str], None],
        on_wait: Callable[[], None],
    ) -> tuple[Entry, bool]:
        """Return the entry of ``key`` and True if it was cached; else compute it as `store` does.

        Args:
            key: Content key.
            write: Writes the files into a folder and returns the record.
            on_damage: Called with the reason if a damaged entry is replaced.
            on_wait: Called if another run computes the entry now.
        """
        entry = self.find(key, on_damage)
        if entry is not None:
            return entry, True
        # Another run may have stored the entry while this one waited for the lock, so look again.
        with self.lock(key, on_wait):
            entry = self.find(key)
            return (entry, True) if entry is not None else (self.store(key, write), False)

    def find(self, key: str, on_damage: Callable[[str], None] | None = None) -> Entry | None:
        """Return the entry of ``key`` after checking every file against the manifest, or None.

        A damaged entry counts as missing: ``on_damage`` is called with the reason, and `store` replaces it.
        """
        folder = self.root / key
        with storage_errors(folder):
            if not folder.is_dir():
                return None
            record = _manifest(folder)
            damage = "its manifest cannot be read" if record is None else _difference(folder / CONTENT, record)
        if record is not None and damage is None:
            return Entry(key, folder / CONTENT, record)
        if on_damage is not None:
            name = "" if record is None else f" ({record['name']})"
            on_damage(f"cache entry {key[:12]}{name}: {damage}; it is recomputed")
        return None

    def peek(self, key: str) -> Entry | None:
        """Return the entry of ``key`` by its manifest alone, without reading its files, or None."""
        record = _manifest(self.root / key)
        return None if record is None else Entry(key, self.root / key / CONTENT, record)

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Prevent other runs from computing the same entry; ``on_wait`` is called if one is doing so now."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root / f"{key}.lock", on_wait):
                yield

    def store(self, key: str, write: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Let ``write`` fill a folder and return its record, then rename it into place, replacing any other entry.

        The record must have a ``name``. Call it within `lock`. If an error occurs, no entry is left. Files of a killed
        run are removed.
        """
        partial, final = self.root / f"{_PARTIAL}{key}", self.root / key
        with storage_errors(self.root):
            shutil.rmtree(partial, ignore_errors=True)
            (partial / CONTENT).mkdir(parents=True)
        try:
            with storage_errors(partial):
                # The manifest is written last. A folder with a valid manifest is complete.
                record = _seal(key, partial, write(partial / CONTENT))
                self._discard(final)
                partial.replace(final)
        # Also on Ctrl-C: a partial folder must not stay.
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return Entry(key, final / CONTENT, record)

    def admit(self, key: str, record: dict[str, Any], fill: Callable[[Path], None]) -> Entry:
        """Add an entry of another cache with its record; ``fill`` writes its files. An existing entry is kept.

        Raises `StorageError` if the files do not match the record.
        """

        def receive(content: Path) -> Mapping[str, Any]:
            fill(content)
            # Trust no record of another machine: its digest must fit its own list of files, and the files must fit too.
            sealed = record["key"] == key and record["digest"] == _digest(record["files"])
            damage = _difference(content, record) if sealed else "its record belongs to another entry"
            if damage is not None:
                raise StorageError(f"The cache entry {key[:12]} ({record['name']}) is incomplete: {damage}.")
            return record

        with self.lock(key, lambda: None):
            return self.find(key) or self.store(key, receive)

    def scratch(self, key: str) -> Path:
        """Return a folder, not created yet, for work on an entry that a later run may resume. Call it within `lock`."""
        return self.root / f"{_PARTIAL}{key}{_WORK}"

    def drop_scratch(self, key: str) -> None:
        """Remove the `scratch` folder of a finished entry."""
        with storage_errors(self.root):
            shutil.rmtree(self.scratch(key), ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Return all entries by their manifests, the oldest first."""
        candidates = (self.peek(folder.name) for folder in self._folders() if not folder.name.startswith(_PARTIAL))
        return sorted((entry for entry in candidates if entry), key=lambda entry: (entry.record["created"], entry.key))

    def remove(self, key: str) -> int | None:
        """Remove an entry and return the bytes freed, or None if a run computes it now."""
        return self._remove(key, self.root / key)

    def remove_partial(self) -> int:
        """Remove files of killed runs, but nothing that a run writes now; return the bytes freed."""
        partial = [folder for folder in self._folders() if folder.name.startswith(_PARTIAL)]
        # The name of a partial folder contains the key whose lock protects it.
        keys = [folder.name.removeprefix(_PARTIAL).removesuffix(_OLD).removesuffix(_WORK) for folder in partial]
        return sum(self._remove(key, folder) or 0 for key, folder in zip(keys, partial, strict=True))

    def _remove(self, key: str, folder: Path) -> int | None:
        """Remove a folder under the entry's lock and return the bytes freed, or None if the lock is held."""
        lock = self.root / f"{key}.lock"
        with storage_errors(folder), contextlib.suppress(TimeoutError), FileLock(lock, AT_ONCE_SECONDS):
            freed = size_bytes(folder)
            self._discard(folder)
            lock.unlink(missing_ok=True)
            return freed
        return None

    def _discard(self, folder: Path) -> None:
        """Remove an entry's folder. It is renamed first, so that no other run finds half an entry."""
        if not folder.exists():
            return
        old = folder if folder.name.endswith(_OLD) else self.root / f"{_PARTIAL}{folder.name}{_OLD}"
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        """Return all folders of the cache, sorted."""
        with storage_errors(self.root):
            return sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.exists() else []


def _seal(key: str, partial: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a partial folder, with all files flushed to disk before it returns."""
    paths = sorted(path for path in (partial / CONTENT).rglob("*") if path.is_file())
    for path in paths:
        flush(path)
    # The record of another cache lists its files, which were compared with it already.
    files = record.get("files") or {
        path.relative_to(partial / CONTENT).as_posix(): {"sha256": digest_file(path), "bytes": path.stat().st_size}
        for path in paths
    }
    sealed = {"created": time.time(), **record, "key": key, "files": files, "digest": _digest(files)}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps(sealed, indent=1, sort_keys=True))
    flush(manifest)
    return sealed


def _digest(files: Mapping[str, Mapping[str, object]]) -> str:
    """Return the digest over names and contents of all files of a manifest."""
    total = hashlib.sha256()
    for name in sorted(files):
        # The null byte cannot occur in a name, so no two lists of files give the same bytes.
        total.update(f"{name}\0{files[name]['sha256']}\0".encode())
    return total.hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest, or None if it is missing, not JSON, of another entry, or inconsistent."""
    try:
        record = json.loads((folder / MANIFEST).read_text())
        consistent = record["key"] == folder.name and record["digest"] == _digest(record["files"])
        consistent = consistent and isinstance(record["name"], str) and record["created"] >= 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if consistent else None


def _difference(content: Path, record: Mapping[str, Any]) -> str | None:
    """Return the first difference between the files in ``content`` and the manifest, or None."""
    # Compare names before contents: this needs no reading of large files.
    present = {path.relative_to(content).as_posix() for path in content.rglob("*") if path.is_file()}
    differing = sorted(present ^ set(record["files"]))
    if differing:
        return f"{differing[0]} is {'missing' if differing[0] not in present else 'not in the manifest'}"
    for name, file in record["files"].items():
        try:
            if digest_file(content / name) != file["sha256"]:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
    return None
