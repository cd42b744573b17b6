"""Verification of a bundle: its files, its manifest against the model, and its self-test."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compress.formats.model_file import format_of
from compress.formats.runtime import Session, why_unavailable
from compress.formats.targets import TARGETS
from compress.plugins.apps.app_types import APP_TYPES
from compress.plugins.apps.archive import unpack
from compress.plugins.apps.bundled_format import BundledFormat
from compress.plugins.apps.format import find_bundled_format, open_model, record_interface, unread_reason
from compress.plugins.apps.manifest import (
    MANIFEST,
    MODEL_FOLDER,
    SIGNATURE,
    SIGNED,
    Manifest,
    TensorRecord,
    read_manifest,
)
from compress.plugins.apps.selftest import ModelUnderTest, check_prepared, read_selftest, run_selftest
from compress.utils.errors import BundleError, InputError
from compress.utils.ssh_signatures import check_file
from compress.utils.storage import digest_file


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    ``cases`` counts the self-test's inputs (``of``: texts, pictures). ``worst`` is the largest difference of an answer
    (``compared``: scores, embeddings) as a multiple of the tolerance. ``unread`` is the reason why the manifest could
    not be compared with the model, ``unanswered`` the reason why the model could not run.
    """

    name: str
    target: str
    digest: str
    files: int
    size_bytes: int
    cases: int
    of: str
    compared: str
    worst: float | None
    unread: str | None
    unanswered: str | None
    signer: str | None


def verify(path: Path, signer: Path | None = None) -> Verification:
    """Verify a bundle's folder or zip.

    Args:
        path: Folder or zip.
        signer: Public key that must have signed the bundle.

    Raises:
        BundleError: Something is wrong. The message names the first problem.
        InputError: There is no bundle.
    """
    if path.is_dir():
        return verify_folder(path, signer)
    if not path.is_file():
        raise InputError("There is no such bundle.", where=str(path), expected="a folder or zip of `compress bundle`")
    with tempfile.TemporaryDirectory() as scratch:
        unpack(path, Path(scratch))
        return verify_folder(Path(scratch), signer)


def verify_folder(folder: Path, signer: Path | None) -> Verification:
    """Verify an unpacked bundle. See `verify`."""
    manifest = read_manifest(folder / MANIFEST)
    _check_files(folder, manifest)
    fingerprint = check_file(folder, signer, SIGNED)
    model = folder / manifest.model
    # The file decides on the format, and the manifest must agree with it.
    actual = format_of(model)
    if actual != manifest.format:
        raise _contradiction(folder, "the format", manifest.format, actual)
    bundled_format = find_bundled_format(actual)
    kind = APP_TYPES[manifest.steps]
    unread, unavailable_reason = unread_reason(bundled_format), why_unavailable(TARGETS[bundled_format.target])
    # A model that cannot run here is still verified: its files, its interface and the prepared inputs.
    session = None
    if unavailable_reason is None:
        session = open_model(bundled_format, model if kind.graphs == 1 else folder / MODEL_FOLDER)
    # Compare the manifest with the model, so that a wrong manifest is found even with a valid digest.
    outputs = manifest.outputs if unread else _check_shape(manifest, folder, bundled_format, session)
    # Compare the step after the model with the model's files.
    for name, value in kind.answers.find_postprocessing(folder / MODEL_FOLDER, outputs):
        if not _agree(getattr(manifest.postprocessing, name), value):
            raise _contradiction(folder, name, str(getattr(manifest.postprocessing, name)), str(value))
    preparation = kind.inputs(folder, manifest.preprocessing)
    selftest = read_selftest(folder, kind, manifest.files)
    worst = None
    if session is None or selftest.unmeasured is not None:
        check_prepared(selftest, preparation, str(folder))
    else:
        tested_model = ModelUnderTest(session, preparation, kind.answers, manifest.postprocessing)
        worst = run_selftest(selftest, tested_model, str(folder))
    return Verification(
        name=manifest.name,
        target=manifest.target,
        digest=manifest.digest,
        files=len(manifest.files),
        size_bytes=sum(record.size_bytes for record in manifest.files.values()),
        cases=len(selftest.cases),
        of=kind.inputs.plural,
        compared=kind.answers.plural,
        worst=worst,
        unread=unread,
        unanswered=unavailable_reason or selftest.unmeasured,
        signer=fingerprint,
    )


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise `BundleError` for unsafe paths, links, missing, unlisted or changed files."""
    used = {manifest.model, *manifest.preprocessing.uses, *manifest.postprocessing.uses}
    # Names come from the manifest, which anybody may have written. None may leave the folder.
    for name in (*manifest.files, *used):
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\\" in name or plain.as_posix() != name:
            raise BundleError(f"The {MANIFEST} names a file outside the bundle: {name!r}.", where=str(folder))
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError(
                "The bundle holds a link or a device.", where=str(path), expected="plain files and folders"
            )
    existing = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    # The manifest lists all files except itself and its signature.
    existing -= {MANIFEST, SIGNATURE}
    listed = manifest.files.keys()
    if existing != listed:
        parts = [f"missing: {_first_names(listed - existing)}"] if listed - existing else []
        parts += [f"not listed: {_first_names(existing - listed)}"] if existing - listed else []
        raise BundleError(f"The bundle has other files than its {MANIFEST}; {'; '.join(parts)}.", where=str(folder))
    unlisted = used - listed
    if any(name.startswith(f"{manifest.model}/") for name in listed):  # a package, which is a folder
        unlisted.discard(manifest.model)
    if unlisted:
        raise BundleError(
            f"The {MANIFEST} uses files that it does not list: {_first_names(unlisted)}.", where=str(folder)
        )
    for name, record in manifest.files.items():
        if (folder / name).stat().st_size != record.size_bytes or digest_file(folder / name) != record.sha256:
            raise BundleError(
                f"The file {name} was changed.",
                where=str(folder),
                expected=f"{record.size_bytes} bytes with the SHA-256 {record.sha256}",
                hint="take the bundle again from where it came",
            )


def _check_shape(
    manifest: Manifest, folder: Path, form: BundledFormat, session: Session | None
) -> Sequence[TensorRecord]:
    """Compare inputs, outputs, operator versions and axes in the manifest with the model, and return the outputs."""
    kind = APP_TYPES[manifest.steps]
    model = folder / manifest.model
    shape = record_interface(form.interface(model, session), kind, str(model))
    for name, actual in {
        "inputs": shape.inputs,
        "outputs": shape.outputs,
        "opsets": form.contents(model).opsets,
        "axes": dict(shape.axes),
        "signatures": shape.signatures,
    }.items():
        stated = getattr(manifest, name)
        if stated != actual:
            texts = map(_describe_tensors if name in ("inputs", "outputs") else str, (stated, actual))
            raise _contradiction(folder, name, *texts)
    return shape.outputs


def _agree(said: Any, true: Any) -> bool:
    """Return True if two values are equal. Floats may differ by rounding."""
    if isinstance(true, tuple):
        return len(said) == len(true) and all(map(_agree, said, true))
    # Scheduler tables are computed anew, and machines round differently.
    return math.isclose(said, true, rel_tol=1e-5, abs_tol=1e-5) if isinstance(true, float) else said == true


def _contradiction(folder: Path, what: str, said: str, true: str) -> BundleError:
    return BundleError(
        f"The {MANIFEST} says {what} {said}.",
        where=str(folder / MANIFEST),
        expected=f"{true}, as the model has them",
        hint="bundle the model anew; do not trust this bundle",
    )


def _describe_tensors(entries: Sequence[TensorRecord]) -> str:
    """Return name, type and shape of each tensor."""
    return ", ".join(f"{entry.name} {entry.dtype} {list(entry.shape)}" for entry in entries)


def _first_names(names: Iterable[str]) -> str:
    """Return the first names in sorted order."""
    return ", ".join(sorted(names)[:5])
