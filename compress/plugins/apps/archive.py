"""Reproducible zip files of bundles, and their verification before anything is unpacked."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from compress.plugins.apps.manifest import MANIFEST, SIGNATURE
from compress.utils.errors import BundleError, StorageError
from compress.utils.read_limits import LIMITS, parse_json, refuse_above, refuse_expansion
from compress.utils.storage import is_plain, unsafe_member_reason

_MARK = b"compress bundle, sha256 of all before this digest: "
_DIGEST = 64
_CHUNK = 1 << 20


def write_zip(folder: Path, target: Path) -> None:
    """Pack all files below ``folder`` in sorted order, without times, owners or modes.

    The comment of the zip holds the SHA-256 of all bytes before it. Any changed byte is detected, even in headers that
    unpacking ignores.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            # System 3 is Unix. Fixed modes and times make the same files give the same bytes.
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, path.stat().st_size
            with path.open("rb") as source, packed.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)
        # The digest covers the comment's marker, so that a placeholder reserves its bytes.
        packed.comment = _MARK + b"0" * _DIGEST
    seal(target)


def seal(archive: Path) -> None:
    """Write the digest into the placeholder at the end of a zip."""
    digest = _digest_before_seal(archive)
    with archive.open("r+b") as file:
        file.seek(-_DIGEST, 2)
        file.write(digest.encode())


def unpack(archive: Path, folder: Path) -> None:
    """Verify the zip of a bundle and write its files below the empty ``folder``.

    Raises:
        BundleError: The zip is damaged or changed, or has links, unsafe paths, duplicate names, or other sizes than its
            manifest. Nothing is written.
        StorageError: The files cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _checked(archive, opened)
            comment = opened.comment
            if not comment.startswith(_MARK) or len(comment) != len(_MARK) + _DIGEST:
                raise BundleError(
                    "The zip lacks the seal that `compress bundle` writes at its end.",
                    where=str(archive),
                    hint="take it again; or, if it was packed anew on purpose, unpack it and verify the folder",
                )
            if comment[len(_MARK) :].decode("ascii", "replace") != _digest_before_seal(archive):
                name = _damaged_entry(opened)
                raise BundleError(
                    "The zip was changed after it was written: "
                    + (f"{name} does not have its checksum." if name else "its SHA-256 differs from its seal."),
                    where=str(archive),
                    hint="take it again from where it came",
                )
            # Compare all sizes before anything is written.
            sizes = _promised(archive, opened, entries)
            for name, entry in entries.items():
                if entry.file_size != sizes[name]:
                    raise _refused(archive, name, f"unpacks to {entry.file_size} bytes; {MANIFEST} says {sizes[name]}")
            for name, entry in entries.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                # zipfile returns at most the stated bytes, and verifies their checksum.
                with opened.open(entry) as source, (folder / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:
        raise BundleError(f"The zip is damaged: {error}", where=str(archive), hint="take it again") from error
    except OSError as error:
        raise StorageError(
            f"The zip cannot be unpacked: {error.strerror or error}.", where=str(error.filename or archive)
        ) from error


def _damaged_entry(opened: zipfile.ZipFile) -> str | None:
    """Return the name of the first entry that does not have its checksum. Sizes must have been checked."""
    for name in opened.namelist():
        try:
            with opened.open(name) as source:
                while source.read(_CHUNK):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError):
            return name
    return None


def _checked(archive: Path, opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name. Names that differ only in case count as duplicates, as on Windows and macOS."""
    entries: dict[str, zipfile.ZipInfo] = {}
    lowercase_names: set[str] = set()
    for entry in opened.infolist():
        name = entry.filename
        if name.endswith("/"):
            raise _refused(archive, name, "is a folder")
        reason = unsafe_member_reason(name, is_plain(entry))
        if reason is not None:
            raise _refused(archive, name, reason)
        if name in ("", ".") or name != PurePosixPath(name).as_posix():
            raise _refused(archive, name, "is not written as a plain path")
        # Windows and macOS do not distinguish upper and lower case.
        if name.casefold() in lowercase_names:
            raise _refused(archive, name, "stands twice")
        lowercase_names.add(name.casefold())
        entries[name] = entry
    for name in entries:
        # A path below a file cannot be created.
        if any(parent.as_posix().casefold() in lowercase_names for parent in PurePosixPath(name).parents):
            raise _refused(archive, name, "lies below another file")
    total = sum(entry.file_size for entry in entries.values())
    # Stated sizes reveal a zip bomb before anything is unpacked: weights hardly compress.
    refuse_expansion(total, archive.stat().st_size, "The zip", archive)
    return entries


def _digest_before_seal(archive: Path) -> str:
    """Return the SHA-256 of all bytes before the digest."""
    digest, remaining = hashlib.sha256(), archive.stat().st_size - _DIGEST
    with archive.open("rb") as file:
        while remaining > 0:
            chunk = file.read(min(_CHUNK, remaining))
            digest.update(chunk)
            remaining -= len(chunk)
    return digest.hexdigest()


def _promised(archive: Path, opened: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> dict[str, int]:
    """Return the size of each entry according to the manifest. The manifest's own size is that of its entry."""
    if MANIFEST not in entries:
        raise BundleError(
            f"The zip has no {MANIFEST}.", where=str(archive), expected="one that `compress bundle` wrote"
        )
    size = entries[MANIFEST].file_size
    refuse_above(LIMITS.manifest_bytes, size, f"The {MANIFEST}", "bytes", archive)
    with opened.open(entries[MANIFEST]) as source:
        content = source.read(size + 1)
    try:
        listed = {str(name): int(record["size_bytes"]) for name, record in parse_json(content)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"The {MANIFEST} lists no files: {error}", where=str(archive)) from None
    # The manifest does not list itself or its signature, which is created afterwards.
    listed[MANIFEST] = size
    if SIGNATURE in entries:
        listed[SIGNATURE] = min(entries[SIGNATURE].file_size, 100_000)
    wrong = sorted(entries.keys() ^ listed.keys())
    if wrong:
        raise BundleError(
            f"The zip and its {MANIFEST} list other files: {', '.join(wrong[:5])}.",
            where=str(archive),
            expected="every file in both, and no other",
        )
    return listed


def _refused(archive: Path, name: str, reason: str) -> BundleError:
    return BundleError(
        f"The zip is refused: its entry {name!r} {reason}.",
        where=str(archive),
        expected="plain files with relative paths, of the sizes in the manifest",
    )
