"""Provenance of the shipped files: a signed in-toto Statement v1 whose predicate is SLSA provenance v1.

The subjects are the files by SHA-256. The predicate contains the recipe, the digests of everything that was read,
packages and the class of machine. Folders of this machine do not appear in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from compress import __version__
from compress.plugins.provenance.run_view import RunView, plain_name
from compress.recipe.loading import dump_recipe
from compress.recipe.recipe import START
from compress.report.run_folder import MODEL, RECIPE, REPORT
from compress.results.report import FrozenRecord, invalid_fields
from compress.utils.environment import MISSING
from compress.utils.errors import BundleError, InputError
from compress.utils.paths import is_file, is_within
from compress.utils.ssh_signatures import SignedFile, check_file
from compress.utils.storage import digest_file

STATEMENT = "provenance.json"
SIGNED = SignedFile(STATEMENT, "compress-provenance", "provenance")
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE, _BUILDER = "urn:compress:run:1", "urn:compress:builder:local"
_MACHINE = ("processor_class", "cores_granted", "memory_bytes", "platform", "python")


class Subject(FrozenRecord):
    """File that a statement is about."""

    name: str
    digest: dict[str, str] = Field(min_length=1)


class Statement(FrozenRecord):
    """Fields of a statement that are checked here.

    in-toto requires consumers to ignore fields that they do not know.
    """

    type: str = Field(alias="_type", pattern=f"^{STATEMENT_TYPE}$")
    subject: list[Subject] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType", pattern=f"^{PREDICATE_TYPE}$")
    predicate: dict[str, Any]


@dataclass(frozen=True)
class VerifiedStatement:
    """Result of a verification: the number of files, the fingerprint of the signer, and the recipe's name."""

    files: int
    signer: str | None
    recipe: str


def run_statement(run: RunView) -> str:
    """Return the statement of a run as JSON."""
    report, lock = run.report, run.lock
    names = {record.of: record.name for record in run.licences}
    # Everything that the build read: the starting model, the data and the packages.
    inputs = [_resource(names.get("model", START), {"compressDirectorySha256": lock.get(START)})]
    inputs += [
        _resource(f"{split}: {plain_name(run.recipe.data.splits.get(split, split))}", {"compressRowsSha256": digest})
        for split, digest in lock.get("data", {}).items()
    ]
    inputs += [
        {"uri": f"pkg:pypi/{name.lower()}@{version}", "name": name}
        for name, version in sorted(run.packages.items())
        if version != MISSING
    ]
    definition = {
        "buildType": _BUILD_TYPE,
        "externalParameters": {"recipe": _without_folders(yaml.safe_load(dump_recipe(run.recipe, defaults=False)))},
        "internalParameters": {
            "threads": lock.get("threads"),
            "machine": {name: report.environment[name] for name in _MACHINE if name in report.environment},
            "stages": {label: {"compressDirectorySha256": digest} for label, digest in lock.get("stages", {}).items()},
        },
        "resolvedDependencies": inputs,
    }
    metadata = {"invocationId": digest_file(run.folder / REPORT)}
    if report.started is not None:
        ended = datetime.fromisoformat(report.started) + timedelta(seconds=round(report.seconds or 0.0))
        metadata |= {"startedOn": report.started, "finishedOn": ended.isoformat()}
    details = {
        "builder": {"id": _BUILDER, "version": {"compress": __version__}},
        "metadata": metadata,
        # The report and the recipe describe the run and do not ship, so they are by-products and no subjects.
        "byproducts": [_resource(name, {"sha256": digest_file(run.folder / name)}) for name in (REPORT, RECIPE)],
    }
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [_resource(name, {"sha256": digest}) for name, digest in run.files.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }
    return json.dumps(statement, indent=1, ensure_ascii=False) + "\n"


def verify_statement(folder: Path, signer: Path | None) -> VerifiedStatement:
    """Compare every file that the statement in ``folder`` names with its digest, and check the signature.

    Files may lie in the folder or below ``model/``.

    Raises:
        BundleError: A file is changed or missing, or the signature is by nobody that ``signer`` (a public key, or
            OpenSSH's `allowed_signers`) lists. A signed statement is not believed without a ``signer``.
    """
    statement = read_statement(folder / STATEMENT)
    # Check the signature first. Digests of an untrusted statement prove nothing.
    fingerprint = check_file(folder, signer, SIGNED)
    if fingerprint is not None and signer is None:
        raise BundleError(
            f"The provenance is signed by {fingerprint}, whom nobody here knows.",
            where=str(folder / SIGNED.signature),
            expected="--signer with the public key of the model's author",
            hint="get the key from its author and not from the source of these files, and compare its fingerprint "
            "(`ssh-keygen -l -f KEY.pub`)",
        )
    for subject in statement.subject:
        # Raise `BundleError` if a file is missing or differs. On the Hub the model's own files lie at the top.
        candidates = [folder / subject.name, folder / subject.name.removeprefix(f"{MODEL}/")]
        # A statement must not make this read files outside the folder.
        file = next((path for path in candidates if is_within(path, folder) and is_file(path)), None)
        if file is None:
            raise BundleError(
                f"The file {subject.name} is missing.",
                where=str(folder),
                expected="all files that provenance.json names",
                hint="verify the run itself or a complete copy; `compress papers --output` does not copy the model",
            )
        expected_digest = subject.digest.get("sha256")
        if expected_digest is None or digest_file(file) != expected_digest:
            raise BundleError(
                f"The file {subject.name} was changed.",
                where=str(folder),
                expected=f"the SHA-256 {expected_digest}",
                hint="download the model again",
            )
    name: Any = statement.predicate
    # The predicate may hold anything.
    for key in ("buildDefinition", "externalParameters", "recipe", "name"):
        name = name.get(key) if isinstance(name, dict) else None
    return VerifiedStatement(len(statement.subject), fingerprint, "" if name is None else str(name))


def read_statement(path: Path) -> Statement:
    """Return the statement at ``path``.

    Raises `InputError` if there is no file, and `BundleError` if it contains no statement.
    """
    if not path.is_file():
        raise InputError(
            f"There is no {STATEMENT}.", where=str(path.parent), expected="a folder that `compress papers` wrote into"
        )
    try:
        return Statement.model_validate_json(path.read_bytes())
    except ValidationError as error:
        lines = "\n  ".join(invalid_fields(error))
        raise BundleError(f"The {STATEMENT} is no statement of provenance:\n  {lines}", where=str(path)) from None


def _resource(name: str, digest: Mapping[str, str | None]) -> dict[str, object]:
    """Return in-toto's ResourceDescriptor. Digests of folders and rows have their own names, since no file has them."""
    return {"name": name, "digest": {kind: value for kind, value in digest.items() if value}}


def _without_folders(value: object) -> object:
    """Return a value in which every absolute path, in keys too, is replaced by its last part."""
    if isinstance(value, dict):
        return {plain_name(str(key)): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return plain_name(value) if isinstance(value, str) else value
