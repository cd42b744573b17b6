"""Base classes of pydantic models that are read from or written to files."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable model that forbids unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FrozenAliased(Frozen):
    """Immutable model whose aliased fields are read by either name and written by their alias."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


def changed_fields(model: BaseModel, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the fields ``names`` whose values differ from their defaults."""
    return tuple(name for name in names if getattr(model, name) != type(model).model_fields[name].default)
