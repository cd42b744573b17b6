"""What may vary in a recipe that nobody wrote a `search:` block for: what its stages say, where the model allows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources
from compress.recipe.document import Document
from compress.recipe.loading import parse_recipe
from compress.recipe.overrides import apply_override
from compress.results.metrics import describe_metric
from compress.stages.cost_model import Shape
from compress.stages.distill.student_shape import spread_layers
from compress.stages.protocols import ChecksModel, predict_cost, search_values
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, SINGLE_CALL
from compress.tasks.task import Task
from compress.utils.errors import CompressError, RecipeError


def add_default_space(document: Document, folder: Path, held_out: tuple[float, int]) -> None:
    """What the stages behind the baseline say is worth searching, for shapes as they come by there, into ``document``.

    ``held_out`` are the share of the rows to train on, and the most of them, that choose. Raises `RecipeError`.
    """
    values = document.values
    held = next(each for each in values["data"]["hold_out"] if each["split"] == "select")
    values["search"]["select"] = {name: value for name, value in held.items() if name != "split"}
    copy = deepcopy(document)
    copy.values.pop("search")
    recipe = parse_recipe(copy, folder)
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
            for name, tried in search_values(stage, shape, timed).items():
                field = f"stages.{index}.{stage.kind}.{name}"
                possible = [value for value in tried if _can_be(copy, folder, field, value)]
                if possible:
                    worth[field] = possible
            choices |= worth
            if search_values(stage, shape, timed=True) and stage.input_type() is stage.output_type():
                optional.append(label)
        shape = context.shapes[label] = predict_cost(stage, shape, context).shape
    values["search"] |= {"choices": choices, "optional": optional}


def is_possible(model: Path, kind: str, fields: Mapping[str, Any]) -> bool:
    """Whether a stage finds in a model's architecture what it cuts."""
    try:
        stage = STAGES[kind].model_validate({**fields, "kind": kind})
        if isinstance(stage, ChecksModel):
            stage.check_model(model)
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
        parse_recipe(changed, folder)
    except RecipeError:
        return False
    return True


_FINETUNE, _PRUNE, _DISTILL = "finetune", "prune", "distill"
_FULL_SIZE: tuple[dict[str, Any], ...] = ({"onnx": {}}, {"onnx_int8": {}})
"""Stages that apply to every model that answers in one forward pass."""
_NARROWER, _FEWER_CHANNELS = ({"feed_forward": 0.25}, {"heads": 0.25}, {"heads": 0.5}), ({"flops": 0.3},)
"""Mild pruning of models with attention, and of models without."""


def initial_stages(
    task: Task, starter: Sequence[Mapping[str, Any]], shape: Shape | None, is_possible: Callable[[str, Any], bool]
) -> list[dict[str, Any]]:
    """Stages as a recipe writes them, for a kind of ``task`` and a model of a ``shape``.

    ``is_possible`` says whether a kind of stage with some fields can be made of the model.

    Where the task's stages fit, something is cut out of what was trained, by what the architecture has, and what is
    left learns from it: without them most tasks had only the bits to choose. A student that the starter names is
    another model, which nobody gave, and its layers are another model's too.
    """
    fitted = [_fitted(stage, shape, is_possible) for stage in starter if not _names_a_student(stage)]
    found = [part for stage in fitted for part in _by_part(stage, task)]
    kinds = [next(iter(stage)) for stage in found]
    if SINGLE_CALL in task.capabilities and any("part" in next(iter(stage.values())) for stage in found):
        # The starter is for models of another kind, which write their answers by two graphs.
        found = [{_FINETUNE: {"epochs": 2}}, *deepcopy(_FULL_SIZE)]
    elif _PRUNE in kinds or shape is None or not _fits(_PRUNE, task):
        return found
    elif _FINETUNE not in kinds:
        if not _fits(_FINETUNE, task) or kinds[: len(_FULL_SIZE)] != [next(iter(stage)) for stage in _FULL_SIZE]:
            return found
        found.insert(0, {_FINETUNE: {"epochs": 2}})
    return _with_cuts(found, task, shape, is_possible)


def _with_cuts(
    stages: list[dict[str, Any]], task: Task, shape: Shape | None, is_possible: Callable[[str, Any], bool]
) -> list[dict[str, Any]]:
    """The same with the first cut that is possible behind `finetune`, and a lesson behind it where there is none."""
    at = next(place for place, stage in enumerate(stages) if _FINETUNE in stage)
    cuts = () if shape is None or not _fits(_PRUNE, task) else _NARROWER if shape.attention else _FEWER_CHANNELS
    cut = next((cut for cut in cuts if is_possible(_PRUNE, cut)), None)
    if cut is None:
        return stages
    more: list[dict[str, Any]] = [{_PRUNE: dict(cut)}]
    if _fits(_DISTILL, task) and not any(_DISTILL in stage for stage in stages):
        lesson = {name: value for name, value in stages[at][_FINETUNE].items() if name != "learning_rate"}
        more.append({_DISTILL: {"teacher": _FINETUNE, **lesson}})
    return [*stages[: at + 1], *more, *stages[at + 1 :]]


def _fitted(
    stage: Mapping[str, Any], shape: Shape | None, is_possible: Callable[[str, Any], bool]
) -> Mapping[str, Any]:
    """A stage whose student has half of the model's own layers, or all where layers cannot go."""
    fields = stage.get(_DISTILL) or {}
    if shape is None or "layers" not in (fields.get("student") or {}):
        return stage
    half = {**fields, "student": {"layers": spread_layers(shape.layers, max(shape.layers // 2, 1))}}
    if shape.layers > 1 and is_possible(_DISTILL, half):
        return {_DISTILL: half}
    return {_DISTILL: {name: value for name, value in fields.items() if name != "student"}}


def _by_part(stage: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """A stage by itself; integers for what reads a text and few bits for what writes one, where that is two graphs."""
    if EXPORTED_FROM_CHECKPOINT in task.capabilities and stage == {"onnx_int8": {}}:
        return [{"onnx_int8": {"part": "encoder"}}, {"onnx_weight_only": {"part": "decoder", "bits": 8}}]
    return [deepcopy(dict(stage))]


def _names_a_student(stage: Mapping[str, Any]) -> bool:
    fields = stage.get(_DISTILL)
    return isinstance(fields, Mapping) and "model" in (fields.get("student") or {})


def _fits(kind: str, task: Task) -> bool:
    return STAGES[kind].supports(task.capabilities)
