"""The bill of materials, `bom.cdx.json`: CycloneDX 1.6 with a model card (ECMA-424, `modelCard`).

The library of CycloneDX has no model card yet, so that the JSON is written here; tests hold it to the official schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

from compress import __version__
from compress.models.json_file import read_json
from compress.pipeline.licence_detection import package_licence
from compress.pipeline.licence_rules import NOT_STATED
from compress.pipeline.licences import OF_RUN, RUNTIME, data_names
from compress.plugins.provenance.run_view import RunView, plain_name
from compress.recipe.recipe import START
from compress.report.run_folder import MODEL, REPORT
from compress.results.measurement import Measurement
from compress.results.report import LicenceRecord
from compress.utils.digests import digest_file
from compress.utils.environment import MISSING, package_versions

_SPEC = "1.6"
_NAMESPACE = uuid.UUID("5c1f3a52-2b2e-5d7b-9d0a-3f0f6a7f1c11")
"""Of serial numbers, each made of its report's digest, so that the same run has the same one."""
_ROWS = ("data ", "test data ")
Part = dict[str, Any]


def run_sbom(run: RunView) -> str:
    """Model, parents, data and packages with digests and licences, and what was measured with its intervals."""
    parents, data, packages = _parents(run), _data(run), _packages(run)
    model = _model(run, parents, data)
    serial = uuid.uuid5(_NAMESPACE, digest_file(run.folder / REPORT))
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
            "component": model,
        },
        "components": [*data, *packages],
        "dependencies": [{"ref": "model", "dependsOn": used}, *({"ref": name} for name in used)],
    }
    return json.dumps(bill, indent=1, ensure_ascii=False) + "\n"


def _model(run: RunView, parents: list[Part], data: list[Part]) -> Part:
    config = read_json(run.folder / MODEL / "config.json") if (run.folder / MODEL / "config.json").is_file() else {}
    kind, classes = config.get("model_type"), config.get("architectures")
    architecture = {"architectureFamily": kind, "modelArchitecture": classes[0] if classes else None}
    card = {
        "modelParameters": {
            "task": run.recipe.task,
            **{name: str(value) for name, value in architecture.items() if value},
            "datasets": [{"ref": part["bom-ref"]} for part in data],
        },
        "quantitativeAnalysis": {"performanceMetrics": [_metric(row) for row in run.metrics]},
        "considerations": {"technicalLimitations": run.notes},
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": run.report.recipe,
        "version": str(run.lock.get("stages", {}).get(run.recipe.labels()[-1], ""))[:12] or "0",
        **({"description": run.report.description} if run.report.description else {}),
        **_licensed(run.licence),
        "pedigree": {"ancestors": parents, "notes": f"stages: {', '.join(stage.name for stage in run.report.stages)}"},
        "components": [
            {"type": "file", "bom-ref": f"file:{name}", "name": name, **_hash(digest)}
            for name, digest in run.files.items()
        ],
        "modelCard": card,
        "properties": _properties(("compress:licence-remark", remark) for remark in run.licence_remarks),
    }


def _parents(run: RunView) -> list[Part]:
    """What the weights come from: the starting model (a distilled one's teacher), students, adapters, earlier runs."""
    found: dict[str, Part] = {}
    for one in run.licences:
        if one.of.startswith((RUNTIME, *_ROWS)):
            continue
        start = str(run.lock.get(START, "")) if one.of == "model" else ""
        told = {"compress:role": one.of.partition(" ")[0], "compress:directory-sha256": start}
        found[one.of] = {
            "type": "machine-learning-model",
            "bom-ref": f"parent:{one.of}",
            "name": one.name,
            **_licensed(one.licence),
            "properties": _properties((name, value) for name, value in told.items() if value),
        }
    return [*found.values()]


def _data(run: RunView) -> list[Part]:
    """Every split that was read, by the digest of its rows; then what an earlier run read."""
    records = [one for one in run.licences if one.of.startswith(_ROWS)]
    own = {one.name: one for one in records if OF_RUN not in one.of}
    recipe, names = run.recipe.data, [*data_names(run.recipe.data)]
    parts = []
    for split, digest in run.lock.get("data", {}).items():
        named = recipe.splits.get(split, split)
        place = plain_name(next((name for name in names if named.startswith(name)), recipe.source or named))
        parts.append(_dataset(f"data:{split}", f"{place} ({split})", own.get(place), digest))
    earlier = {one.of: one for one in records if OF_RUN in one.of}
    parts += [_dataset(of, of.removeprefix("data "), one, None) for of, one in earlier.items()]
    return parts


def _dataset(ref: str, name: str, record: LicenceRecord | None, digest: str | None) -> Part:
    counted = {"compress:sha256-of": "rows and class names"} if digest else {}
    return {
        "type": "data",
        "bom-ref": ref,
        "name": name,
        **(_hash(digest) if digest else {}),
        **_licensed(record.licence if record else NOT_STATED),
        "data": [{"type": "dataset", "name": name}],
        "properties": _properties(counted.items()),
    }


def _packages(run: RunView) -> list[Part]:
    """Those that stages called and those that run the files, in the versions that were used."""
    known = run.packages
    runtimes = [one.name for one in run.licences if one.of.startswith(RUNTIME)]
    known |= {name: found for name, found in package_versions(tuple(runtimes)).items() if name not in known}
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name.lower()}@{found}",
            "name": name,
            "version": found,
            "scope": "required" if name in runtimes else "optional",
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{found}",
            **_licensed(package_licence(name)),
        }
        for name, found in sorted(known.items())
        if found != MISSING
    ]


def _metric(row: Measurement) -> Part:
    interval = {}
    if row.low is not None and row.high is not None:
        interval = {"confidenceInterval": {"lowerBound": repr(row.low), "upperBound": repr(row.high)}}
    return {
        "type": f"{row.metric} ({row.unit})",
        "value": repr(row.value),
        "slice": f"all rows, on {row.target}",
        **interval,
    }


def _licensed(expression: str) -> Part:
    return {} if expression == NOT_STATED else {"licenses": [{"expression": expression}]}


def _hash(digest: str) -> Part:
    return {"hashes": [{"alg": "SHA-256", "content": digest}]}


def _properties(pairs: Iterable[tuple[str, str]]) -> list[Part]:
    return [{"name": name, "value": value} for name, value in pairs]
