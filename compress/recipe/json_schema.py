"""JSON Schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined, to_jsonable_python

from compress.data.config import DataConfig
from compress.formats.registry import FORMATS
from compress.formats.target_profile import TargetProfile
from compress.formats.targets import PROFILES
from compress.recipe.recipe import Benchmark, Limit, Recipe
from compress.recipe.target_entries import CUSTOM_TARGET_FIELDS, TARGET_FIELDS, TargetFields
from compress.stages.registry import STAGES
from compress.stages.training.settings import Training
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe file, with stages as single-key mappings or bare names."""
    schema = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.setdefault("$defs", {})
    stages = schema["properties"]["stages"]
    stages["items"] = {
        "anyOf": [
            {
                "type": "object",
                "description": "one stage: its name and its fields",
                "properties": {kind: _stage(kind, definitions) for kind in STAGES},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
            {"type": "string", "enum": _bare_kinds(), "description": "a stage with all its defaults"},
        ]
    }
    schema["required"].remove("task")
    # The schema of a target entry: a name, a name with fields, or a file.
    definitions.pop("ChosenTarget", None)
    definitions["TargetFields"] = TargetFields.model_json_schema()
    schema["properties"]["targets"]["items"] = {
        "anyOf": [
            {"type": "string", "enum": list(PROFILES), "description": "a target as `compress targets` lists it"},
            {"type": "string", "pattern": r"\.ya?ml$", "description": "a file that describes a target of your own"},
            {
                "type": "object",
                "description": "a target with fields of its own and of the stage that writes its format",
                "properties": {profile.name: _target(profile) for profile in PROFILES.values()},
                "additionalProperties": {
                    "type": "object",
                    "description": "a target of your own",
                    "properties": {name: _field(f"$defs/TargetFields/properties/{name}") for name in TARGET_FIELDS},
                    "required": ["runtime"],
                },
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    schema["properties"]["limits"]["items"] = {
        **schema["properties"]["limits"]["items"],
        "oneOf": [{"required": ["at_least"]}, {"required": ["at_most"]}],
    }
    return {"$schema": DIALECT, **schema}


def _target(profile: TargetProfile) -> dict[str, Any]:
    """Return the schema of a known target's fields."""
    target_fields = {
        name: _field(f"$defs/TargetFields/properties/{name}")
        for name in TARGET_FIELDS
        if name not in CUSTOM_TARGET_FIELDS
    }
    stages = [kind for form in profile.allowed if (kind := FORMATS[form].written_by) is not None]
    options = {
        name: _field(f"properties/stages/items/anyOf/0/properties/{kind}/properties/{name}")
        for kind in reversed(stages)
        for name in STAGES[kind].model_fields
        if name != "kind"
    }
    fields = {**options, **target_fields, "format": {"enum": list(profile.allowed)}}
    return {"type": ["object", "null"], "properties": fields, "additionalProperties": False}


def _field(path: str) -> dict[str, str]:
    """Return a reference to another part of the schema."""
    return {"$ref": f"#/{path}"}


def _stage(kind: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a stage's fields, without `kind`, which is the key."""
    cls = STAGES[kind]
    schema = copy.deepcopy(cls.model_json_schema(ref_template="#/$defs/{model}"))
    definitions.update(schema.pop("$defs", {}))
    definitions.pop(cls.__name__, None)
    schema["properties"].pop("kind", None)
    if "kind" in schema.get("required", []):
        schema["required"].remove("kind")
    optional = kind in _bare_kinds()
    return {**schema, "type": ["object", "null"] if optional else "object"}


def _bare_kinds() -> list[str]:
    """Return the stages that are valid without any field."""
    kinds = []
    for kind, cls in STAGES.items():
        try:
            cls.model_validate({"kind": kind})
        except ValidationError:
            continue
        kinds.append(kind)
    return kinds


_WIDTH = 100
_NESTED: dict[str, type[BaseModel]] = {"data": DataConfig, "benchmark": Benchmark, "evaluation": Evaluation}


def starters() -> list[str]:
    """Return the tasks that have a starter recipe."""
    return [name for name, task in TASKS.items() if task.starter]


def starter(task: str) -> str:
    """Return the starter recipe of a task as YAML. Raises `KeyError` for an unknown task."""
    return full_recipe({**TASKS[task].starter, "task": task})


def full_recipe(values: Mapping[str, Any]) -> str:
    """Return a recipe's fields as YAML with every other field commented out, all of them explained."""
    stages: list[tuple[str, dict[str, Any], list[str]]] = []
    explained: set[str] = set()
    for stage in values["stages"]:
        ((kind, chosen),) = stage.items()
        # The training loop's fields, which several stages share, are explained once.
        shared = set(Training.model_fields) if issubclass(STAGES[kind], Training) else set[str]()
        stages.append((kind, chosen, sorted((shared & explained) - chosen.keys())))
        explained |= shared
    context = {"known": STAGES, "nested": _NESTED, "limits": Limit, "fields": _fields, "line": _line}
    page = load_template("starter.yaml", comment=_comment)
    return page.render(task=values["task"], recipe=Recipe, values=values, stages=stages, **context)


def load_template(name: str, **filters: Callable[[Any], str]) -> Template:
    """Return a template of recipes, in which these filters exist."""
    templates = Environment(
        loader=PackageLoader("compress", "recipe/templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= filters
    return templates.get_template(name)


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
