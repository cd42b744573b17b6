"""A first recipe for a model and data: its task, the fields that it needs, and a short text with a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import yaml

from compress.data.column_names import match_columns
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.formats.targets import find_target
from compress.models.model import TorchModel
from compress.recipe.json_schema import load_template
from compress.recipe.loading import RecipeDumper
from compress.recipe.validation import can_follow
from compress.stages.cost_model import Shape
from compress.stages.distill.settings import spread_layers
from compress.stages.registry import STAGES
from compress.tasks.capability import (
    EMBEDS,
    EXPORTED_FROM_CHECKPOINT,
    PREDICTS_TOKENS,
    SINGLE_CALL,
    TAKES_ARRAYS,
    TAKES_AUDIO,
    TAKES_IMAGES,
    TAKES_TEXT,
)
from compress.tasks.registry import TASKS
from compress.tasks.task import Task

StageFields = dict[str, Any]
"""A stage as recipes write it: one kind with its fields."""
_INPUTS = frozenset({TAKES_TEXT, TAKES_IMAGES, TAKES_AUDIO})
_WHOLE_MODEL: tuple[StageFields, ...] = ({"finetune": {"epochs": 2}}, {"onnx": {}}, {"onnx_int8": {}})
"""Stages for a model that answers in one call, where the starter is for encoder-decoder models with two graphs."""


def choose_task(model_task: str | None, names: Sequence[str]) -> str | None:
    """Return the task of a model for data with the columns ``names``, or None if the model and the data do not tell.

    A head decides. Without one, which is an encoder or a masked language model, it is the task whose columns contain
    most of the data's.

    Args:
        model_task: Task that the model's config indicates, if any.
        names: Column names of the data; empty if unknown.
    """
    own = None if model_task is None else TASKS[model_task]
    if own is not None and not _lacks_head(own):
        return model_task
    scores = {
        name: score for name, task in TASKS.items() if _is_alternative(task, own) if (score := _score(task, names))
    }
    if not scores:
        return model_task
    # Between equal scores, the model's own task comes first, then the order of the registry.
    return max(scores, key=lambda name: (scores[name], name == model_task))


def tasks_for_columns(names: Sequence[str]) -> list[str]:
    """Return the tasks whose columns data with the columns ``names`` have, those with the most columns first."""
    scores = {name: score for name, task in TASKS.items() if (score := _score(task, names))}
    return sorted(scores, key=lambda name: -scores[name])


def _lacks_head(task: Task) -> bool:
    """Return whether models of a task have no head, or only the one of their pre-training."""
    return EMBEDS in task.capabilities or {PREDICTS_TOKENS, SINGLE_CALL} <= task.capabilities


def _is_alternative(task: Task, own: Task | None) -> bool:
    """Return whether a headless model of the task ``own`` can also be used for ``task``."""
    if own is None:
        return TAKES_ARRAYS not in task.capabilities
    return SINGLE_CALL in task.capabilities and task.capabilities & _INPUTS == own.capabilities & _INPUTS


def _score(task: Task, names: Sequence[str]) -> int:
    """Return how many of the columns a task reads, 0 if it lacks one."""
    matches, missing = match_columns(task.columns, names)
    return 0 if missing else len(matches)


@dataclass(frozen=True)
class InitialModel:
    """Model of a first recipe.

    Attributes:
        reference: The model as the recipe names it.
        kind: Task of the model, in the variant for it.
        shape: Sizes of the model; None if it is not on this machine.
        is_graph: Whether it is an ONNX graph.
        is_convolutional: Whether most weights of the graph belong to convolutions.
    """

    reference: str
    kind: Task
    shape: Shape | None
    is_graph: bool
    is_convolutional: bool = False


def initial_values(
    name: str, model: InitialModel, data: Mapping[str, object], columns: Mapping[str, str], target: str
) -> dict[str, Any]:
    """Return the fields of a first recipe: the task's starter with stages for the model and the target.

    Args:
        name: Name of the recipe.
        model: The model and its task.
        data: Source and splits of the data; empty for the task's own.
        columns: Name in the files for each column of the task.
        target: Target that the result is written for.

    Raises:
        InputError: If there is no such target.
    """
    task = TASKS[model.kind.name]
    starter = deepcopy(dict(task.starter))
    stages = _stages(model, first_stages(model.kind, starter["stages"], target))
    labels = [next(iter(stage)) for stage in stages]
    renamed = {column: other for column, other in columns.items() if column != other}
    starter_data = starter.get("data") or {}
    section = {
        **data,
        **({"columns": renamed} if renamed else {}),
        **{field: starter_data[field] for field in ("max_length",) if field in starter_data},
    }
    # Limits are measured on `cpu` unless they name another target.
    measured_on = {} if target == "cpu" else {"target": target}
    values: dict[str, Any] = {
        "name": name,
        "task": task.name,
        "model": model.reference,
        "data": section if data else None,
        "stages": stages,
        "baseline": baseline if (baseline := starter.get("baseline")) in labels else None,
        "targets": [target],
        "evaluation": starter.get("evaluation"),
        "benchmark": starter.get("benchmark"),
        "limits": [{**limit, **measured_on} for limit in starter["limits"]],
    }
    return {field: value for field, value in values.items() if value is not None}


def first_stages(kind: Task, starter: Sequence[StageFields], target: str) -> Sequence[StageFields]:
    """Return the stages that a target's format begins with, or the starter's if these are not for the task.

    Raises:
        InputError: If there is no such target.
    """
    stages = [dict(stage) for stage in FORMATS[find_target(target).format].searched]
    supported = all(STAGES[next(iter(stage))].supports(kind.capabilities) for stage in stages)
    return stages if stages and supported else starter


def _stages(model: InitialModel, stages: Sequence[StageFields]) -> list[StageFields]:
    """Return the stages that can be applied to the model, in their order."""
    current: type[Any] = OnnxModel if model.is_graph else TorchModel
    possible: list[StageFields] = []
    for stage in adapt_stages(model.kind, stages, model.shape):
        cls = STAGES[next(iter(stage))]
        if cls.supports(model.kind.capabilities) and can_follow(current, cls, (model.kind,)):
            if model.is_convolutional and "onnx_int8" in stage:
                # Dynamic quantization leaves convolutions in float.
                stage["onnx_int8"] = {"method": "static", **(stage["onnx_int8"] or {})}
            possible.append(stage)
            current = cls.output_type
    return possible


def adapt_stages(
    kind: Task,
    stages: Sequence[StageFields],
    shape: Shape | None,
    is_possible: Callable[[str, StageFields], bool] = lambda kind, fields: True,
) -> list[StageFields]:
    """Return a starter's stages for another model than the starter's own.

    A student has half of the model's layers, and one that the starter names is left out.

    Args:
        kind: Task of the model, in the variant for it.
        stages: Stages as recipes write them.
        shape: Sizes of the model; None if unknown.
        is_possible: Function that returns whether a kind of stage with these fields applies to the model.
    """
    adapted: list[StageFields] = []
    for stage in stages:
        if EXPORTED_FROM_CHECKPOINT in kind.capabilities and stage == {"onnx_int8": {}}:
            # The encoder of an encoder-decoder model uses INT8 and the decoder weight-only quantization.
            adapted += [{"onnx_int8": {"part": "encoder"}}, {"onnx_weight_only": {"part": "decoder", "bits": 8}}]
        elif "model" not in ((stage.get("distill") or {}).get("student") or {}):
            adapted.append(deepcopy(_with_half_the_layers(stage, shape, is_possible)))
    if SINGLE_CALL in kind.capabilities and any("part" in next(iter(stage.values())) for stage in adapted):
        return deepcopy(list(_WHOLE_MODEL))
    return adapted


def _with_half_the_layers(
    stage: StageFields, shape: Shape | None, is_possible: Callable[[str, StageFields], bool]
) -> StageFields:
    """Return a stage whose student has half of the model's layers, or all where layers cannot be removed."""
    fields = stage.get("distill") or {}
    if shape is None or "layers" not in (fields.get("student") or {}):
        return stage
    half = {**fields, "student": {"layers": spread_layers(shape.layers, max(shape.layers // 2, 1))}}
    if shape.layers > 1 and is_possible("distill", half):
        return {"distill": half}
    return {"distill": {name: value for name, value in fields.items() if name != "student"}}


def short_recipe(values: Mapping[str, Any]) -> str:
    """Return a recipe's fields as YAML, with a line for each stage and limit and a comment for each section."""
    return load_template("short.yaml", flow=_flow, stage=_stage_line).render(values=values)


def _stage_line(stage: StageFields) -> str:
    ((kind, fields),) = stage.items()
    return f"{kind}: {_flow(fields)}" if fields else kind


def _flow(value: object) -> str:
    """Return a value as YAML on one line."""
    text: str = yaml.dump(
        value, Dumper=RecipeDumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
    )
    return text.removesuffix("...\n").strip()
