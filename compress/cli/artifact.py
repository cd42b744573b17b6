"""What a person means by an artifact, and which recipe says how to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.dataset import Dataset, load_dataset
from compress.evaluation.evaluate import encode_for_model
from compress.formats.model_file import format_of, holds, model_files
from compress.formats.registry import FORMATS
from compress.formats.target_profile import AppProfile, Target
from compress.formats.targets import PROFILES
from compress.models.config_checks import allow
from compress.models.json_file import read_json
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import Recipe
from compress.report.run_folder import MODEL, RECIPE, TARGETS
from compress.sources.onnx_file import convert_onnx, onnx_file
from compress.sources.resolve import DEFAULT_CACHE
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import get_task, tasks_with
from compress.tasks.task import Examples, Task
from compress.utils.errors import InputError
from compress.utils.progress import Progress

"""In a run's folder: for each target what was written for it, in a format of its own."""


@dataclass(frozen=True)
class Artifact:
    """A model folder and the recipe that says which task and data it is for."""

    folder: Path
    recipe: Recipe
    recipe_folder: Path

    @property
    def task(self) -> Task:
        """The recipe's task, of the kind that the model is for."""
        return get_task(self.recipe.task).specialize(read_json(self.folder / "config.json"))

    def dataset(self, progress: Progress) -> Dataset:
        """The recipe's data."""
        return load_dataset(self.recipe.data, self.task.columns, self.recipe_folder, progress)

    def examples(self, progress: Progress, folder: Path | None = None) -> Examples:
        """The test split as the processor encodes it that lies beside the model, or in ``folder``."""
        rows = self.dataset(progress).split("test")
        return encode_for_model(
            folder or self.folder, self.task, rows, self.recipe.data.max_length, self.recipe.evaluation
        )

    def runner(self, scratch: Path, progress: Progress, **benchmark: Any) -> StageRunner:
        """The recipe's runner, its cache below ``scratch``; what is given of ``benchmark`` replaces the recipe's."""
        given = {name: value for name, value in benchmark.items() if value is not None}
        settings = self.recipe.benchmark.model_copy(update=given)
        return StageRunner(
            self.recipe.model_copy(update={"benchmark": settings}), self.recipe_folder, scratch, progress
        )


def find_artifact(path: Path, recipe: Path | None) -> Artifact:
    """``path`` may be a run's folder, its `model` folder, a recipe's name (its latest run) or any model folder.

    Without a recipe it may be anybody's ONNX graph, which is asked with drawn inputs.

    Raises `InputError` where there is no model that a runtime opens, or no recipe for it.
    """
    place = _model_folder(path)
    graph = onnx_file(path) if place is None and recipe is None else None
    if graph is not None:
        return _bare(graph)
    if place is None:
        raise InputError(
            f"There is no model in {str(path)!r}.",
            expected="a run's folder, a folder with config.json and one .onnx file, or the name of a recipe",
        )
    source = recipe or (place.parent.parent if place.parent.name == TARGETS else place.parent) / RECIPE
    if not source.is_file():
        raise InputError(
            "Nothing says which task and data this model is for.",
            where=str(place),
            hint="name a recipe with --recipe; its task, data and benchmark sections are used",
        )
    read = read_recipe(source)
    model_files(place)
    if read.module is not None:
        allow(read.module, source.parent)
    return Artifact(place, read, source.parent)


def _bare(graph: Path) -> Artifact:
    """Somebody's graph, to be asked with inputs that are drawn."""
    task = get_task(tasks_with(frozenset({TAKES_ARRAYS}))[0])
    fields = {"name": "graph", "task": task.name, "model": str(graph), "data": task.data, "stages": ["ort"]}
    return Artifact(convert_onnx(graph, DEFAULT_CACHE, arrays=True), Recipe.model_validate(fields), graph.parent)


def check_opens(folder: Path, target: Target) -> None:
    """Raise `InputError` where ``folder`` holds nothing that the runtime of ``target`` opens."""
    opened = {form: spec for form, spec in FORMATS.items() if form == target.format or target.runtime in spec.runtimes}
    if not any(holds(folder, form) for form in opened):
        form, endings = format_of(folder), " or ".join(one.suffix for one in opened.values())
        able = [name for name, other in PROFILES.items() if other.target.format == form]
        raise InputError(
            f"{target.name} does not open {form.upper()}, which the folder holds.",
            where=str(folder),
            expected=f"a folder with config.json and one file ending in {endings}",
            hint=f"name a --target that does: {', '.join(able)}",
        )


def has_recipe(path: Path) -> bool:
    """Whether the recipe lies beside what may be a run's folder, its model's folder or a file in that."""
    return any((folder / RECIPE).is_file() for folder in (path, path.parent, path / "latest"))


def written_for(artifact: Artifact, profile: AppProfile) -> Path:
    """What its run wrote for a target, if an app opens that, or else the model itself."""
    own = artifact.folder.parent / TARGETS / profile.name
    fits = artifact.folder.name == MODEL and own.is_dir() and format_of(own) in profile.apps
    return own if fits else artifact.folder


def generating_artifact(path: Path) -> Path:
    """``path`` as for `find_artifact`, or any folder or file of one graph; no recipe is asked for."""
    return _model_folder(path) or path


def _model_folder(path: Path) -> Path | None:
    named = Path("artifacts") / "runs" / path / "latest"
    places = (path / MODEL, path / "latest" / MODEL, path, named / MODEL)
    return next((place for place in places if (place / "config.json").is_file()), None)
