"""Take named files out of a zip or tar archive, refusing any archive that tries to leave its folder."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from compress.errors import SampleError


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Write each member (path in the archive -> path below ``folder``) as a plain file.

    Raises `SampleError` for a damaged archive, a missing member, and for an archive in which any entry has an
    absolute path, a path with `..`, or is a link or device, whether or not it was asked for.
    """
    try:
        if zipfile.is_zipfile(archive):
            _extract_zip(archive, members, folder)
        else:
            _extract_tar(archive, members, folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise SampleError(f"The archive {archive.name} is damaged: {error}") from error


def matching(archive: Path, folder: str, pattern: str) -> list[str]:
    """Files of the archive below ``folder`` that a pattern with `*` means; a plain name is taken as it is.

    Raises `SampleError` for a damaged archive, and where nothing matches.
    """
    if "*" not in pattern:
        return [pattern]
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                names = [entry.filename for entry in opened.infolist() if not entry.is_dir()]
        else:
            with tarfile.open(archive) as tar:
                names = [entry.name for entry in tar if entry.isreg()]
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise SampleError(f"The archive {archive.name} is damaged: {error}") from error
    depth = len(PurePosixPath(pattern).parts)
    below = [PurePosixPath(name.removeprefix("./")) for name in names]
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in below
        if path.is_relative_to(folder)
        and len(path.relative_to(folder).parts) == depth
        and path.relative_to(folder).match(pattern)
    )
    if not found:
        raise SampleError(f"The archive {archive.name} has no file {folder}/{pattern}.")
    return found


def _extract_zip(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        entries = {}
        for entry in opened.infolist():
            _check_path(archive, entry.filename)
            mode = stat.S_IFMT(entry.external_attr >> 16)
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                _refuse(archive, entry.filename, "is a link or a device")
            entries[entry.filename] = entry
        _check_present(archive, members, set(entries))
        for name, destination in members.items():
            with opened.open(entries[name]) as source:
                _write(source, folder / destination)


def _extract_tar(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    with tarfile.open(archive) as opened:
        entries = {}
        for entry in opened:
            _check_path(archive, entry.name)
            if not (entry.isreg() or entry.isdir()):
                _refuse(archive, entry.name, "is a link or a device")
            entries[str(PurePosixPath(entry.name))] = entry  # `./usr/share` in a Debian package is `usr/share`
        _check_present(archive, members, {name for name, entry in entries.items() if entry.isreg()})
        for name, destination in members.items():
            source = opened.extractfile(entries[name])
            assert source is not None, "regular files have contents"
            with source:
                _write(source, folder / destination)


def _write(source: IO[bytes], destination: Path) -> None:
    """Copy contents only: no mode, owner or time of the archive is taken over."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _check_path(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        _refuse(archive, name, "points outside the archive's folder")


def _check_present(archive: Path, members: Mapping[str, str], present: set[str]) -> None:
    missing = [name for name in members if name not in present]
    if missing:
        raise SampleError(f"The archive {archive.name} lacks {', '.join(missing)}.")


def _refuse(archive: Path, name: str, reason: str) -> None:
    raise SampleError(
        f"The archive {archive.name} is refused: its entry {name!r} {reason}.",
        expected="plain files and folders with relative paths",
    )
