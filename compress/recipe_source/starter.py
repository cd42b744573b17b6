"""A commented recipe to start from: every field with its description, valid as it stands."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from compress.data.config import DataConfig
from compress.recipe.recipe import Benchmark, Limit, Recipe
from compress.stages import STAGES
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.training.config import Training

_WIDTH = 100
_HEADER = """\
A recipe for {task}. Change `model` and `data` to your own, then:

  compress check THIS-FILE    proves that it can run and predicts time, memory and disk
  compress run THIS-FILE      runs it

Fields that are commented out have the value shown. For completion in an editor, write the schema with
`compress recipes schema > recipe.schema.json` and point the editor to it."""

_NESTED: dict[str, type[BaseModel]] = {"data": DataConfig, "benchmark": Benchmark, "evaluation": Evaluation}


def starters() -> list[str]:
    """The tasks that have a starter."""
    return [name for name, task in TASKS.items() if task.starter]


def starter(task: str) -> str:
    """The starter of a task. Raises `KeyError` for a task that is unknown."""
    values = {**TASKS[task].starter, "task": task}
    lines = [f"# {line}".rstrip() for line in _HEADER.format(task=task).splitlines()]
    for name, field in Recipe.model_fields.items():
        lines += ["", *_comment(field.description)]
        if name == "stages":
            lines += ["stages:", *_stages(values["stages"])]
        elif name == "limits" and name in values:
            lines += ["limits:", *_limits(values["limits"])]
        elif name in _NESTED and name in values:
            lines += _nested(name, _NESTED[name], values[name])
        else:
            lines.append(_line(name, field, values))
    return "\n".join(lines) + "\n"


def _nested(name: str, model: type[BaseModel], chosen: dict[str, Any]) -> list[str]:
    """A mapping with every field of ``model``; a comment altogether if none is chosen."""
    body = _fields(model, chosen)
    return [f"{name}:" if chosen else f"# {name}:", *textwrap.indent("\n".join(body), "  ").splitlines()]


def _stages(stages: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Every stage with all its fields; the training loop's, which several share, are explained once."""
    lines: list[str] = []
    explained: set[str] = set()
    for stage in stages:
        ((kind, chosen),) = stage.items()
        cls = STAGES[kind]
        shared: set[str] = set(Training.model_fields) if issubclass(cls, Training) else set()
        body = _fields(cls, chosen, {"kind", *((shared & explained) - chosen.keys())})
        if shared & explained:
            body.append("# and the training fields that are explained under finetune")
        explained |= shared
        doc = (cls.__doc__ or kind).strip().splitlines()[0]
        head = f"- {kind}:" if chosen else f"- {kind}: # with its defaults"
        block = [*_comment(doc), head, *textwrap.indent("\n".join(body), "    ").splitlines()]
        lines += [f"  {line}" for line in block]
    return lines


def _limits(limits: list[dict[str, Any]]) -> list[str]:
    lines = []
    for limit in limits:
        body = textwrap.indent("\n".join(_fields(Limit, limit)), "    ").splitlines()
        lines += ["  -", *body]
    return lines


def _fields(model: type[BaseModel], chosen: dict[str, Any], skip: set[str] | None = None) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if name not in (skip or set()):
            lines += [*_comment(field.description), _line(name, field, chosen)]
    return lines


def _line(name: str, field: Any, chosen: dict[str, Any]) -> str:
    """`name: value`, commented out where the value is the default."""
    if name in chosen:
        return f"{name}: {_inline(chosen[name])}"
    default = None if field.default is PydanticUndefined else field.default
    return f"# {name}: {_inline(to_jsonable_python(default))}"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", _WIDTH, initial_indent="# ", subsequent_indent="# ")
