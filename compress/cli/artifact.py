"""What a person means by an artifact, and which recipe says how to feed it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError
from compress.formats.model_file import format_of, model_files
from compress.recipe.recipe import Recipe
from compress.recipe_source import read_recipe
from compress.tasks.capability import READS_ROWS

if TYPE_CHECKING:
    import numpy as np

    from compress.data.dataset import Dataset
    from compress.data.membership import Part
    from compress.data.slices import Slice, Unit
    from compress.progress import Progress
    from compress.targets import AppProfile
    from compress.tasks.task import Examples, Task

RECIPE = "recipe.yaml"
MODEL = "model"
TARGETS = "targets"
"""In a run's folder: for each target what was written for it, in a format of its own."""


@dataclass(frozen=True)
class Artifact:
    """A model folder and the recipe that says which task and data it is for."""

    folder: Path
    recipe: Recipe
    recipe_folder: Path

    @property
    def task(self) -> Task:
        """The recipe's task."""
        from compress.tasks.registry import get_task

        return get_task(self.recipe.task)

    def dataset(self, progress: Progress) -> Dataset:
        """The recipe's data, with the columns that slices read."""
        from compress.data.dataset import load_dataset
        from compress.data.slices import extra_columns

        columns = self.task.columns
        extra = extra_columns(self.slices, (column.name for column in columns))
        return load_dataset(self.recipe.data, columns, self.recipe_folder, progress, extra)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The recipe's slices, or the task's where it names none."""
        return self.task.slices if self.recipe.slices is None else self.recipe.slices

    def parts(self, data: Dataset, split: str, examples: Examples) -> tuple[list[Part], list[str]]:
        """The slices of a split, tokens counted by the artifact's own tokenizer; and notes on those without a row.

        Raises `InputError` for a task that is judged on running text.
        """
        if READS_ROWS not in self.task.capabilities:
            raise InputError(f"There are no slices of running text, which {self.task.name} is judged on.")
        from compress.data.membership import character_lengths, find_parts

        def lengths(unit: Unit) -> np.ndarray:
            return examples.lengths()[: len(data.split(split))] if unit == "tokens" else character_lengths(data, split)

        return find_parts(self.slices, data, split, lengths)


def find_artifact(path: Path, recipe: Path | None) -> Artifact:
    """``path`` may be a run's folder, its `model` folder, a recipe's name (its latest run) or any model folder.

    Raises `InputError` where there is no model that a runtime opens, or no recipe for it.
    """
    place = _model_folder(path)
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
            mend="name a recipe with --recipe; its task, data and benchmark sections are used",
        )
    read = read_recipe(source)
    model_files(place)
    return Artifact(place, read, source.parent)


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
