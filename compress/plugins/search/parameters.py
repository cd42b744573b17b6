"""A search parameter: a field of a stage with its values, or an optional stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT, LEFT_OUT = "kept", "left out"


@dataclass(frozen=True)
class SearchParameter:
    """Field with its values, the recipe's own first; or a stage that may be left out.

    Attributes:
        name: Field as `--set` names it, or label of the stage.
        values: Values of the field; for an optional stage, kept and left out.
        stage_index: Index of the stage in the recipe.
        is_optional_stage: Whether the parameter leaves out a stage.
        is_after_training: Whether no later stage trains, so that the model before it is shared with other recipes.
    """

    name: str
    values: tuple[Any, ...]
    stage_index: int
    is_optional_stage: bool = False
    is_after_training: bool = False

    @property
    def is_ordered(self) -> bool:
        """Return whether all values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def ranks(self) -> tuple[float, ...]:
        """Return the rank of each value between 0 and 1: numbers by size, lists by length, others by position."""
        sizes = [len(value) if isinstance(value, list | tuple) else value for value in self.values]
        ordered = all(isinstance(size, int | float) and not isinstance(size, bool) for size in sizes)
        keys = sizes if ordered else list(range(len(sizes)))
        steps = sorted(set(keys))
        return tuple(steps.index(key) / max(len(steps) - 1, 1) for key in keys)


def short_name(name: str) -> str:
    """Return the name without the position of the stage: `stages.1.prune.heads` -> `prune.heads`."""
    return ".".join(name.split(".")[2:])


def value_text(value: Any) -> str:
    """Format a value for people."""
    return value if isinstance(value, str) else json.dumps(value)


def field_path(name: str, kind: str) -> list[str]:
    """Return the path of a field within its stage, without the stage's kind."""
    tokens = name.split(".")
    return tokens[3:] if tokens[2] == kind and len(tokens) > 3 else tokens[2:]


def get_value(fields: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return the value at a path of a stage's fields, or None."""
    value: Any = fields
    for token in path:
        value = value.get(token) if isinstance(value, Mapping) else None
    return value


def set_value(fields: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the value at a path of a stage's fields, in place."""
    *above, last = path
    for token in above:
        inner = fields.get(token)
        fields[token] = inner if isinstance(inner, dict) else {}
        fields = fields[token]
    fields[last] = value
