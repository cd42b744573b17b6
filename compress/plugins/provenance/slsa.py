"""Where the shipped files came from: an in-toto Statement v1 with SLSA's provenance v1 as its predicate, signed.

Subjects are the files by SHA-256; the predicate has the recipe, digests of all that was read, packages and the kind of
machine. Of this machine's folders nothing is said.
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
from compress.plugins.provenance.signature import SignedFile, check_signature
from compress.recipe.loading import dump_recipe
from compress.recipe.recipe import START
from compress.report.run_folder import MODEL, RECIPE, REPORT
from compress.results.report import FrozenRecord, invalid_fields
from compress.utils.digests import digest_file
from compress.utils.environment import MISSING
from compress.utils.errors import BundleError, InputError

STATEMENT = "provenance.json"
SIGNED = SignedFile(STATEMENT, "compress-provenance", "provenance")
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE, _BUILDER = "urn:compress:run:1", "urn:compress:builder:local"
_MACHINE = ("processor_class", "cores_granted", "memory_bytes", "platform", "python")


class Subject(FrozenRecord):
    """A file that the statement is about."""

    name: str
    digest: dict[str, str] = Field(min_length=1)


class Statement(FrozenRecord):
    """As much of a statement as is checked here; in-toto has consumers pass over fields that they don't know."""

    type: str = Field(alias="_type", pattern=f"^{STATEMENT_TYPE}$")
    subject: list[Subject] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType", pattern=f"^{PREDICATE_TYPE}$")
    predicate: dict[str, Any]


@dataclass(frozen=True)
class VerifiedStatement:
    """What a statement was found to be true of."""

    files: int
    signer: str | None
    recipe: str


def run_statement(run: RunView) -> str:
    """The statement of a run."""
    report, lock = run.report, run.lock
    names = {one.of: one.name for one in run.licences}
    inputs = [_resource(names.get("model", START), {"compressDirectorySha256": lock.get(START)})]
    inputs += [
        _resource(f"{split}: {plain_name(run.recipe.data.splits.get(split, split))}", {"compressRowsSha256": digest})
        for split, digest in lock.get("data", {}).items()
    ]
    inputs += [
        {"uri": f"pkg:pypi/{name.lower()}@{found}", "name": name}
        for name, found in sorted(run.packages.items())
        if found != MISSING
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
    details = {
        "builder": {"id": _BUILDER, "version": {"compress": __version__}},
        "metadata": {"invocationId": digest_file(run.folder / REPORT), **_times(report.started, report.seconds)},
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
    """Compare every file that the statement in ``folder`` names, there or beside ``model/``, and who signed it.

    Raises `BundleError` for a changed or missing file, and for a signature by nobody that ``signer`` (a public key, or
    OpenSSH's `allowed_signers`) knows; one that is signed needs a ``signer`` to be believed.
    """
    statement = read_statement(folder / STATEMENT)
    fingerprint = check_signature(folder, signer, SIGNED)
    if fingerprint is not None and signer is None:
        raise BundleError(
            f"The provenance is signed by {fingerprint}, whom nobody here knows.",
            where=str(folder / SIGNED.signature),
            expected="--signer with the public key of whoever made the model",
            hint="get the key from the maker and not from where these files came from, and compare its fingerprint "
            "(`ssh-keygen -l -f KEY.pub`)",
        )
    for subject in statement.subject:
        _check_file(folder, subject)
    parameters = statement.predicate.get("buildDefinition", {}).get("externalParameters", {})
    return VerifiedStatement(len(statement.subject), fingerprint, str(parameters.get("recipe", {}).get("name", "")))


def read_statement(path: Path) -> Statement:
    """The statement at ``path``. Raises `InputError` where there is none, `BundleError` for something else."""
    if not path.is_file():
        raise InputError(
            f"There is no {STATEMENT}.", where=str(path.parent), expected="a folder that `compress papers` wrote into"
        )
    try:
        return Statement.model_validate_json(path.read_bytes())
    except ValidationError as error:
        lines = "\n  ".join(invalid_fields(error))
        raise BundleError(f"The {STATEMENT} is no statement of provenance:\n  {lines}", where=str(path)) from None


def _check_file(folder: Path, subject: Subject) -> None:
    """On the Hub the model's own files lie at the top."""
    places = [folder / subject.name, folder / subject.name.removeprefix(f"{MODEL}/")]
    inside = [place for place in places if place.resolve().is_relative_to(folder.resolve())]
    file = next((place for place in inside if place.is_file()), None)
    if file is None:
        raise BundleError(f"The file {subject.name} is missing.", where=str(folder))
    wanted = subject.digest.get("sha256")
    if wanted is None or digest_file(file) != wanted:
        raise BundleError(
            f"The file {subject.name} was changed.",
            where=str(folder),
            expected=f"the SHA-256 {wanted}",
            hint="take the model again from where it came",
        )


def _resource(name: str, digest: Mapping[str, str | None]) -> dict[str, Any]:
    """in-toto's ResourceDescriptor; digests of folders and rows have names of their own, since they are of no file."""
    return {"name": name, "digest": {kind: value for kind, value in digest.items() if value}}


def _times(started: str | None, seconds: float | None) -> dict[str, str]:
    if started is None:
        return {}
    ended = datetime.fromisoformat(started) + timedelta(seconds=round(seconds or 0.0))
    return {"startedOn": started, "finishedOn": ended.isoformat()}


def _without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their names, keys included."""
    if isinstance(value, dict):
        return {plain_name(str(key)): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return plain_name(value) if isinstance(value, str) else value
