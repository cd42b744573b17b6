"""VersionContents of a version: files of a run by their digests, and a bundle that was made from the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from pydantic import Field, ValidationError, field_validator

from compress.plugins.registry.object_store import Incoming, ObjectStore
from compress.plugins.registry.state import Version
from compress.report.run_folder import LOCK, MODEL, RECIPE, REPORT, find_report, require_inside, shipped_files
from compress.results.formatting import format_value
from compress.results.metrics import describe_metric, quality_metric
from compress.results.report import FINAL, Report, load_report
from compress.utils.errors import InputError
from compress.utils.pydantic_models import FrozenAliased
from compress.utils.read_limits import parse_json
from compress.utils.storage import FileRecord, digest_file, digest_of_files, unsafe_member_reason

SCHEMA = 1
BUNDLE = "bundle"
_MANIFEST = "manifest.json"
"""File by which a bundle of the plug-in apps is recognized."""


class VersionContents(FrozenAliased):
    """Record of a version, which is itself a file of the registry. Paths are relative to the run's folder."""

    schema_version: int = Field(SCHEMA, alias="schema")
    recipe: str
    started: str | None
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _require_relative_paths(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
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
        # Digest the same files in the same way as a run digests its starting model.
        digests = {
            path.removeprefix(prefix): record.sha256 for path, record in self.files.items() if path.startswith(prefix)
        }
        return digest_of_files(digests)


def add_run(run: Path, bundle: Path | None, incoming: Incoming) -> tuple[str, Report]:
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
    sources = {name: folder / name for name in (REPORT, RECIPE, LOCK) if (folder / name).is_file()}
    require_inside(folder, sources.values())
    sources |= {path: folder / path for path in shipped_files(folder)}
    if bundle is not None:
        # The files of a bundle by their path in the version.
        try:
            manifest = parse_json((bundle / _MANIFEST).read_text(encoding="utf-8"))
            report_digest = manifest["provenance"]["report_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                "This is no bundle.",
                where=str(bundle),
                expected=f"a folder with {_MANIFEST}, as `compress bundle` writes it",
            ) from None
        if report_digest != digest_file(report_file):
            raise InputError(
                "The bundle was made of another run.",
                where=str(bundle),
                expected=f"one that was made of {report_file.parent}",
                hint="bundle the run anew: compress bundle RUN --target TARGET -o FOLDER",
            )
        paths = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
        require_inside(bundle, paths)
        sources |= {f"{BUNDLE}/{path.relative_to(bundle).as_posix()}": path for path in paths}
    files = {}
    for path, source in sources.items():
        size = source.stat().st_size
        files[path] = FileRecord(size_bytes=size, sha256=incoming.take(source))
    # The record is itself a file with a digest, so that the log only has to name that.
    contents = VersionContents(recipe=report.recipe, started=report.started, files=dict(sorted(files.items())))
    return incoming.put(contents.model_dump_json(indent=1).encode()), report


def summary(report: Report) -> str:
    """Return the final model's main metrics, such as `accuracy 93.50%, 4.65 MB, 0.31 ms on cpu`.

    They are those of the first target that has any.
    """
    # The first target with measurements stands for the version in lists.
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


class FileStore(Protocol):
    """Storage of files by their digests, on this machine or at an address."""

    def names(self) -> set[str]:
        """Return the digests of all files."""

    def fault(self, digest: str, size_bytes: int | None = None) -> str | None:
        """Return `missing`, `damaged` or None."""

    def read(self, digest: str) -> bytes:
        """Return the bytes of a small file."""


def contents_of(version: Version, objects: FileStore) -> VersionContents:
    """Return the contents of a version. Raises `InputError` if its record is missing, damaged or of a newer schema."""
    if fault := objects.fault(version.record):
        raise faulty(version, {"the list of its files": fault})
    record = objects.read(version.record)
    # A remote may answer the second reading otherwise than the first.
    if hashlib.sha256(record).hexdigest() != version.record:
        raise faulty(version, {"the list of its files": "damaged"})
    return parse_contents(version, record)


def needed_by(version: Version, contents: VersionContents) -> list[str]:
    """Return the digests of a version's files and of its record."""
    return [version.record, *(file.sha256 for file in contents.files.values())]


def parse_contents(version: Version, record: bytes) -> VersionContents:
    """Return the contents that a record lists. Raises `InputError`."""
    try:
        return VersionContents.model_validate_json(record)
    # A newer schema fails here too, so the hint is an upgrade.
    except ValidationError as error:
        raise InputError(
            f"The list of the files of {version.reference} cannot be read: {error.errors()[0]['msg']}",
            where=version.record,
            expected=f"a record of schema {SCHEMA}",
            hint="pip install --upgrade compress",
        ) from None


def check_files(version: Version, contents: VersionContents, objects: ObjectStore, thorough: bool = True) -> None:
    """Raise `InputError` with every missing or damaged file of a version.

    Args:
        version: The version.
        contents: Its contents.
        objects: Files of the registry.
        thorough: Read every byte, and not only the sizes.
    """
    by_path = {path: objects.fault(file.sha256, file.size_bytes, thorough) for path, file in contents.files.items()}
    if faults := {path: fault for path, fault in by_path.items() if fault is not None}:
        raise faulty(version, faults)


def faulty(version: Version, faults: dict[str, str]) -> InputError:
    """Return the error for a version with damaged or missing files."""
    return InputError(
        f"{version.reference} is not complete: {', '.join(f'{path} is {fault}' for path, fault in faults.items())}.",
        where="the registry's objects",
        expected="every file as it was registered",
        hint=f"register its run again, which replaces the damaged files: "
        f"compress registry register {version.run} --name {version.name}",
    )
