"""Fetch samples into the user's cache: verified, unpacked into their folder alone, put in place in one step."""

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
from typing import IO, Any

from compress.samples.clients import apt_download, npm_download, pip_download, unpacked_tar, wrong_digest
from compress.samples.sample import Manager, Package, Sample, find_sample
from compress.utils.archive_members import is_plain, objection
from compress.utils.digests import digest_file
from compress.utils.environment import user_cache
from compress.utils.errors import SampleError, StorageError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import locked

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
    return user_cache() / "samples"


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
            hint="free some space, or set XDG_CACHE_HOME to a folder that can be written",
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


Files = dict[str, Callable[[], IO[bytes]]]
"""What opens each file of an archive, by its path there."""


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write each member (path in the archive -> path below ``folder``) as a plain file: no mode, owner or time.

    Raises `SampleError` for a damaged archive, a missing member, and for an archive in which any entry has an
    absolute path, a path with `..`, or is a link or device, whether or not it was asked for.
    """
    with _opened(archive) as files:
        missing = [name for name in members if name not in files]
        if missing:
            raise SampleError(f"The archive {archive.name} lacks {', '.join(missing)}.")
        for name, destination in members.items():
            (folder / destination).parent.mkdir(parents=True, exist_ok=True)
            with files[name]() as source, (folder / destination).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def matching(archive: Path, folder: str, pattern: str) -> list[str]:
    """Files of the archive below ``folder`` that a pattern with `*` means; a plain name is taken as it is.

    Raises `SampleError` as `extract` does, and where nothing matches.
    """
    if "*" not in pattern:
        return [pattern]
    with _opened(archive) as files:
        below = [path.relative_to(folder) for path in map(PurePosixPath, files) if path.is_relative_to(folder)]
    depth = len(PurePosixPath(pattern).parts)
    found = sorted(path.as_posix() for path in below if len(path.parts) == depth and path.match(pattern))
    if not found:
        raise SampleError(f"The archive {archive.name} has no file {folder}/{pattern}.")
    return found


@contextmanager
def _opened(archive: Path) -> Iterator[Files]:
    """Every file of a zip or a tar, none of whose entries is refused."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                yield _of_zip(archive, packed)
        else:
            with tarfile.open(archive) as tar:
                yield _of_tar(archive, tar)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise SampleError(f"The archive {archive.name} is damaged: {error}") from error


def _of_zip(archive: Path, packed: zipfile.ZipFile) -> Files:
    files: Files = {}
    for entry in packed.infolist():
        _check(archive, entry.filename, is_plain(entry))
        if not entry.is_dir():
            files[entry.filename] = partial(packed.open, entry)
    return files


def _of_tar(archive: Path, tar: tarfile.TarFile) -> Files:
    files: Files = {}
    for entry in tar:
        _check(archive, entry.name, entry.isreg() or entry.isdir())
        if entry.isreg():
            # `./usr/share` in a Debian package is `usr/share`.
            files[str(PurePosixPath(entry.name))] = partial(_contents, tar, entry)
    return files


def _contents(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(entry)
    assert found is not None, "regular files have contents"
    return found


def _check(archive: Path, name: str, plain: bool) -> None:
    reason = objection(name, plain)
    if reason is not None:
        raise SampleError(
            f"The archive {archive.name} is refused: its entry {name!r} {reason}.",
            expected="plain files and folders with relative paths",
        )
