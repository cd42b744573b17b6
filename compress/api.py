"""Python API: `check`, `run`, `evaluate`, `load` and `search`, which `compress` exposes.

Errors are `CompressError`s. Nothing is printed unless ``progress`` asks for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from compress.plugins import explain_missing, find_extensions
from compress.recipe.document import Document, parse_into, read_document
from compress.recipe.loading import dump_recipe, located, parse_recipe
from compress.recipe.recipe import Recipe
from compress.recipe.shipped import find_recipe
from compress.utils.errors import CompressError, InputError, RecipeError
from compress.utils.progress import Progress, SilentProgress

# The functions import what they need, so that a mistake in a recipe is reported before torch is imported.
if TYPE_CHECKING:
    from compress.evaluation.loaded_model import LoadedModel
    from compress.pipeline.plan import Plan
    from compress.pipeline.run import Run
    from compress.results.report import Measurement

__all__ = ["CompressError", "Recipe", "check", "evaluate", "load", "run", "search"]

RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""Path or name of a recipe, its fields as in YAML, or a `Recipe`. Relative paths in fields start from this folder."""


def check(
    recipe: RecipeLike,
    *,
    set: Sequence[str] = (),
    artifacts: str | Path = "artifacts",
    progress: bool | Progress = False,
) -> Plan:
    """Check that a recipe can run, and predict its time, memory and disk, before a model is loaded.

    Args:
        recipe: Path of a recipe, name of a shipped one, a mapping of its fields, or a `Recipe`.
        set: Replacements of fields, such as `distill.epochs=2`.
        artifacts: Folder of the cache and the runs.
        progress: True shows notes on standard error.

    Raises:
        InputError: With all problems of the recipe, its model and its data.
    """
    from compress.pipeline.keys import CachedStages
    from compress.pipeline.planning import make_plan, with_problems_of_files

    document = _document(recipe)
    folder = Path(document.file).parent
    try:
        loaded = parse_recipe(document, folder, set)
    except RecipeError as error:
        with located(document):
            raise with_problems_of_files(error, folder) from None
    cached, shown = CachedStages(loaded, folder, Path(artifacts)), _progress(progress)
    with located(document):
        return make_plan(loaded, folder, cached, Path(artifacts), looks_into_model=True, progress=shown)


def run(
    recipe: RecipeLike,
    *,
    set: Sequence[str] = (),
    artifacts: str | Path = "artifacts",
    remeasure: bool = False,
    progress: bool | Progress = False,
) -> Run:
    """Run a recipe and return its report, folder and model. Finished stages come from the cache.

    Args:
        recipe: Path of a recipe, name of a shipped one, a mapping of its fields, or a `Recipe`.
        set: Replacements of fields, such as `distill.epochs=2`.
        artifacts: Folder of the cache and the runs.
        remeasure: Take new timings even if the cache has some.
        progress: True shows bars and notes on standard error.

    Raises:
        CompressError: Finished stages stay in the cache; a missed limit is no error, see `Report.missed`.
    """
    loaded, document = _parsed(recipe, set)
    from compress.pipeline.run import run as run_recipe

    with located(document):
        return run_recipe(loaded, Path(document.file).parent, Path(artifacts), _progress(progress), remeasure)


def evaluate(
    artifact: str | Path,
    *,
    recipe: str | Path | None = None,
    data: str | Path | None = None,
    split: str = "test",
    target: str = "cpu",
    threads: int = 2,
    by_slice: bool = False,
    progress: bool | Progress = False,
) -> list[Measurement]:
    """Measure the task's metrics of an artifact, with intervals, through the runtime of a target.

    Args:
        artifact: Folder of a run, its `model` folder, the name of a recipe that ran, or any exported model.
        recipe: Path of the recipe with the task and data; by default the recipe beside the model.
        data: File or folder of other rows to evaluate on, with the columns of the recipe's test split.
        split: The split to evaluate on.
        target: Target of the model.
        threads: Threads of the runtime.
        by_slice: Also measure each slice that the recipe defines.
        progress: True shows bars and notes on standard error.

    Raises:
        InputError: There is no such artifact, the target does not open it, or both ``data`` and ``split`` are given.
    """
    from compress.formats.quiet_output import quiet_libraries
    from compress.formats.target_profile import TargetProfile
    from compress.formats.targets import find_target
    from compress.pipeline import generation_evals
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.pipeline.index_evaluation import index_retrieval
    from compress.pipeline.target_session import TargetSession

    loaded = find_artifact(Path(artifact), None if recipe is None else find_recipe(Path(recipe)))
    if data is not None:
        if split != "test":
            raise InputError(f"The rows of --data replace the test split, and --split names {split!r}.")
        loaded = loaded.with_test_rows(Path(data))
    profile, shown, name = TargetProfile(find_target(target)), _progress(progress), loaded.folder.name
    check_opens(loaded.folder, profile.target)
    quiet_libraries()
    # The session caches predictions, which nothing else needs.
    with tempfile.TemporaryDirectory(prefix="compress-evaluate-") as scratch:
        runner = loaded.runner(Path(scratch), shown, threads=threads)
        session = TargetSession(runner, profile, {name: loaded.folder}, split)
        parts, notes = session.parts() if by_slice else ([], [])
        for note in filter(None, [session.examples(name).note, *notes]):
            shown.note(note)
        rows = [
            *session.accuracies(parts),
            *generation_evals.generations(session)[0],
            *generation_evals.choices(session),
            *generation_evals.instructed(session)[0],
            *generation_evals.similarities(session),
            *index_retrieval(session),
            *generation_evals.judgements(session, parts),
        ]
    if not rows:
        raise InputError(
            f"A model of {loaded.task.name} has no metric of its own.",
            where=str(artifact),
            expected="a model whose task has metrics",
            hint="the report of its run compares it with the original; a recipe with a `task` measures accuracy",
        )
    return rows


def load(
    artifact: str | Path,
    target: str | None = None,
    *,
    recipe: str | Path | None = None,
    threads: int | None = None,
) -> LoadedModel:
    """Open a model for predictions on raw inputs.

    Args:
        artifact: Folder of a run, its `model` folder, the name of a recipe that ran, or any exported model.
        target: Target that runs the model; by default the first one of its format, which for ONNX is `cpu`.
        recipe: Path of the recipe with the task; by default the recipe beside the model.
        threads: Number of threads; by default all cores that this process may use.

    Raises:
        InputError: There is no such artifact, or the target does not open it.
    """
    from compress.pipeline.artifact import find_artifact

    return find_artifact(Path(artifact), None if recipe is None else find_recipe(Path(recipe))).open(target, threads)


def search(
    recipe: RecipeLike | None = None,
    *,
    set: Sequence[str] = (),
    artifacts: str | Path = "artifacts",
    progress: bool | Progress = False,
    **options: Any,
) -> Any:
    """Search for the recipe that meets the limits and is smallest or fastest. Needs the plug-in search.

    Args:
        recipe: Recipe with a `search` block, as in `run`; None if the options name `model` and `data`.
        set: Replacements of fields, such as `distill.epochs=2`.
        artifacts: Folder of the cache and the searches.
        progress: True shows bars and notes on standard error.
        **options: Options of `compress search`, such as `keep=0.985`, `budget="30m"`, `trials=20` or `resume=True`.

    Returns:
        The plug-in's result, with the `folder` of the search and its `record`.

    Raises:
        InputError: The plug-in is not installed, or the recipe or an option is invalid.
    """
    extension = find_extensions("functions").get("search")
    if extension is None:
        reason = explain_missing("functions", "search")
        raise InputError("compress.search is not available.", expected=reason or "the plug-in search")
    document = None if recipe is None else _document(recipe)
    return extension.load()(document, set, Path(artifacts), _progress(progress), **options)


def read_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """Return a checked recipe and the folder that its relative paths start from. Raises `RecipeError`."""
    loaded, document = _parsed(recipe, overrides)
    return loaded, Path(document.file).parent


def _parsed(recipe: RecipeLike, overrides: Sequence[str]) -> tuple[Recipe, Document]:
    """Return a checked recipe and its document, which has the lines of its fields."""
    document = _document(recipe)
    return parse_recipe(document, Path(document.file).parent, overrides), document


def _document(recipe: RecipeLike) -> Document:
    """Return the values of a recipe, with lines if it is a file."""
    if isinstance(recipe, str | Path):
        return read_document(find_recipe(Path(recipe)))
    document = Document("the recipe")
    if isinstance(recipe, Recipe):
        parse_into(document, dump_recipe(recipe), keep_lines=False)
    else:
        # Tuples and paths become lists and texts, as YAML has them.
        document.values = to_jsonable_python(dict(recipe))
    return document


def _progress(progress: bool | Progress) -> Progress:
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return SilentProgress()
    from compress.report.progress import ConsoleProgress

    return ConsoleProgress()
