"""Where an artifact came from, and under which terms, as far as the files of its run say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import __version__
from compress.bundle.manifest import Licence, Provenance
from compress.digests import digest_file
from compress.errors import InputError
from compress.papers.licences import RUNTIME, carried, data_names
from compress.papers.licences import find_licences as licences_of
from compress.papers.terms import NOT_STATED
from compress.recipe.recipe import Recipe
from compress.report.schema import FINAL, load_report
from compress.samples.sample import Sample, known_samples

RECIPE, LOCK, REPORT = "recipe.yaml", "lock.json", "report.json"
_SAMPLE = "sample:"
_SHOWN = (
    "accuracy",
    "f1",
    "recall_at_10",
    "recall_at_1",
    "word_error_rate",
    "size_bytes",
    "parameters",
    "latency_ms",
    "speedup",
    "calibration_error",
)


def find_provenance(recipe: Recipe, recipe_file: Path, run: Path, target: str) -> Provenance:
    """Of a model in the folder ``run``, if that is a run of this recipe; else the recipe is all that is known.

    What the run measured is that of ``target``, where it measured there.

    Raises `InputError` for a report or lock that can't be read.
    """
    named = (recipe.model, *data_names(recipe.data))
    samples = {name: sample for name in named if (sample := _sample(name)) is not None}
    known = Provenance(
        compress=__version__,
        recipe=recipe.name,
        recipe_sha256=digest_file(recipe_file),
        samples={name: {one.requirement: one.sha256 for one in found.packages} for name, found in samples.items()},
    )
    own = recipe_file.resolve() == (run / RECIPE).resolve()
    if not own or not (run / LOCK).is_file() or not (run / REPORT).is_file():
        return known
    report, lock = load_report(run / REPORT), _read_lock(run / LOCK)
    rows = [row for row in report.measurements if row.model == FINAL and row.metric in _SHOWN]
    own_rows = [row for row in rows if row.target == target]
    measured = {f"{row.metric} on {row.target}": row.value for row in own_rows or rows}
    found: dict[str, Any] = {
        name: lock[name] for name in ("seed", "start", "data", "stages", "packages") if name in lock
    }
    return _checked(known, {**found, "report_sha256": digest_file(run / REPORT), "measured": measured}, run / LOCK)


def _checked(known: Provenance, more: dict[str, Any], lock: Path) -> Provenance:
    try:
        return Provenance.model_validate({**known.model_dump(), **more})
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        raise InputError(f"The run's lock has a strange {name}: {wrong['msg']}", where=str(lock)) from None


def find_licences(recipe: Recipe, folder: Path, stated: str | None) -> tuple[Licence, ...]:
    """Of the model, as its user states it or as its sources do; and of every source that says its own.

    Paths in the recipe count from ``folder``.
    """
    found = [one for one in licences_of(recipe, folder) if not one.of.startswith(RUNTIME)]
    others = (one for one in found if one.of != "model" and one.licence != NOT_STATED)
    model = Licence(of="model", licence=stated or carried(found))
    return (model, *(Licence(of=one.of, licence=one.licence) for one in others))


def _sample(name: str) -> Sample | None:
    if not name.startswith(_SAMPLE):
        return None
    return known_samples().get(name.removeprefix(_SAMPLE).partition("/")[0])


def _read_lock(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The run's lock cannot be read: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}
