"""Take named files out of a zip or tar archive, refusing any archive that tries to leave its folder."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from compress.archives import is_plain, objection
from compress.errors import SampleError

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
