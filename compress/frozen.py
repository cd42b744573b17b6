"""What data classes that are read from or written to files inherit."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Frozen, with unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FrozenAliased(Frozen):
    """The same; a field with an alias is read by either name and written by its alias."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


def changed(held: BaseModel, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the fields ``names`` that don't have their defaults."""
    return tuple(name for name in names if getattr(held, name) != type(held).model_fields[name].default)
