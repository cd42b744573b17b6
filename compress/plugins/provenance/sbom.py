"""Software bill of materials, `bom.cdx.json`: CycloneDX 1.6 with a model card (ECMA-424, `modelCard`).

The Python library of CycloneDX does not support model cards, so the JSON is written here. Tests validate it against
the official schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable

from compress import __version__
from compress.models.json_file import read_json
from compress.pipeline.licence_detection import NOT_STATED, package_licence
from compress.pipeline.licences import OF_RUN, RUNTIME, data_names
from compress.plugins.provenance.run_view import RunView, plain_name
from compress.recipe.recipe import START
from compress.report.run_folder import MODEL, REPORT
from compress.results.report import LicenceRecord
from compress.utils.environment import MISSING, package_versions
from compress.utils.storage import digest_file

_SPEC = "1.6"
_NAMESPACE = uuid.UUID("5c1f3a52-2b2e-5d7b-9d0a-3f0f6a7f1c11")
"""Namespace of serial numbers. Each is made from the digest of its report, so that a run always has the same one."""
_ROWS = ("data ", "test data ")
Part = dict[str, object]


def run_sbom(run: RunView) -> str:
    """Return the bill of materials of a run as JSON.

    It lists the model, its parents, data and packages with digests and licences, and the metrics with their intervals.
    """
    data, packages = _data(run), _packages(run)
    # The components that the weights derive from.
    parents: dict[str, Part] = {}
    for record in run.licences:
        # Runtimes and data are components of their own.
        if record.of.startswith((RUNTIME, *_ROWS)):
            continue
        start = str(run.lock.get(START, "")) if record.of == "model" else ""
        properties = {"compress:role": record.of.partition(" ")[0], "compress:directory-sha256": start}
        parents[record.of] = {
            "type": "machine-learning-model",
            "bom-ref": f"parent:{record.of}",
            "name": record.name,
            **_licence_fields(record.licence),
            "properties": _properties((name, value) for name, value in properties.items() if value),
        }
    serial = uuid.uuid5(_NAMESPACE, digest_file(run.folder / REPORT))
    # Other components refer to a component by its `bom-ref`.
    used = [part["bom-ref"] for part in (*data, *packages)]
    bill = {
        "$schema": f"http://cyclonedx.org/schema/bom-{_SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC,
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            **({"timestamp": run.report.started} if run.report.started else {}),
            "tools": {"components": [{"type": "application", "name": "compress", "version": __version__}]},
            "component": _model(run, [*parents.values()], data),
        },
        "components": [*data, *packages],
        "dependencies": [{"ref": "model", "dependsOn": used}, *({"ref": name} for name in used)],
    }
    return json.dumps(bill, indent=1, ensure_ascii=False) + "\n"


def _model(run: RunView, parents: list[Part], data: list[Part]) -> Part:
    """Return the component of the model itself."""
    file = run.folder / MODEL / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind, classes = config.get("model_type"), config.get("architectures")
    architecture = {"architectureFamily": kind, "modelArchitecture": classes[0] if classes else None}
    metrics = []
    for row in run.metrics:
        # CycloneDX stores numbers as text, and `repr` keeps all digits.
        metric: Part = {"type": f"{row.metric} ({row.unit})", "value": repr(row.value)}
        metric["slice"] = f"all rows, on {row.target}"
        if row.low is not None and row.high is not None:
            metric["confidenceInterval"] = {"lowerBound": repr(row.low), "upperBound": repr(row.high)}
        metrics.append(metric)
    card = {
        "modelParameters": {
            "task": run.recipe.task,
            **{name: str(value) for name, value in architecture.items() if value},
            "datasets": [{"ref": part["bom-ref"]} for part in data],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {"technicalLimitations": run.notes},
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": run.report.recipe,
        # CycloneDX requires a version. The start of the digest of the last stage's output identifies the weights.
        "version": str(run.lock.get("stages", {}).get(run.recipe.labels()[-1], ""))[:12] or "0",
        **({"description": run.report.description} if run.report.description else {}),
        **_licence_fields(run.licence),
        "pedigree": {"ancestors": parents, "notes": f"stages: {', '.join(stage.name for stage in run.report.stages)}"},
        "components": [
            {"type": "file", "bom-ref": f"file:{name}", "name": name, **_hash(digest)}
            for name, digest in run.files.items()
        ],
        "modelCard": card,
        "properties": _properties(("compress:licence-remark", remark) for remark in run.licence_remarks),
    }


def _data(run: RunView) -> list[Part]:
    """Return a component for every split, with the digest of its rows, and for the data of earlier runs."""
    records = [record for record in run.licences if record.of.startswith(_ROWS)]
    # Data of this run is listed by split with the digest of its rows. Earlier runs have no digests here.
    by_name = {record.name: record for record in records if OF_RUN not in record.of}
    earlier_records = {record.of: record for record in records if OF_RUN in record.of}
    recipe, names = run.recipe.data, [*data_names(run.recipe.data)]
    components = []
    for split, digest in run.lock.get("data", {}).items():
        reference = recipe.splits.get(split, split)
        source = plain_name(next((name for name in names if reference.startswith(name)), recipe.source or reference))
        components.append(_dataset(f"data:{split}", f"{source} ({split})", by_name.get(source), digest))
    components += [_dataset(of, of.removeprefix("data "), record, None) for of, record in earlier_records.items()]
    return components


def _dataset(ref: str, name: str, record: LicenceRecord | None, digest: str | None) -> Part:
    """Return the component of a data set.

    Args:
        ref: Reference of the component within the document.
        name: Name of the data set.
        record: Its licence, if known.
        digest: SHA-256 of rows and class names, if known.
    """
    return {
        "type": "data",
        "bom-ref": ref,
        "name": name,
        **(_hash(digest) if digest else {}),
        **_licence_fields(record.licence if record else NOT_STATED),
        "data": [{"type": "dataset", "name": name}],
        "properties": _properties([("compress:sha256-of", "rows and class names")] if digest else []),
    }


def _packages(run: RunView) -> list[Part]:
    """Return the packages that stages called and those that run the files, in the versions that were used."""
    versions = run.packages
    runtimes = [record.name for record in run.licences if record.of.startswith(RUNTIME)]
    # Runtimes that only open the shipped file may not have run here. Their installed versions count.
    versions |= {name: version for name, version in package_versions(tuple(runtimes)).items() if name not in versions}
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name.lower()}@{version}",
            "name": name,
            "version": version,
            "scope": "required" if name in runtimes else "optional",
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{version}",
            **_licence_fields(package_licence(name)),
        }
        for name, version in sorted(versions.items())
        if version != MISSING
    ]


def _licence_fields(expression: str) -> Part:
    """Return the field `licenses`, which is left out if no licence is stated."""
    return {} if expression == NOT_STATED else {"licenses": [{"expression": expression}]}


def _hash(digest: str) -> Part:
    """Return the field `hashes`."""
    return {"hashes": [{"alg": "SHA-256", "content": digest}]}


def _properties(pairs: Iterable[tuple[str, str]]) -> list[Part]:
    """Return pairs of names and values as a list of properties."""
    return [{"name": name, "value": value} for name, value in pairs]
