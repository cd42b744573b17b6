"""Entries of a registry's log: one record for each action, with its author and time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from compress.utils.pydantic_models import Frozen

VERSION = 1
CHAMPION = "champion"
LATEST = "latest"
"""Reserved alias of the newest version that is not retired."""
WORD = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of the names of models and aliases. An alias, in addition, is not a number."""
DIGEST = r"^[0-9a-f]{64}$"


class _Done(Frozen):
    at: str = Field(description="ISO 8601, with the offset from UTC; the order is that of the log, whatever this says")
    who: str


class Began(_Done):
    """First line of a log."""

    kind: Literal["began"] = "began"
    version: int = VERSION


class Registered(_Done):
    """New version of a model. ``record`` is the digest of the file that lists its contents."""

    kind: Literal["registered"] = "registered"
    name: str = Field(pattern=WORD)
    version: int = Field(ge=1)
    record: str = Field(pattern=DIGEST)
    run: str = Field(description="the folder that it was registered from, as it was given")
    summary: str = Field("", description="its main figures, for a list")
    note: str = ""


class GateOutcome(Frozen):
    """Result of the gate for a version, compared with the version that the alias referred to."""

    against: int | None = Field(description="None for the first version of an alias, with which nothing compares")
    status: Literal["passed", "warned", "failed", "not compared"]
    failed: tuple[str, ...] = Field((), description="what was worse, or why nothing could be compared")


class Promoted(_Done):
    """Change of an alias to another version."""

    kind: Literal["promoted"] = "promoted"
    name: str
    version: int
    alias: str
    before: int | None
    gate: GateOutcome
    forced: bool = Field(False, description="whether it was promoted although it was refused")
    why: str = ""


class RolledBack(_Done):
    """Return of an alias to the version that it referred to before."""

    kind: Literal["rolled back"] = "rolled back"
    name: str
    version: int
    alias: str
    before: int
    why: str = ""


class Retired(_Done):
    """Retirement of a version, whose files `gc` may remove."""

    kind: Literal["retired"] = "retired"
    name: str
    version: int
    why: str = ""


class Collected(_Done):
    """Removal of the files of retired versions."""

    kind: Literal["collected"] = "collected"
    versions: tuple[tuple[str, int], ...]


Entry = Annotated[
    Began | Registered | Promoted | RolledBack | Retired | Collected,
    Field(discriminator="kind"),
]
ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
