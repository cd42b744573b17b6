"""Which models of a recipe have to be made first, and how."""

from __future__ import annotations

from pathlib import Path

from compress.recipe.recipe import Recipe
from compress.sources.origin import Origin
from compress.stages.distill import Distill


def origin_of(reference: str, recipe: Recipe, folder: Path) -> Origin | None:
    """How the model of that name is made, in a recipe that lies in ``folder``; None for one whose files are whole.

    That is the starting model, by a module or with random weights, or a student of random weights.
    """
    if reference == recipe.model:
        made = recipe.module is not None or recipe.random_weights
        arguments = recipe.module_arguments
        return Origin(recipe.module, recipe.random_weights, recipe.seed, folder, arguments) if made else None
    students = [stage.student for stage in recipe.stages if isinstance(stage, Distill) and stage.student]
    if any(student.random_weights and student.model == reference for student in students):
        return Origin(None, True, recipe.seed, folder)
    return None
