"""Origin and licences of a model, as the files of its run state them."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from compress import __version__
from compress.data.samples.sample import known_samples
from compress.pipeline.licence_detection import NOT_STATED
from compress.pipeline.licences import RUNTIME, carried, data_names
from compress.pipeline.licences import find_licences as licences_of
from compress.plugins.apps.manifest import Licence, Provenance
from compress.plugins.provenance.run_view import card_rows, read_lock
from compress.recipe.recipe import Recipe
from compress.report.run_folder import LOCK, RECIPE, REPORT
from compress.results.report import Measurement, load_report
from compress.utils.errors import InputError
from compress.utils.storage import digest_file

_SAMPLE = "sample:"


def find_measurements(recipe_file: Path, run: Path, target: str) -> list[Measurement]:
    """Return the measurements on ``target``, or all if there are none on it, or none for a model without a run.

    Args:
        recipe_file: File of the model's recipe.
        run: Folder of the run.
        target: Target of the bundle.

    Raises:
        InputError: The report cannot be read.
    """
    if not _is_run(recipe_file, run):
        return []
    rows = card_rows(load_report(run / REPORT))
    return [row for row in rows if row.target == target] or rows


def _is_run(recipe_file: Path, run: Path) -> bool:
    is_its_recipe = recipe_file.resolve() == (run / RECIPE).resolve()
    return is_its_recipe and (run / LOCK).is_file() and (run / REPORT).is_file()


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
    sources = (recipe.model, *data_names(recipe.data))
    samples = {
        name: sample
        for name in sources
        if name.startswith(_SAMPLE)
        and (sample := known_samples().get(name.removeprefix(_SAMPLE).partition("/")[0])) is not None
    }
    provenance = Provenance(
        compress=__version__,
        recipe=recipe.name,
        recipe_sha256=digest_file(recipe_file),
        samples={name: {part.requirement: part.sha256 for part in sample.packages} for name, sample in samples.items()},
    )
    # A lock or report of another recipe says nothing about this model.
    if not _is_run(recipe_file, run):
        return provenance
    lock, figures = read_lock(run / LOCK), find_measurements(recipe_file, run, target)
    fields = provenance.model_dump() | {"report_sha256": digest_file(run / REPORT)}
    fields |= {name: lock[name] for name in ("seed", "start", "data", "stages", "packages") if name in lock}
    fields["measured"] = {f"{row.metric} on {row.target}": row.value for row in figures}
    try:
        return Provenance.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise InputError(f"The run's lock has a strange {name}: {problem['msg']}", where=str(run / LOCK)) from None


def find_licences(recipe: Recipe, folder: Path, stated: str | None) -> tuple[Licence, ...]:
    """Return the licences of the model and of each source that states one.

    Args:
        recipe: Recipe of the model.
        folder: Folder to which paths of the recipe refer.
        stated: Licence of the model that the user states.
    """
    stated_licences = [entry for entry in licences_of(recipe, folder) if not entry.of.startswith(RUNTIME)]
    others = (entry for entry in stated_licences if entry.of != "model" and entry.licence != NOT_STATED)
    model = Licence(of="model", licence=stated or carried(stated_licences))
    return (model, *(Licence(of=entry.of, licence=entry.licence) for entry in others))
