"""Manifest of a bundle (`manifest.json`, schema 1): its files, model interface, steps and provenance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from compress.formats.registry import Format
from compress.plugins.apps.bundled_format import Axis, Signature
from compress.plugins.apps.postprocess import Postprocessing
from compress.plugins.apps.preprocess import Preprocessing
from compress.tasks.registry import TASKS
from compress.utils.errors import BundleError
from compress.utils.pydantic_models import FrozenAliased
from compress.utils.read_limits import LIMITS, parse_json, refuse_above
from compress.utils.ssh_signatures import SignedFile
from compress.utils.storage import FileRecord

SCHEMA = 1
MANIFEST = "manifest.json"
SIGNED = SignedFile(MANIFEST, "compress-bundle", "bundle")
SIGNATURE = SIGNED.signature
SELFTEST = "selftest.json"
CARD = "README.md"
MODEL_FOLDER = "model"


class ManifestRuntime(FrozenAliased):
    """Runtime of the model. The self-test passed with ``minimum_version``; older versions were not tried."""

    name: str
    package: str = Field(description="name in the platform's package manager")
    minimum_version: str
    execution_provider: str


class TensorRecord(FrozenAliased):
    """Input or output of the model. A named axis has any size, or the sizes of its `Axis`."""

    name: str
    dtype: str = Field(description="numpy data type of the elements")
    shape: tuple[int | str, ...]
    meaning: str


class Licence(FrozenAliased):
    """Licence of a part of the bundle."""

    of: str
    licence: str


class Provenance(FrozenAliased):
    """Origin of the model as the run's own files state it; fields that need a run are empty without one."""

    compress: str = Field(description="version of compress that wrote the bundle")
    recipe: str
    recipe_sha256: str
    samples: dict[str, dict[str, str]] = Field({}, description="maps samples to their packages and SHA-256 digests")
    seed: int | None = None
    start: str | None = Field(None, description="digest of the input model")
    data: dict[str, str] = Field({}, description="maps splits to the digests of their rows")
    stages: dict[str, str] = Field({}, description="maps stages to the digests of their outputs")
    packages: dict[str, str] = Field({}, description="maps packages to the versions that the run used")
    report_sha256: str | None = None
    measured: dict[str, float] = Field({}, description="maps `METRIC on TARGET` to the final model's value")


class Manifest(FrozenAliased):
    """Description of a bundle. ``digest`` is the SHA-256 of the manifest with an empty digest."""

    schema_version: int = Field(SCHEMA, alias="schema")
    name: str
    task: str
    target: str
    runtime: ManifestRuntime
    format: Format
    model: str = Field(description="path of the file that the runtime opens")
    opsets: dict[str, int] = Field(description="maps operator domains to versions; empty for .ort files")
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    axes: dict[str, Axis] = Field(description="maps named axes to their permitted sizes")
    signatures: tuple[Signature, ...] = Field(description="graphs by sequence length, shortest first")
    preprocessing: Annotated[Preprocessing, Field(discriminator="kind")]
    postprocessing: Annotated[Postprocessing, Field(discriminator="kind")]
    licences: tuple[Licence, ...]
    provenance: Provenance
    files: dict[str, FileRecord] = Field(description="all other files of the bundle except the signature")
    digest: str = ""

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        """Check that the steps are those of the task."""
        steps_by_task = {name: task.app_steps for name, task in TASKS.items() if task.app_steps}
        if self.task not in steps_by_task:
            raise ValueError(f"no app is made for the task {self.task!r}, but for {', '.join(steps_by_task)}")
        for step, kind, expected in zip(("pre", "post"), self.steps, steps_by_task[self.task], strict=True):
            if kind != expected:
                raise ValueError(f"{kind} is no {step}processing for {self.task}")
        return self

    @property
    def steps(self) -> tuple[str, str]:
        """Kinds of the steps before and after the model."""
        return self.preprocessing.kind, self.postprocessing.kind

    def sealed(self) -> bytes:
        """Return the bytes of `manifest.json` with their digest.

        The layout is canonical, so that any other byte is a change.
        """
        content = self.model_dump(mode="json") | {"digest": ""}
        # Sorted names make the bytes independent of the order in which files were written.
        content["files"] = dict(sorted(content["files"].items()))
        content["digest"] = hashlib.sha256(_to_json(content)).hexdigest()
        return _to_json(content)


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check its digest. Raises `BundleError`."""
    if not path.is_file():
        raise BundleError(
            f"There is no {MANIFEST}.", where=str(path.parent), expected="a folder or zip that `compress bundle` wrote"
        )
    refuse_above(LIMITS.manifest_bytes, path.stat().st_size, f"The {MANIFEST}", "bytes", path)
    content = path.read_bytes()
    try:
        fields: Any = parse_json(content)
    except ValueError as error:
        raise BundleError(f"The {MANIFEST} is not JSON: {error}", where=str(path)) from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"The {MANIFEST} has schema {schema!r}.",
            where=str(path),
            expected=f"schema {SCHEMA}",
            hint="a newer bundle is verified with a newer compress",
        )
    try:
        manifest = Manifest.model_validate(fields)
        sealed = manifest.sealed()
    except UnicodeEncodeError as error:
        raise BundleError(f"The {MANIFEST} has text that is no Unicode: {error.reason}.", where=str(path)) from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:10]]
        raise BundleError(f"The {MANIFEST} is not valid:\n  " + "\n  ".join(lines), where=str(path)) from None
    # Writing the manifest again gives the same bytes unless somebody changed it.
    if sealed != content:
        raise BundleError(
            f"The {MANIFEST} was changed after it was written.",
            where=str(path),
            expected=f"the digest {json.loads(sealed)['digest']}, and the layout that `compress` writes",
            hint="take the bundle again from where it came",
        )
    return manifest
