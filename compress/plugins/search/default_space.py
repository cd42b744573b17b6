"""What may vary in a recipe that nobody wrote a `search:` block for: what its stages say, where the model allows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources
from compress.recipe.document import Document
from compress.recipe.loading import recipe_of
from compress.recipe.overrides import apply_override
from compress.results.metrics import describe_metric
from compress.stages.cost_model import Shape
from compress.stages.registry import STAGES
from compress.utils.errors import CompressError, RecipeError


def put_choices(document: Document, folder: Path, held_out: tuple[float, int]) -> None:
    """What the stages behind the baseline say is worth searching, for shapes as they come by there, into ``document``.

    ``held_out`` are the share of the rows to train on, and the most of them, that choose. Raises `RecipeError`.
    """
    values = document.values
    held = next(each for each in values["data"]["hold_out"] if each["split"] == "select")
    values["search"]["select"] = {name: value for name, value in held.items() if name != "split"}
    copy = deepcopy(document)
    copy.values.pop("search")
    recipe = recipe_of(copy, folder)
    sources = Sources(recipe, folder)
    start = sources.find_all()
    _fit_rows(document, sources, *held_out)
    context = plan_context(recipe, sources, start)
    wanted = (*values["search"]["minimize"], *(limit.metric for limit in recipe.limits))
    timed = any(describe_metric(name).timed for name in wanted)
    choices: dict[str, list[Any]] = {}
    optional: list[str] = []
    shape: Shape | None = start
    labels = recipe.labels()
    first = labels.index(recipe.baseline) + 1 if recipe.baseline in labels else 0
    for index, (stage, label) in enumerate(zip(recipe.stages, labels, strict=True)):
        if index >= first:
            worth = {}
            for name, tried in stage.worth_searching(shape, timed).items():
                field = f"stages.{index}.{stage.kind}.{name}"
                possible = [value for value in tried if _can_be(copy, folder, field, value)]
                if possible:
                    worth[field] = possible
            choices |= worth
            if stage.worth_searching(shape, timed=True) and stage.takes() is stage.gives():
                optional.append(label)
        shape = context.shapes[label] = stage.predict(shape, context).shape
    values["search"] |= {"choices": choices, "optional": optional}


def is_possible(model: Path, kind: str, fields: Mapping[str, Any]) -> bool:
    """Whether a stage finds in a model's architecture what it cuts."""
    try:
        STAGES[kind].model_validate({**fields, "kind": kind}).check_model(model)
    except (CompressError, ValidationError):
        return False
    return True


def _fit_rows(document: Document, sources: Sources, share: float, most: int) -> None:
    """Hold out no more rows to choose by than their share of those that there are to train on."""
    rows = next((one.rows for one in sources.rows if one.role == "split train" and one.rows is not None), None)
    for held in document.values["data"]["hold_out"]:
        if held["split"] == "select" and held["rows"] == most and rows is not None and share * rows < most:
            held["rows"] = max(int(share * rows), 2)
            document.values["search"]["select"]["rows"] = held["rows"]


def _can_be(document: Document, folder: Path, field: str, value: Any) -> bool:
    """Whether the recipe may have that value, of what it is for and what else it says."""
    changed = deepcopy(document)
    apply_override(changed, f"{field}={json.dumps(value)}")
    try:
        recipe_of(changed, folder)
    except RecipeError:
        return False
    return True
