"""Contents of a version: files of a run by their digests, and a bundle that was made from the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pydantic import Field, ValidationError, field_validator

from compress.plugins.registry.objects import Incoming, Objects
from compress.plugins.registry.state import Version
from compress.report.run_folder import LOCK, MODEL, RECIPE, REPORT, find_report, shipped_files
from compress.results.formatting import format_value
from compress.results.metrics import describe_metric, quality_metric
from compress.results.report import FINAL, Report, load_report
from compress.utils.archive_members import unsafe_member_reason
from compress.utils.digests import FileRecord, digest_file, digest_of_files
from compress.utils.errors import InputError
from compress.utils.pydantic_models import FrozenAliased

SCHEMA = 1
BUNDLE = "bundle"
_MANIFEST = "manifest.json"
"""File by which a bundle of the plug-in apps is recognized."""


class Contents(FrozenAliased):
    """Record of a version, which is itself a file of the registry. Paths are relative to the run's folder."""

    schema_version: int = Field(SCHEMA, alias="schema")
    recipe: str
    started: str | None
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _within(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for path in files:
            if reason := unsafe_member_reason(path, is_plain=True):
                raise ValueError(f"{path!r} {reason}")
        return files

    @property
    def size_bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def model_digest(self) -> str:
        """Return the SHA-256 of the model's folder, which is also the name of a starting model in a run's lock."""
        prefix = f"{MODEL}/"
        digests = {
            path.removeprefix(prefix): record.sha256 for path, record in self.files.items() if path.startswith(prefix)
        }
        return digest_of_files(digests)


def take_run(run: Path, bundle: Path | None, incoming: Incoming) -> tuple[str, Report]:
    """Add the files of a finished run, and of a bundle made from it, to the registry.

    Returns:
        The digest of the record, and the run's report.

    Raises:
        InputError: The run has no report or no model, or the bundle was made from another run.
    """
    report_file = find_report(run)
    report, folder = load_report(report_file), report_file.resolve().parent
    if not (folder / MODEL).is_dir():
        raise InputError(
            "The run ships no model.",
            where=str(folder),
            expected=f"a folder that `compress run` wrote, with {MODEL}/ beside {REPORT}",
        )
    files = {}
    for path, source in (*_files(folder), *_bundle(bundle, report_file)):
        size = source.stat().st_size
        files[path] = FileRecord(size_bytes=size, sha256=incoming.take(source))
    contents = Contents(recipe=report.recipe, started=report.started, files=dict(sorted(files.items())))
    return incoming.put(contents.model_dump_json(indent=1).encode()), report


def summary(report: Report) -> str:
    """Return the final model's main metrics, such as `accuracy 93.50%, 4.65 MB, 0.31 ms on cpu`.

    They are those of the first target that has any.
    """
    for target in report.headed:
        rows = {row.metric: row for row in report.measurements if (row.model, row.target) == (FINAL, target)}
        quality = quality_metric({name: row.unit for name, row in rows.items()})
        texts = [f"{quality.title} {format_value(quality, rows[quality.name].value)}"] if quality else []
        for name in ("size_bytes", "latency_ms"):
            if row := rows.get(name):
                texts.append(format_value(describe_metric(name, row.unit), row.value))
        if texts:
            return f"{', '.join(texts)} on {target}"
    return ""


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a run by their paths within it."""
    for name in (REPORT, RECIPE, LOCK):
        if (folder / name).is_file():
            yield name, folder / name
    yield from ((path, folder / path) for path in shipped_files(folder))


def _bundle(bundle: Path | None, report: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a bundle. Raises `InputError` for a folder without a manifest, or a bundle of another run."""
    if bundle is None:
        return
    try:
        manifest = json.loads((bundle / _MANIFEST).read_text(encoding="utf-8"))
        made_of = manifest["provenance"]["report_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            "This is no bundle.",
            where=str(bundle),
            expected=f"a folder with {_MANIFEST}, as `compress bundle` writes it",
        ) from None
    if made_of != digest_file(report):
        raise InputError(
            "The bundle was made of another run.",
            where=str(bundle),
            expected=f"one that was made of {report.parent}",
            hint="bundle the run anew: compress bundle RUN --target TARGET -o FOLDER",
        )
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            yield f"{BUNDLE}/{path.relative_to(bundle).as_posix()}", path


class Store(Protocol):
    """Storage of files by their digests, on this machine or at an address."""

    def names(self) -> set[str]:
        """Return the digests of all files."""

    def fault(self, digest: str, size_bytes: int | None = None) -> str | None:
        """Return `missing`, `damaged` or None."""

    def read(self, digest: str) -> bytes:
        """Return the bytes of a small file."""


def contents_of(version: Version, objects: Store) -> Contents:
    """Return the contents of a version. Raises `InputError` if its record is missing, damaged or of a newer schema."""
    fault = objects.fault(version.record)
    if fault is not None:
        raise faulty(version, {"the list of its files": fault})
    return _parsed(version, objects.read(version.record))


def needed_by(version: Version, objects: Store, record: bytes | None = None) -> list[str]:
    """Return the digests of a version's files and of its ``record``, which may be given if it lies elsewhere."""
    contents = contents_of(version, objects) if record is None else _parsed(version, record)
    return [version.record, *(file.sha256 for file in contents.files.values())]


def _parsed(version: Version, record: bytes) -> Contents:
    """Return the contents that a record states. Raises `InputError`."""
    try:
        return Contents.model_validate_json(record)
    except ValidationError as error:
        raise InputError(
            f"What {version.reference} holds cannot be read: {error.errors()[0]['msg']}",
            where=version.record,
            expected=f"a record of schema {SCHEMA}",
            hint="pip install --upgrade compress",
        ) from None


def check_files(version: Version, contents: Contents, objects: Objects, thorough: bool = True) -> None:
    """Raise `InputError` with every missing or damaged file of a version.

    Args:
        version: The version.
        contents: Its contents.
        objects: Files of the registry.
        thorough: Read every byte, and not only the sizes.
    """
    by_path = {path: objects.fault(file.sha256, file.size_bytes, thorough) for path, file in contents.files.items()}
    faults = {path: fault for path, fault in by_path.items() if fault is not None}
    if faults:
        raise faulty(version, faults)


def faulty(version: Version, faults: dict[str, str]) -> InputError:
    """Return the error for a version with damaged or missing files."""
    return InputError(
        f"{version.reference} is not whole: {', '.join(f'{path} is {fault}' for path, fault in faults.items())}.",
        where="the registry's objects",
        expected="every file as it was registered",
        hint=f"register its run again, which puts sound files in their place: "
        f"compress registry register {version.run} --name {version.name}",
    )
