"""What data classes that are read from or written to files inherit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Frozen(BaseModel):
    """Frozen, with unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FrozenAliased(Frozen):
    """The same; a field with an alias is read by either name and written by its alias."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class LaterFields(BaseModel):
    """Some fields came later: unless they are set they are not written, so that keys of caches stay."""

    later_fields: ClassVar[tuple[str, ...]] = ()
    """Those that recipes didn't have from the start, in this class or in ones that inherit from it."""

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = unset(self, self.later_fields)
        return {name: value for name, value in serialize(self).items() if name not in left_out}


def unset(held: BaseModel, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are fields and have their defaults."""
    own = set(names).intersection(type(held).model_fields)
    return own.difference(changed(held, own))


def changed(held: BaseModel, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the fields ``names`` that don't have their defaults."""
    return tuple(name for name in names if getattr(held, name) != type(held).model_fields[name].default)
