"""One thing of a recipe that may vary, and the field of a stage that it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT, LEFT_OUT = "kept", "left out"


@dataclass(frozen=True)
class SearchParameter:
    """One thing that may vary: a field with its values, the recipe's own first, or whether a stage is left out."""

    name: str
    values: tuple[Any, ...]
    stage_index: int
    is_optional_stage: bool = False
    is_after_training: bool = False
    """Whether nothing is trained behind it: it changes a model that other recipes have made already."""

    @property
    def is_ordered(self) -> bool:
        """Whether the values are numbers, which lie in an order of their own."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    def ranks(self) -> tuple[float, ...]:
        """Each value's place between 0 and 1: numbers by size, lists by length, others as they are listed."""
        sizes = [len(value) if isinstance(value, list | tuple) else value for value in self.values]
        ordered = all(isinstance(size, int | float) and not isinstance(size, bool) for size in sizes)
        keys = sizes if ordered else list(range(len(sizes)))
        steps = sorted(set(keys))
        return tuple(steps.index(key) / max(len(steps) - 1, 1) for key in keys)


def short_name(name: str) -> str:
    """`stages.1.prune.heads` -> `prune.heads`."""
    return ".".join(name.split(".")[2:])


def value_text(value: Any) -> str:
    """A value as people read it."""
    return value if isinstance(value, str) else json.dumps(value)


def field_path(name: str, kind: str) -> list[str]:
    """The path of a field within its stage, without the stage's kind where the name has it."""
    tokens = name.split(".")
    return tokens[3:] if tokens[2] == kind and len(tokens) > 3 else tokens[2:]


def get_value(fields: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path of a stage's fields, or None."""
    found: Any = fields
    for token in path:
        found = found.get(token) if isinstance(found, Mapping) else None
    return found


def set_value(fields: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put a value at a path of a stage's fields, in place."""
    *above, last = path
    for token in above:
        inner = fields.get(token)
        fields[token] = inner if isinstance(inner, dict) else {}
        fields = fields[token]
    fields[last] = value
