"""Loading of recipe files with all problems at once, and writing of recipes as YAML.

All problems of a file are collected, because a user wants to see them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, create_model
from pydantic_core import to_jsonable_python

from compress.data.config import FILE_SUFFIXES
from compress.formats.onnx.model import OnnxModel
from compress.models.model import TorchModel
from compress.plugins import explain_missing
from compress.recipe.document import (
    CORE_SCHEMA,
    YAML_PREFIX,
    Document,
    core_pattern,
    describe,
    read_document,
)
from compress.recipe.json_schema import recipe_schema
from compress.recipe.old_names import OLD_NAMES
from compress.recipe.overrides import apply_override, drop_stages, normalize_stages
from compress.recipe.recipe import Recipe
from compress.recipe.target_entries import ChosenTarget, read_targets
from compress.recipe.validation import ParsedStage, check_consistency
from compress.recipe.validation_errors import expected_names, validate, validate_partly
from compress.stages.base import AnyStage
from compress.stages.registry import STAGES
from compress.tasks.capability import TAKES_ARRAYS, TAKES_AUDIO, TAKES_IMAGES, TAKES_TEXT
from compress.tasks.registry import TASK_NAMES, TASKS, infer_task, tasks_with
from compress.tasks.task import Task
from compress.utils.errors import CompressError, InputError, RecipeError, SampleError, nearest_name

__all__ = ["dump_recipe", "located", "parse_recipe", "read_recipe", "recipe_schema"]

_INPUTS = frozenset({TAKES_TEXT, TAKES_IMAGES, TAKES_AUDIO})
_Header = create_model("_Header", __base__=Recipe, stages=(Any, ()), targets=(Any, ()))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; each of ``overrides`` (`distill.epochs=2`) replaces one field.

    A missing task is inferred from the model's config. Raises `RecipeError` with every problem of the file: syntax,
    fields, and inconsistencies between fields.
    """
    return parse_recipe(read_document(path), path.parent, overrides)


def parse_recipe(
    document: Document, folder: Path, overrides: Sequence[str] = (), without: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a document, which is changed.

    Args:
        document: Values of the YAML file, with lines.
        folder: The folder that relative paths start from.
        overrides: Replacements of fields, `FIELD=VALUE`.
        without: Labels of stages that are left out.

    Raises:
        RecipeError: With every problem.
    """
    from compress.sources.resolve import local_task_variants

    normalize_stages(document)
    for option in overrides:
        apply_override(document, option)
    if without:
        drop_stages(document, without)
    task_was_inferred = "task" not in document.values and infer_task_of_document(document, folder)
    task, reference = document.values.get("task"), document.values.get("model")
    kinds: tuple[Task, ...] = ()
    if isinstance(task, str) and task in TASKS:
        # Some tasks have data that a recipe need not name.
        if "data" not in document.values and TASKS[task].data:
            document.values["data"] = deepcopy(dict(TASKS[task].data))
        is_name = isinstance(reference, str)
        kinds = local_task_variants(TASKS[task], reference, folder) if is_name else TASKS[task].variants()
    elif isinstance(task, str):
        plugin = explain_missing("tasks", task)
        near = None if plugin else nearest_name(task, TASK_NAMES)
        document.problem(("task",), describe(task), plugin or f"one of {', '.join(TASK_NAMES)}", near)
    # Stages and targets are validated one by one below, so that each problem gets the line of its field.
    header_values = {name: value for name, value in document.values.items() if name not in ("stages", "targets")}
    header = validate(_Header, header_values, document, ())
    parts = _stage_parts(document)
    if task_was_inferred and kinds and not _fits(kinds, parts, document):
        own, inputs = kinds[0].name, kinds[0].capabilities & _INPUTS
        others = [
            name
            for name, other in TASKS.items()
            if name != own and other.capabilities & _INPUTS == inputs and _fits((other,), parts, document)
        ]
        expected = f"one of {', '.join(others)}" if others else f"stages and data for {own}"
        document.problem(("task",), f"nothing, and the stages or data are not for {own}, the model's task", expected)
        kinds = ()
    targets: tuple[str | ChosenTarget, ...] = Recipe.model_fields["targets"].default
    if "targets" in document.values:
        targets = read_targets(document, folder, [part.kind if part else "" for part in parts])
    check_consistency(document, parts, targets, kinds, _starting_type(document, reference, folder))
    if document.problems:
        raise _error_with_valid_part(
            document, header_values, [part.stage for part in parts if part and part.stage and part.whole]
        )
    assert header is not None
    header_fields = {name: getattr(header, name) for name in header.model_fields_set}
    stage_fields = {"stages": tuple(part.stage for part in parts if part)}
    # Every part is validated already, so the recipe is put together without another validation.
    recipe = Recipe.model_construct(
        **{**header_fields, **stage_fields, **({"targets": targets} if "targets" in document.values else {})}
    )
    if task_was_inferred:
        recipe.model_fields_set.discard("task")
    return recipe


def _fits(kinds: Sequence[Task], parts: Sequence[ParsedStage | None], document: Document) -> bool:
    """Return whether variants of a task support all stages, and read the columns that the recipe names."""
    data = document.values.get("data")
    columns = data.get("columns") if isinstance(data, dict) else None
    classes = [part.cls for part in parts if part and part.cls]
    return all(any(cls.supports(kind.capabilities) for kind in kinds) for cls in classes) and (
        not isinstance(columns, dict) or columns.keys() <= {column.name for column in kinds[0].columns}
    )


def _starting_type(document: Document, reference: object, folder: Path) -> type[Any]:
    """Return the class of the starting model; record a problem of a folder with several graphs."""
    from compress.sources.resolve import is_graph

    try:
        return OnnxModel if isinstance(reference, str) and is_graph(reference, folder) else TorchModel
    except InputError as error:
        if not isinstance(error, SampleError):  # `check_consistency` records an unknown sample
            document.problem(("model",), describe(reference), f"{error.expected}: {error.what}")
        return TorchModel


def _error_with_valid_part(document: Document, values: dict[str, Any], stages: Sequence[AnyStage]) -> RecipeError:
    """Return the document's problems, with a recipe of its model, task, data and stages if these are valid.

    Their files can then be checked in spite of the problems.

    Args:
        document: The recipe's file.
        values: Its fields other than stages and targets.
        stages: Its valid stages.
    """
    error = document.error()
    broken = {path[0] for path in document.broken if path}
    header = validate_partly(_Header, {name: value for name, value in values.items() if name not in broken - {"model"}})
    if header is not None and {"task", "data", "model"} <= header.model_fields_set:
        error.valid_part = Recipe.model_construct(
            **dict(header) | {"stages": () if "stages" in broken else tuple(stages), "targets": ()}
        )
        error.model_is_valid = "model" not in broken
    return error


@contextmanager
def located(document: Document) -> Iterator[None]:
    """Add file and line in the recipe to a later error's problems that name one of its fields."""
    try:
        yield
    except CompressError as error:
        for problem in error.errors or (error,):
            field = (problem.where or "").partition(", ")[0]
            path = tuple(int(key) if key.isdecimal() else key for key in field.split("."))
            # A data file may be called like a section, such as data.csv.
            is_field = path[0] in Recipe.model_fields and Path(field).suffix not in FILE_SUFFIXES
            if is_field or path in document.lines:
                problem.position = (*document.location(path), field)
        raise


def dump_recipe(recipe: Recipe, defaults: bool = True) -> str:
    """Return the recipe as YAML, with or without fields at their ``defaults``. Reading it gives an equal recipe."""
    values = _plain(recipe, defaults)
    values["stages"] = [
        {stage.kind: {name: value for name, value in _plain(stage, defaults).items() if name != "kind"}}
        for stage in recipe.stages
    ]
    values["targets"] = [entry if isinstance(entry, str) else entry.as_entry() for entry in recipe.targets]
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


class RecipeDumper(yaml.SafeDumper):
    """YAML dumper that quotes text which YAML 1.1 or 1.2 would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Use double quotes for text with line breaks, since PyYAML would fold the rare ones (NEL, LS, PS)."""
        style = '"' if len(data.splitlines()) > 1 or data != data.strip() else None
        return self.represent_scalar(YAML_PREFIX + "str", data, style)


RecipeDumper.add_representer(str, RecipeDumper.represent_str)
for _tag, _pattern, _first in CORE_SCHEMA:
    RecipeDumper.add_implicit_resolver(YAML_PREFIX + _tag, core_pattern(_pattern), _first)


def _plain(value: object, defaults: bool = True) -> Any:
    """Return models as mappings of their fields, without those that are None, or without all at their defaults."""
    if isinstance(value, BaseModel):
        return {
            field.alias or name: _plain(item, defaults)
            for name, field in type(value).model_fields.items()
            if (item := getattr(value, name)) is not None
            and (defaults or item != field.get_default(call_default_factory=True))
        }
    if isinstance(value, tuple):
        return [_plain(item, defaults) for item in value]
    return to_jsonable_python(value)


def _stage_parts(document: Document) -> list[ParsedStage | None]:
    """Parse the list of stages; a stage that cannot be parsed is None."""
    stages = document.values.get("stages")
    if not isinstance(stages, list) or not stages:
        description = describe(stages) if "stages" in document.values else "nothing"
        document.problem(("stages",), description, "a list of at least one stage, e.g. `- onnx`")
        return []
    parts: list[ParsedStage | None] = []
    for index, item in enumerate(stages):
        if not isinstance(item, dict) or len(item) != 1:
            expected = "one stage as a single name with its fields, e.g. `distill: {...}`"
            document.problem(("stages", index), describe(item), expected)
            parts.append(None)
            continue
        ((kind, fields),) = item.items()
        path, cls, valid_stage, stage = ("stages", index, kind), STAGES.get(kind), None, None
        if cls is None:
            replacement = explain_missing("stages", kind) or OLD_NAMES.get(kind)
            suggestion = None if replacement else nearest_name(kind, list(STAGES))
            expected = replacement or expected_names(suggestion, STAGES, "stage")
            document.problem(path, f"an unknown stage {kind!r}", expected, suggestion)
        elif not isinstance(fields, dict):
            document.problem(path, describe(fields), f"the fields of {kind} as a mapping")
        else:
            valid_stage = validate(cls, {**fields, "kind": kind}, document, path)
            stage = valid_stage or validate_partly(cls, {**fields, "kind": kind})
        valid_fields = fields if cls is not None and isinstance(fields, dict) else {}
        parts.append(ParsedStage(index, kind, path, cls, valid_fields, stage, whole=valid_stage is not None))
    return parts


def infer_task_of_document(document: Document, recipe_folder: Path) -> bool:
    """Fill in a missing task from the model, or record a problem; return True if it was inferred.

    Nothing is downloaded, and no code of the model runs.
    """
    reference = document.values.get("model")
    if not isinstance(reference, str):
        return False
    task, reason = infer_task_of_reference(reference, recipe_folder)
    if task is None:
        document.problem(("task",), "nothing", f"one of {', '.join(TASK_NAMES)}, since {reason}")
        return False
    document.values["task"] = task
    return True


def infer_task_of_reference(reference: str, recipe_folder: Path) -> tuple[str | None, str]:
    """Return the task of a model, or None and the reason. A graph without a processor beside it takes arrays."""
    from compress.models.pipeline_folder import model_config
    from compress.models.processor import has_preprocessor
    from compress.sources.onnx_file import companions_of, has_companions, onnx_file
    from compress.sources.resolve import find_resolved, local_model_path

    try:
        path = local_model_path(reference, recipe_folder)
        graph = None if path is None else onnx_file(path)
        if (path is None and reference.lower().endswith(".onnx")) or (graph and not has_companions(graph)):
            return tasks_with(frozenset({TAKES_ARRAYS}))[0], ""
        folder = companions_of(graph)[0].parent if graph else find_resolved(str(path or reference))
        if folder is None:
            return None, f"the model {reference!r} is not available yet to infer it"
        config = model_config(folder)
    except InputError as error:
        return None, f"it cannot be inferred from the model: {error.what}"
    except OSError as error:
        return None, f"the model cannot be read: {error.strerror or error}"
    task = infer_task(config, has_preprocessor(folder))
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return task, "the model's config.json names no architectures to infer it from"
    return task, f"the model's architecture {architectures[0]!r} has no known task"
