"""JSON Schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from compress.formats.registry import FORMATS
from compress.formats.target_profile import TargetProfile
from compress.formats.targets import PROFILES
from compress.recipe.recipe import Recipe
from compress.recipe.target_entries import CUSTOM_TARGET_FIELDS, TARGET_FIELDS, TargetFields
from compress.stages.registry import STAGES

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
