"""Recipes as files: reading with all problems at once, writing, and the JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, create_model
from pydantic_core import to_jsonable_python

from compress.formats.onnx.model import OnnxModel
from compress.models.torch_model import TorchModel
from compress.plugins import explain_missing
from compress.recipe.chosen_target import ChosenTarget
from compress.recipe.document import (
    CORE_SCHEMA,
    YAML_PREFIX,
    Document,
    core_pattern,
    describe,
    read_document,
)
from compress.recipe.json_schema import recipe_schema
from compress.recipe.overrides import apply_override, drop_stages, single_keys
from compress.recipe.recipe import Recipe
from compress.recipe.removed import REMOVED
from compress.recipe.target_entries import read_targets
from compress.recipe.validation import Part, check_parts
from compress.recipe.validation_errors import salvage, validate
from compress.stages.registry import STAGES
from compress.tasks.capability import TAKES_ARRAYS
from compress.tasks.registry import TASK_NAMES, TASKS, tasks_with, told_task
from compress.tasks.task import Task
from compress.utils.errors import InputError, nearest_name

__all__ = ["dump_recipe", "read_recipe", "recipe_of", "recipe_schema"]

_Header = create_model("_Header", __base__=Recipe, stages=(Any, ()), targets=(Any, ()))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, each of ``overrides`` (`stages.1.distill.epochs=2`) replacing one field.

    A task that is left out is the one that the model's config tells. Raises `RecipeError` with every problem of the
    file: syntax, fields, and what must hold between them.
    """
    return recipe_of(read_document(path), path.parent, overrides)


def recipe_of(document: Document, folder: Path, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> Recipe:
    """The recipe of a document that lies in ``folder``; afterwards the stages labelled ``without`` are left out.

    The document is changed. Raises as `read_recipe`.
    """
    single_keys(document)
    for option in overrides:
        apply_override(document, option)
    drop_stages(document, without)
    told = tell_task(document, folder)
    tell_data(document)
    _check_known_names(document)
    header = validate(_Header, {**document.values, "stages": [], "targets": []}, document, ())
    parts = _stage_parts(document)
    targets: tuple[str | ChosenTarget, ...] = Recipe.model_fields["targets"].default
    if "targets" in document.values:
        targets = read_targets(document, folder, [part.kind if part else "" for part in parts])
    kinds = _kinds(document, folder)
    check_parts(document, parts, targets, kinds, _starts_as(document, folder))
    if document.problems:
        raise document.refusal()
    assert header is not None
    given = {name: getattr(header, name) for name in header.model_fields_set - {"stages", "targets"}}
    read = {"stages": tuple(part.stage for part in parts if part)}
    recipe = Recipe(**{**given, **read, **({"targets": targets} if "targets" in document.values else {})})
    if told:
        recipe.model_fields_set.discard("task")
    return recipe


def dump_recipe(recipe: Recipe, defaults: bool = True) -> str:
    """The recipe as YAML, with ``defaults`` written out or not; reading it gives an equal recipe."""
    values = _plain(recipe, defaults)
    stages = [{stage.kind: _plain(stage, defaults)} for stage in recipe.stages]
    for (fields,) in (each.values() for each in stages):
        fields.pop("kind", None)
    values["stages"] = stages
    values["targets"] = [entry if isinstance(entry, str) else entry.as_entry() for entry in recipe.targets]
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Double-quoted where there is a line break: PyYAML folds the rarer ones (NEL, LS, PS) otherwise."""
        style = '"' if len(data.splitlines()) > 1 or data != data.strip() else None
        return self.represent_scalar(YAML_PREFIX + "str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _first in CORE_SCHEMA:
    _Dumper.add_implicit_resolver(YAML_PREFIX + _tag, core_pattern(_pattern), _first)


def _plain(value: Any, defaults: bool = True) -> Any:
    """Models as mappings of their fields, without those left at `None`, or without all ``defaults``."""
    if isinstance(value, BaseModel):
        fields = {(field.alias or name): getattr(value, name) for name, field in type(value).model_fields.items()}
        usual = {(field.alias or name): field.get_default(call_default_factory=True)
                 for name, field in type(value).model_fields.items()}  # fmt: skip
        told = {name: held for name, held in fields.items() if held is not None and (defaults or held != usual[name])}
        return {name: _plain(held, defaults) for name, held in told.items()}
    if isinstance(value, tuple):
        return [_plain(item, defaults) for item in value]
    return to_jsonable_python(value)


def _check_known_names(document: Document) -> None:
    """Note an unknown task here, where its nearest name is known."""
    task = document.values.get("task")
    if isinstance(task, str) and task not in TASK_NAMES:
        plugin = explain_missing("tasks", task)
        near = None if plugin else nearest_name(task, TASK_NAMES)
        document.problem(("task",), describe(task), plugin or f"one of {', '.join(TASK_NAMES)}", near)


def _kinds(document: Document, recipe_folder: Path) -> tuple[Task, ...]:
    """What the recipe's task can be, as far as its model tells; none for an unknown task."""
    task, reference = document.values.get("task"), document.values.get("model")
    if not isinstance(task, str) or task not in TASKS:
        return ()
    kinds = TASKS[task].kinds()
    if len(kinds) == 1 or not isinstance(reference, str):
        return kinds
    from compress.sources.resolve import kinds_here

    return kinds_here(TASKS[task], reference, recipe_folder)


def _stage_parts(document: Document) -> list[Part | None]:
    stages = document.values.get("stages")
    if not isinstance(stages, list) or not stages:
        found = describe(stages) if "stages" in document.values else "nothing"
        document.problem(("stages",), found, "a list of at least one stage, e.g. `- export`")
        return []
    return [_stage_part(document, index, item) for index, item in enumerate(stages)]


def _stage_part(document: Document, index: int, item: Any) -> Part | None:
    path = ("stages", index)
    if not isinstance(item, dict) or len(item) != 1:
        document.problem(path, describe(item), "one stage as a single name with its fields, e.g. `distill: {...}`")
        return None
    ((kind, fields),) = item.items()
    below = (*path, kind)
    if kind not in STAGES:
        replacement = explain_missing("stages", kind) or REMOVED.get(kind)
        expected = replacement or f"a stage: one of {', '.join(STAGES)}"
        near = None if replacement else nearest_name(kind, list(STAGES))
        document.problem(below, f"an unknown stage {kind!r}", expected, near)
        return Part(index, kind, below, {}, None, whole=False)
    if not isinstance(fields, dict):
        document.problem(below, describe(fields), f"the fields of {kind} as a mapping")
        return Part(index, kind, below, {}, None, whole=False)
    whole = validate(STAGES[kind], {**fields, "kind": kind}, document, below)
    part = whole or salvage(STAGES[kind], {**fields, "kind": kind})
    return Part(index, kind, below, fields, part, whole=whole is not None)


def tell_task(document: Document, recipe_folder: Path) -> bool:
    """Fill in a task that is left out, if the model tells one; whether it did. Notes a problem where it does not.

    Nothing is fetched for it, and no code of the model runs.
    """
    reference = document.values.get("model")
    if "task" in document.values or not isinstance(reference, str):
        return False
    told, reason = _told(reference, recipe_folder)
    if told is None:
        document.problem(("task",), "nothing", f"one of {', '.join(TASK_NAMES)}, since {reason}")
        return False
    document.values["task"] = told
    return True


def tell_data(document: Document) -> None:
    """Fill in data that is left out, where the task says what to take then."""
    task = document.values.get("task")
    if "data" not in document.values and isinstance(task, str) and task in TASKS and TASKS[task].data:
        document.values["data"] = deepcopy(dict(TASKS[task].data))


def _starts_as(document: Document, recipe_folder: Path) -> type[Any]:
    """What the starting model is: a graph, or a torch model. Notes a folder that doesn't say which of its graphs."""
    from compress.sources.resolve import is_graph

    reference = document.values.get("model")
    try:
        graph = isinstance(reference, str) and is_graph(reference, recipe_folder)
    except InputError as error:
        document.problem(("model",), describe(reference), f"{error.expected}: {error.what}")
        return TorchModel
    return OnnxModel if graph else TorchModel


def _told(reference: str, recipe_folder: Path) -> tuple[str | None, str]:
    """The task, or else why there is none. A graph that no processor lies beside is for one that takes arrays."""
    from compress.models.diffusion_checks import model_config
    from compress.models.processor import has_preprocessor
    from compress.sources.onnx_file import companions_of, has_companions, onnx_file
    from compress.sources.resolve import already_here, graph_place

    try:
        place = graph_place(reference, recipe_folder)
        graph = None if place is None else onnx_file(place)
        if (place is None and reference.lower().endswith(".onnx")) or (graph and not has_companions(graph)):
            return tasks_with(frozenset({TAKES_ARRAYS}))[0], ""
        folder = companions_of(graph)[0].parent if graph else already_here(str(place or reference))
        if folder is None:
            return None, f"the model {reference!r} is not here yet to tell it"
        config = model_config(folder)
    except InputError as error:
        return None, f"the model cannot tell it: {error.what}"
    except OSError as error:
        return None, f"the model cannot be read: {error.strerror or error}"
    told = told_task(config, has_preprocessor(folder))
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return told, "the model's config.json names no architectures that tell it"
    return told, f"the model's architecture {architectures[0]!r} tells none"
