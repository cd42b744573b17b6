"""A commented recipe to start from: every field with its description, valid as it stands."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from compress.data.config import DataConfig
from compress.recipe.recipe import Benchmark, Limit, Recipe
from compress.stages.registry import STAGES
from compress.stages.training.settings import Training
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS

_WIDTH = 100
_NESTED: dict[str, type[BaseModel]] = {"data": DataConfig, "benchmark": Benchmark, "evaluation": Evaluation}


def starters() -> list[str]:
    """Return the tasks that have a starter recipe."""
    return [name for name, task in TASKS.items() if task.starter]


def starter(task: str) -> str:
    """Return the starter recipe of a task as YAML. Raises `KeyError` for an unknown task."""
    values = {**TASKS[task].starter, "task": task}
    stages: list[tuple[str, dict[str, Any], list[str]]] = []
    explained: set[str] = set()
    for stage in values["stages"]:
        ((kind, chosen),) = stage.items()
        # The training loop's fields, which several stages share, are explained once.
        shared = set(Training.model_fields) if issubclass(STAGES[kind], Training) else set[str]()
        stages.append((kind, chosen, sorted((shared & explained) - chosen.keys())))
        explained |= shared
    templates = Environment(
        loader=PackageLoader("compress", "recipe/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["comment"] = _comment
    page = templates.get_template("starter.yaml")
    context = {"known": STAGES, "nested": _NESTED, "limits": Limit, "fields": _fields, "line": _line}
    return page.render(task=task, recipe=Recipe, values=values, stages=stages, **context)


def _fields(model: type[BaseModel], chosen: dict[str, Any], skip: Collection[str] = ()) -> str:
    """Return every field with its description as YAML lines."""
    parts = ((name, field) for name, field in model.model_fields.items() if name not in skip)
    lines = (f"{_comment(field.description)}\n{_line(name, field, chosen)}" for name, field in parts)
    return "\n".join(line.strip() for line in lines)


def _line(name: str, field: Any, chosen: dict[str, Any]) -> str:
    """Return `name: value`, commented out if the value is the default."""
    default = None if field.default is PydanticUndefined else to_jsonable_python(field.default)
    text = yaml.safe_dump(chosen.get(name, default), default_flow_style=True, sort_keys=False, width=10_000)
    value = text.removesuffix("...\n").strip()
    return f"{name}: {value}" if name in chosen else f"# {name}: {value}"


def _comment(text: str | None) -> str:
    """Return text as comment lines."""
    return "\n".join(textwrap.wrap(text or "", _WIDTH, initial_indent="# ", subsequent_indent="# "))
