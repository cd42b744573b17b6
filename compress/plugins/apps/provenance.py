"""Where an artifact came from, and under which terms, as far as the files of its run say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from pydantic import ValidationError

from compress import __version__
from compress.data.samples.sample import Sample, known_samples
from compress.pipeline.licence_rules import NOT_STATED
from compress.pipeline.licences import RUNTIME, carried, data_names
from compress.pipeline.licences import find_licences as licences_of
from compress.plugins.apps.manifest import Licence, Provenance
from compress.plugins.provenance.card import eval_results
from compress.plugins.provenance.run_view import read_lock
from compress.recipe.recipe import Recipe
from compress.report.run_folder import LOCK, RECIPE, REPORT
from compress.results.measurement import Measurement
from compress.results.metrics import card_metrics
from compress.results.report import FINAL, load_report
from compress.utils.digests import digest_file
from compress.utils.errors import InputError

_SAMPLE = "sample:"


@dataclass(frozen=True)
class Figures:
    """Measurements of a run's final model, also as entries of a model card's front matter."""

    rows: tuple[Measurement, ...]
    results: list[EvalResult]


def find_figures(recipe: Recipe, recipe_file: Path, run: Path, target: str) -> Figures | None:
    """Return the measurements on ``target``, or all if there are none on it; None for a model without a run.

    Args:
        recipe: Recipe of the model.
        recipe_file: Its file.
        run: Folder of the run.
        target: Target of the bundle.

    Raises:
        InputError: The report cannot be read.
    """
    if not _is_run(recipe_file, run):
        return None
    report = load_report(run / REPORT)
    shown = card_metrics()
    rows = [row for row in report.measurements if row.model == FINAL and row.metric in shown]
    rows = [row for row in rows if row.target == target] or rows
    return Figures(tuple(rows), eval_results(recipe, rows, report.data)) if rows else None


def _is_run(recipe_file: Path, run: Path) -> bool:
    own = recipe_file.resolve() == (run / RECIPE).resolve()
    return own and (run / LOCK).is_file() and (run / REPORT).is_file()


def find_provenance(recipe: Recipe, recipe_file: Path, run: Path, target: str) -> Provenance:
    """Return the origin of a model in the folder ``run``, or only the recipe's part if that is no run of this recipe.

    Args:
        recipe: Recipe of the model.
        recipe_file: Its file.
        run: Folder of the run.
        target: Target whose measurements are included.

    Raises:
        InputError: The report or the lock cannot be read.
    """
    named = (recipe.model, *data_names(recipe.data))
    samples = {name: sample for name in named if (sample := _sample(name)) is not None}
    known = Provenance(
        compress=__version__,
        recipe=recipe.name,
        recipe_sha256=digest_file(recipe_file),
        samples={name: {one.requirement: one.sha256 for one in found.packages} for name, found in samples.items()},
    )
    if not _is_run(recipe_file, run):
        return known
    lock, figures = read_lock(run / LOCK), find_figures(recipe, recipe_file, run, target)
    measured = {f"{row.metric} on {row.target}": row.value for row in figures.rows} if figures else {}
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
    """Return the licences of the model and of every source that states one.

    Paths in the recipe count from ``folder``. ``stated`` is the user's own statement about the model.
    """
    found = [one for one in licences_of(recipe, folder) if not one.of.startswith(RUNTIME)]
    others = (one for one in found if one.of != "model" and one.licence != NOT_STATED)
    model = Licence(of="model", licence=stated or carried(found))
    return (model, *(Licence(of=one.of, licence=one.licence) for one in others))


def _sample(name: str) -> Sample | None:
    if not name.startswith(_SAMPLE):
        return None
    return known_samples().get(name.removeprefix(_SAMPLE).partition("/")[0])
