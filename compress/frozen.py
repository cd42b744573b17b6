"""What data classes that are read from or written to files inherit."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Frozen, with unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FrozenAliased(Frozen):
    """The same; a field with an alias is read by either name and written by its alias."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)
