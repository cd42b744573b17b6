"""Is a bundle whole, is it what it says, and does it answer here as it did where it was made?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compress.formats.model_file import format_of
from compress.formats.runtime import Session, why_unavailable
from compress.formats.targets import TARGETS
from compress.plugins.apps.app_types import KINDS
from compress.plugins.apps.archive import unpack
from compress.plugins.apps.bundled_format import BundledFormat
from compress.plugins.apps.format import bundled, contents, open_model, shape_of, unread_reason
from compress.plugins.apps.manifest import (
    MANIFEST,
    MODEL_FOLDER,
    SIGNATURE,
    SIGNED,
    Manifest,
    TensorRecord,
    read_manifest,
)
from compress.plugins.apps.selftest import Asked, check_prepared, read_selftest, run_selftest
from compress.plugins.provenance.signature import check_signature
from compress.utils.digests import digest_file
from compress.utils.errors import BundleError, InputError

_SHOWN = 5
_ROUNDED = 1e-5


@dataclass(frozen=True)
class Verified:
    """What was proven. ``cases`` are the self-test's, texts or pictures (``of``), ``worst`` the largest difference of
    an answer in it (``compared``: scores or embeddings), in tolerances.

    What couldn't be proven here has a reason: ``unread`` that the manifest tells the truth of the model, ``unanswered``
    that the model gives those answers.
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


def verify(path: Path, signer: Path | None = None) -> Verified:
    """Verify a bundle's folder or zip; ``signer`` is the public key that must have signed it.

    Raises `BundleError` that names the first thing that is wrong, and `InputError` where there is no bundle.
    """
    if path.is_dir():
        return verify_folder(path, signer)
    if not path.is_file():
        raise InputError("There is no such bundle.", where=str(path), expected="a folder or zip of `compress bundle`")
    with tempfile.TemporaryDirectory() as scratch:
        unpack(path, Path(scratch))
        return verify_folder(Path(scratch), signer)


def verify_folder(folder: Path, signer: Path | None) -> Verified:
    """Verify an unpacked bundle; see `verify`."""
    manifest = read_manifest(folder / MANIFEST)
    _check_files(folder, manifest)
    fingerprint = check_signature(folder, signer, SIGNED)
    model = folder / manifest.model
    form = _format_of(folder, manifest)
    kind = KINDS[manifest.steps]
    unread, silent = unread_reason(form), why_unavailable(TARGETS[form.target])
    session = None
    if silent is None:
        session = open_model(form, model if kind.graphs == 1 else folder / MODEL_FOLDER)
    outputs = manifest.outputs if unread else _check_shape(manifest, folder, form, session)
    _check_end(manifest, folder, outputs)
    way = kind.inputs.open(folder, manifest.preprocessing)
    test = read_selftest(folder, kind, manifest.files)
    worst = None
    if session is None or test.unmeasured is not None:
        check_prepared(test, way, str(folder))
    else:
        worst = run_selftest(test, Asked(session, way, kind.answers, manifest.postprocessing), str(folder))
    size = sum(record.size_bytes for record in manifest.files.values())
    return Verified(
        name=manifest.name,
        target=manifest.target,
        digest=read_manifest(folder / MANIFEST).digest,
        files=len(manifest.files),
        size_bytes=size,
        cases=len(test.cases),
        of=kind.inputs.plural,
        compared=kind.answers.plural,
        worst=worst,
        unread=unread,
        unanswered=silent or test.unmeasured,
        signer=fingerprint,
    )


def _check_files(folder: Path, manifest: Manifest) -> None:
    used = {manifest.model, *manifest.preprocessing.uses, *manifest.postprocessing.uses}
    for name in (*manifest.files, *used):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.as_posix() != name:
            raise BundleError(f"The {MANIFEST} names a file outside the bundle: {name!r}.", where=str(folder))
    odd = sorted(path for path in folder.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir()))
    if odd:
        raise BundleError("The bundle holds a link or a device.", where=str(odd[0]), expected="plain files and folders")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    found -= {MANIFEST, SIGNATURE}
    listed = manifest.files.keys()
    if found != listed:
        parts = [f"missing: {_some(listed - found)}"] if listed - found else []
        parts += [f"not listed: {_some(found - listed)}"] if found - listed else []
        raise BundleError(f"The bundle has other files than its {MANIFEST}; {'; '.join(parts)}.", where=str(folder))
    unlisted = used - listed
    if any(name.startswith(f"{manifest.model}/") for name in listed):  # a package, which is a folder
        unlisted.discard(manifest.model)
    if unlisted:
        raise BundleError(f"The {MANIFEST} uses files that it does not list: {_some(unlisted)}.", where=str(folder))
    for name, record in manifest.files.items():
        if (folder / name).stat().st_size != record.size_bytes or digest_file(folder / name) != record.sha256:
            raise BundleError(
                f"The file {name} was changed.",
                where=str(folder),
                expected=f"{record.size_bytes} bytes with the SHA-256 {record.sha256}",
                hint="take the bundle again from where it came",
            )


def _format_of(folder: Path, manifest: Manifest) -> BundledFormat:
    """Of the file that the manifest names. Raises `BundleError` where that is in another than it says."""
    found = format_of(folder / manifest.model)
    if found != manifest.format:
        raise _lie(folder, "the format", manifest.format, found)
    return bundled(found)


def _check_shape(
    manifest: Manifest, folder: Path, form: BundledFormat, session: Session | None
) -> Sequence[TensorRecord]:
    """Compare what the manifest says of the model with the model; its outputs."""
    kind = KINDS[manifest.steps]
    model = folder / manifest.model
    shape = shape_of(form.interface(model, session), kind, str(model))
    for what, said, true in (("inputs", manifest.inputs, shape.inputs), ("outputs", manifest.outputs, shape.outputs)):
        if said != true:
            raise _lie(folder, what, _words(said), _words(true))
    opsets = contents(form, model).opsets
    if manifest.opsets != opsets:
        raise _lie(folder, "opsets", str(manifest.opsets), str(opsets))
    for what, sizes, found in (
        ("axes", manifest.axes, dict(shape.axes)),
        ("signatures", manifest.signatures, shape.signatures),
    ):
        if sizes != found:
            raise _lie(folder, what, str(sizes), str(found))
    return shape.outputs


def _check_end(manifest: Manifest, folder: Path, outputs: Sequence[TensorRecord]) -> None:
    """Compare what becomes of the answers with what the model's files say."""
    end = KINDS[manifest.steps].answers.find_end(folder / MODEL_FOLDER, outputs)
    for name, value in end:
        if not _agree(getattr(manifest.postprocessing, name), value):
            raise _lie(folder, name, str(getattr(manifest.postprocessing, name)), str(value))


def _agree(said: Any, true: Any) -> bool:
    """Whether they are the same, numbers but for what another machine rounds."""
    if isinstance(true, tuple):
        return len(said) == len(true) and all(map(_agree, said, true))
    return math.isclose(said, true, rel_tol=_ROUNDED, abs_tol=_ROUNDED) if isinstance(true, float) else said == true


def _lie(folder: Path, what: str, said: str, true: str) -> BundleError:
    return BundleError(
        f"The {MANIFEST} says {what} {said}.",
        where=str(folder / MANIFEST),
        expected=f"{true}, as the model has them",
        hint="bundle the model anew; do not trust this bundle",
    )


def _words(entries: Any) -> str:
    return ", ".join(f"{entry.name} {entry.dtype} {list(entry.shape)}" for entry in entries)


def _some(names: Any) -> str:
    return ", ".join(sorted(names)[:_SHOWN])
