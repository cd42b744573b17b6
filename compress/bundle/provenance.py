"""Where an artifact came from, and under which terms, as far as the files of its run say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress import __version__
from compress.bundle.manifest import Licence, Provenance
from compress.errors import InputError
from compress.models.model import digest_file
from compress.recipe import Recipe
from compress.report.schema import FINAL, load_report
from compress.samples.catalog import SAMPLES

LOCK, REPORT = "lock.json", "report.json"
NOT_STATED = "not stated"
_SAMPLE = "sample:"
_SHOWN = ("accuracy", "f1", "size_bytes", "parameters", "latency_ms", "speedup", "calibration_error")


def find_provenance(recipe: Recipe, recipe_file: Path, run: Path) -> Provenance:
    """Of a model in the folder ``run``, if that is a run's; else the recipe is all that is known.

    Raises `InputError` for a report or lock that can't be read.
    """
    known = {"compress": __version__, "recipe": recipe.name, "recipe_sha256": digest_file(recipe_file)}
    if not (run / LOCK).is_file() or not (run / REPORT).is_file():
        return Provenance(**known)
    report, lock = load_report(run / REPORT), _read_lock(run / LOCK)
    measured = {
        f"{row.metric} on {row.target}": row.value
        for row in report.measurements
        if row.model == FINAL and row.metric in _SHOWN
    }
    return Provenance(
        **known,
        seed=lock.get("seed"),
        start=lock.get("start"),
        data=lock.get("data", {}),
        stages=lock.get("stages", {}),
        packages=lock.get("packages", {}),
        report_sha256=digest_file(run / REPORT),
        measured=measured,
    )


def find_licences(recipe: Recipe, stated: str | None) -> tuple[Licence, ...]:
    """Of the model, as its user states it or the sample it started from; and of the samples that it learned from."""
    model = Licence(of="model", licence=stated or _of_sample(recipe.model) or NOT_STATED)
    data = recipe.data
    named: Sequence[str | None] = [data.source, *data.splits.values(), *data.unlabeled]
    found = dict.fromkeys(name for name in named if name and _of_sample(name))
    return (model, *(Licence(of=f"data {name}", licence=_of_sample(name) or NOT_STATED) for name in found))


def _of_sample(name: str | None) -> str | None:
    if name is None or not name.startswith(_SAMPLE):
        return None
    sample = SAMPLES.get(name.removeprefix(_SAMPLE).partition("/")[0])
    return None if sample is None else sample.licence


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The run's lock cannot be read: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}
