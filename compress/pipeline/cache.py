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
from pathlib import Path
from typing import Any

from filelock import FileLock

from compress.utils.digests import digest_file, size_bytes
from compress.utils.errors import StorageError
from compress.utils.storage import AT_ONCE_SECONDS, locked, storage_errors

MANIFEST = "manifest.json"
CONTENT = "content"
_PARTIAL = "partial-"
_OLD = ".old"
_WORK = ".work"


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

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, as the manifest has them."""
        return sum(file["bytes"] for file in self.record["files"].values())


class Cache:
    """A folder of entries that several runs may use at once. Nothing is written before the first `store`.

    An entry exists once its folder has its final name; a killed writer leaves only a partial folder, which the next
    writer of the same key removes. Raises `StorageError` where the folder cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def obtain(
        self,
        key: str,
        write: Callable[[Path], Mapping[str, Any]],
        on_damage: Callable[[str], None],
        on_wait: Callable[[], None],
    ) -> tuple[Entry, bool]:
        """The entry of ``key``, and whether it was there already; else it is made by ``write``, as `store` says.

        ``on_damage`` is told why an entry has to be made again, and ``on_wait`` is called while another run makes it.
        """
        entry = self.find(key, on_damage)
        if entry is not None:
            return entry, True
        with self.lock(key, on_wait):
            entry = self.find(key)
            return (entry, True) if entry is not None else (self.store(key, write), False)

    def find(self, key: str, on_damage: Callable[[str], None] | None = None) -> Entry | None:
        """The entry of ``key`` after checking every file against the manifest.

        A damaged entry counts as none, and ``on_damage`` is told what is wrong with it; `store` replaces it.
        """
        folder = self.root / key
        with storage_errors(folder):
            if not folder.is_dir():
                return None
            record = _manifest(folder)
            wrong = "its manifest cannot be read" if record is None else _difference(folder / CONTENT, record)
        if record is not None and wrong is None:
            return Entry(key, folder / CONTENT, record)
        if on_damage is not None:
            name = "" if record is None else f" ({record['name']})"
            on_damage(f"cache entry {key[:12]}{name}: {wrong}; it is made again")
        return None

    def peek(self, key: str) -> Entry | None:
        """The entry of ``key`` if its manifest is there, without reading its files."""
        record = _manifest(self.root / key)
        return None if record is None else Entry(key, self.root / key / CONTENT, record)

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other runs from making the same entry; ``on_wait`` is called if another run is making it now."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self._lock(key), on_wait):
                yield

    def _lock(self, key: str) -> Path:
        return self.root / f"{key}.lock"

    def store(self, key: str, write: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """Let ``write`` fill a folder and return its record, then give it its final name, in place of any other.

        The record must have a ``name``. Call it within `lock`. Whatever goes wrong, no entry is left; what an
        earlier, killed run left is removed.
        """
        return self._placed(key, lambda partial: _seal(key, partial, dict(write(partial / CONTENT))))

    def admit(self, key: str, record: dict[str, Any], fill: Callable[[Path], None]) -> Entry:
        """An entry that another cache made, with its record; ``fill`` writes its files. Nothing is done if it is here.

        Raises `StorageError` where the files are not those of the record.
        """
        with self.lock(key, lambda: None):
            return self.find(key) or self._placed(key, lambda partial: _received(key, partial, record, fill))

    def _placed(self, key: str, write: Callable[[Path], dict[str, Any]]) -> Entry:
        partial, final = self.root / f"{_PARTIAL}{key}", self.root / key
        with storage_errors(self.root):
            shutil.rmtree(partial, ignore_errors=True)
            (partial / CONTENT).mkdir(parents=True)
        try:
            with storage_errors(partial):
                record = write(partial)
                self._discard(final)
                partial.replace(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return Entry(key, final / CONTENT, record)

    def scratch(self, key: str) -> Path:
        """A folder, not made yet, for work on an entry that a later run may go on with; call within `lock`."""
        return self.root / f"{_PARTIAL}{key}{_WORK}"

    def drop_scratch(self, key: str) -> None:
        """Remove what `scratch` holds, once the entry is finished."""
        with storage_errors(self.root):
            shutil.rmtree(self.scratch(key), ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Every entry, oldest first, by manifest alone."""
        found = (self.peek(folder.name) for folder in self._folders() if not folder.name.startswith(_PARTIAL))
        return sorted((entry for entry in found if entry), key=lambda entry: (entry.record["created"], entry.key))

    def remove(self, key: str) -> int | None:
        """Remove an entry; returns the bytes freed, or ``None`` where a run is making it now."""
        return self._remove(key, self.root / key)

    def remove_partial(self) -> int:
        """Remove what killed runs left behind, and nothing that a run is writing now; returns the bytes freed."""
        partial = [folder for folder in self._folders() if folder.name.startswith(_PARTIAL)]
        keys = [folder.name.removeprefix(_PARTIAL).removesuffix(_OLD).removesuffix(_WORK) for folder in partial]
        return sum(self._remove(key, folder) or 0 for key, folder in zip(keys, partial, strict=True))

    def _remove(self, key: str, folder: Path) -> int | None:
        with storage_errors(folder), contextlib.suppress(TimeoutError), FileLock(self._lock(key), AT_ONCE_SECONDS):
            freed = size_bytes(folder)
            self._discard(folder)
            self._lock(key).unlink(missing_ok=True)
            return freed
        return None

    def _discard(self, folder: Path) -> None:
        """Take the name away before the files, so that nobody meets half an entry."""
        if not folder.exists():
            return
        old = folder if folder.name.endswith(_OLD) else self.root / f"{_PARTIAL}{folder.name}{_OLD}"
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        shutil.rmtree(old)

    def _folders(self) -> list[Path]:
        with storage_errors(self.root):
            return sorted(path for path in self.root.iterdir() if path.is_dir()) if self.root.exists() else []


def _seal(key: str, partial: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of what lies in ``partial``, with everything on the disk before it returns."""
    files = {}
    for path in sorted(path for path in (partial / CONTENT).rglob("*") if path.is_file()):
        _flush(path)
        name = path.relative_to(partial / CONTENT).as_posix()
        files[name] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
    return _written(partial, record | {"key": key, "files": files, "digest": _digest(files), "created": time.time()})


def _received(key: str, partial: Path, record: dict[str, Any], fill: Callable[[Path], None]) -> dict[str, Any]:
    """Write the files and the manifest of an entry that was sealed elsewhere."""
    fill(partial / CONTENT)
    for path in (partial / CONTENT).rglob("*"):
        if path.is_file():
            _flush(path)
    sealed = record["key"] == key and record["digest"] == _digest(record["files"])
    wrong = _difference(partial / CONTENT, record) if sealed else "its record is of another entry"
    if wrong is not None:
        raise StorageError(f"The cache entry {key[:12]} ({record['name']}) has not arrived whole: {wrong}.")
    return _written(partial, record)


def _written(partial: Path, record: dict[str, Any]) -> dict[str, Any]:
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps(record, indent=1, sort_keys=True))
    _flush(manifest)
    return record


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{files[name]['sha256']}\0".encode())
    return total.hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or ``None`` where it is missing, no JSON, of another entry, or at odds with itself."""
    try:
        record = json.loads((folder / MANIFEST).read_text())
        whole = record["key"] == folder.name and record["digest"] == _digest(record["files"])
        whole = whole and isinstance(record["name"], str) and record["created"] >= 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _difference(content: Path, record: Mapping[str, Any]) -> str | None:
    """How the files in ``content`` differ from the manifest, or ``None``."""
    present = {path.relative_to(content).as_posix() for path in content.rglob("*") if path.is_file()}
    odd = sorted(present ^ set(record["files"]))
    if odd:
        return f"{odd[0]} is {'missing' if odd[0] not in present else 'not in the manifest'}"
    for name, facts in record["files"].items():
        try:
            if digest_file(content / name) != facts["sha256"]:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
    return None
