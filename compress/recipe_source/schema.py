"""The recipe as JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from compress.recipe import Recipe
from compress.stages import STAGES
from compress.targets import TARGETS

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, stages as single-key mappings or bare names."""
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
    schema["properties"]["targets"]["items"] = {"type": "string", "enum": list(TARGETS)}
    schema["properties"]["limits"]["items"] = {
        **schema["properties"]["limits"]["items"],
        "oneOf": [{"required": ["at_least"]}, {"required": ["at_most"]}],
    }
    return {"$schema": DIALECT, **schema}


def _stage(kind: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A stage's own properties, without the `kind` that its key already says."""
    cls = STAGES[kind]
    own = copy.deepcopy(cls.model_json_schema(ref_template="#/$defs/{model}"))
    definitions.update(own.pop("$defs", {}))
    definitions.pop(cls.__name__, None)
    own["properties"].pop("kind", None)
    if "kind" in own.get("required", []):
        own["required"].remove("kind")
    optional = kind in _bare_kinds()
    return {**own, "type": ["object", "null"] if optional else "object"}


def _bare_kinds() -> list[str]:
    """Stages that are valid without any field."""
    kinds = []
    for kind, cls in STAGES.items():
        try:
            cls.model_validate({"kind": kind})
        except ValidationError:
            continue
        kinds.append(kind)
    return kinds
