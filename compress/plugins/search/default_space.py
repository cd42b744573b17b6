"""Stages and search space of a search that starts from a model instead of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

from pydantic import ValidationError

from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources
from compress.plugins.search.space import StageFields, first_varied
from compress.recipe.document import Document
from compress.recipe.loading import parse_recipe
from compress.recipe.overrides import apply_override
from compress.results.metrics import describe_metric
from compress.stages.cost_model import Shape
from compress.stages.distill.settings import spread_layers
from compress.stages.protocols import ChecksModel, predict_cost, search_values
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, SINGLE_CALL
from compress.tasks.task import Task
from compress.utils.errors import CompressError, RecipeError


def add_default_space(document: Document, folder: Path, held_out: tuple[float, int]) -> None:
    """Add the fields that stages after the baseline declare worth searching to the document's `search:` block.

    Args:
        document: Recipe without choices, changed in place.
        folder: Folder that its paths are relative to.
        held_out: Share of the training rows that are held out for selection, and their largest number.

    Raises:
        RecipeError: Where the recipe is not valid.
    """
    values = document.values
    selection = next(split for split in values["data"]["hold_out"] if split["split"] == "select")
    values["search"]["select"] = {name: value for name, value in selection.items() if name != "split"}
    # Validate candidate values on a recipe without a search block, which is not complete yet.
    copy = deepcopy(document)
    copy.values.pop("search")
    recipe = parse_recipe(copy, folder)
    sources = Sources(recipe, folder)
    start = sources.find_all()
    # Hold out at most the given share of the training rows.
    rows = next((source.rows for source in sources.rows if source.role == "split train" and source.rows), None)
    share, most = held_out
    if rows is not None and selection["rows"] == most and share * rows < most:
        selection["rows"] = values["search"]["select"]["rows"] = max(int(share * rows), 2)
    context = plan_context(recipe, sources, start)
    metrics = (*values["search"]["minimize"], *(limit.metric for limit in recipe.limits))
    timed = any(describe_metric(name).timed for name in metrics)
    choices: dict[str, list[object]] = {}
    optional: list[str] = []
    shape: Shape | None = start
    labels = recipe.labels()
    first = first_varied(recipe)
    for index, (stage, label) in enumerate(zip(recipe.stages, labels, strict=True)):
        if index >= first:
            for name, candidates in search_values(stage, shape, timed).items():
                field = f"stages.{index}.{stage.kind}.{name}"
                possible = [value for value in candidates if _is_valid(copy, folder, field, value)]
                if possible:
                    choices[field] = possible
            if search_values(stage, shape, timed=True) and stage.input_type() is stage.output_type():
                optional.append(label)
        # Later stages start from the shape that this stage leaves.
        shape = context.shapes[label] = predict_cost(stage, shape, context).shape
    values["search"] |= {"choices": choices, "optional": optional}


def is_possible(model: Path, kind: str, fields: StageFields) -> bool:
    """Return whether a model's architecture has the parts that a stage prunes."""
    try:
        stage = STAGES[kind].model_validate({**fields, "kind": kind})
        if isinstance(stage, ChecksModel):
            stage.check_model(model)
    except (CompressError, ValidationError):
        return False
    return True


def _is_valid(document: Document, folder: Path, field: str, value: object) -> bool:
    """Return whether the recipe is valid with this value."""
    changed = deepcopy(document)
    apply_override(changed, f"{field}={json.dumps(value)}")
    try:
        parse_recipe(changed, folder)
    except RecipeError:
        return False
    return True


_FINETUNE, _PRUNE, _DISTILL = "finetune", "prune", "distill"
_FULL_SIZE: tuple[StageFields, ...] = ({"onnx": {}}, {"onnx_int8": {}})
"""Stages that apply to every model that answers in one forward pass."""
_NARROWER, _FEWER_CHANNELS = ({"feed_forward": 0.25}, {"heads": 0.25}, {"heads": 0.5}), ({"flops": 0.3},)
"""Mild pruning of models with attention, and of models without."""


def initial_stages(
    task: Task, starter: Sequence[StageFields], shape: Shape | None, is_possible: Callable[[str, StageFields], bool]
) -> list[StageFields]:
    """Return the stages of a recipe for a task and a model.

    Where the task's stages allow it, the trained model is pruned by what its architecture has, and then
    distilled. Without that, most tasks would have only the number of bits to choose. A student model that the
    starter names is ignored, because it belongs to another model.

    Args:
        task: Task.
        starter: Stages of the task's starter recipe.
        shape: Structure of the model; None if unknown.
        is_possible: Function that returns whether a kind of stage with these fields applies to the model.

    Returns:
        Stages as a recipe writes them.
    """
    fitted = [
        _with_half_the_layers(stage, shape, is_possible)
        for stage in starter
        if "model" not in ((stage.get(_DISTILL) or {}).get("student") or {})
    ]
    stages = [part for stage in fitted for part in _by_part(stage, task)]
    kinds = [next(iter(stage)) for stage in stages]
    if SINGLE_CALL in task.capabilities and any("part" in next(iter(stage.values())) for stage in stages):
        # The starter is for encoder-decoder models with two graphs, and this model answers in one call.
        stages = [{_FINETUNE: {"epochs": 2}}, *deepcopy(_FULL_SIZE)]
    elif _PRUNE in kinds or shape is None or not _fits(_PRUNE, task):
        return stages
    elif _FINETUNE not in kinds:
        if not _fits(_FINETUNE, task) or kinds[: len(_FULL_SIZE)] != [next(iter(stage)) for stage in _FULL_SIZE]:
            return stages
        stages.insert(0, {_FINETUNE: {"epochs": 2}})
    # Add the first possible `prune` stage after `finetune`, and `distill` after it if there is none.
    position = next(index for index, stage in enumerate(stages) if _FINETUNE in stage)
    prunings = () if shape is None or not _fits(_PRUNE, task) else _NARROWER if shape.attention else _FEWER_CHANNELS
    pruning = next((pruning for pruning in prunings if is_possible(_PRUNE, pruning)), None)
    if pruning is None:
        return stages
    more: list[StageFields] = [{_PRUNE: dict(pruning)}]
    if _fits(_DISTILL, task) and not any(_DISTILL in stage for stage in stages):
        settings = {name: value for name, value in stages[position][_FINETUNE].items() if name != "learning_rate"}
        more.append({_DISTILL: {"teacher": _FINETUNE, **settings}})
    return [*stages[: position + 1], *more, *stages[position + 1 :]]


def _with_half_the_layers(
    stage: StageFields, shape: Shape | None, is_possible: Callable[[str, StageFields], bool]
) -> StageFields:
    """Return a stage whose student has half of the model's layers, or all where layers cannot be removed."""
    fields = stage.get(_DISTILL) or {}
    if shape is None or "layers" not in (fields.get("student") or {}):
        return stage
    half = {**fields, "student": {"layers": spread_layers(shape.layers, max(shape.layers // 2, 1))}}
    if shape.layers > 1 and is_possible(_DISTILL, half):
        return {_DISTILL: half}
    return {_DISTILL: {name: value for name, value in fields.items() if name != "student"}}


def _by_part(stage: StageFields, task: Task) -> list[StageFields]:
    """Return a stage, with INT8 of an encoder-decoder model split by part.

    The encoder then uses INT8 and the decoder weight-only quantization.
    """
    if EXPORTED_FROM_CHECKPOINT in task.capabilities and stage == {"onnx_int8": {}}:
        return [{"onnx_int8": {"part": "encoder"}}, {"onnx_weight_only": {"part": "decoder", "bits": 8}}]
    return [deepcopy(dict(stage))]


def _fits(kind: str, task: Task) -> bool:
    return STAGES[kind].supports(task.capabilities)
