"""What a registry's log says: one record for each thing that was done, with who did it and when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from compress.utils.pydantic_models import Frozen

VERSION = 1
CHAMPION = "champion"
LATEST = "latest"
"""In place of an alias: the newest version that isn't retired."""
WORD = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a model and an alias may be called; an alias is no number besides."""
DIGEST = r"^[0-9a-f]{64}$"


class _Done(Frozen):
    at: str = Field(description="ISO 8601, with the offset from UTC; the order is that of the log, whatever this says")
    who: str


class Began(_Done):
    """The first line."""

    kind: Literal["began"] = "began"
    version: int = VERSION


class Registered(_Done):
    """A new version of a model; ``record`` is the digest of the file that lists what it holds."""

    kind: Literal["registered"] = "registered"
    name: str = Field(pattern=WORD)
    version: int = Field(ge=1)
    record: str = Field(pattern=DIGEST)
    run: str = Field(description="the folder that it was registered from, as it was given")
    summary: str = Field("", description="its main figures, for a list")
    note: str = ""


class Judged(Frozen):
    """What the gate made of a version beside the one that the alias stood for."""

    against: int | None = Field(description="None for the first version of an alias, with which nothing compares")
    status: Literal["passed", "warned", "failed", "not compared"]
    failed: tuple[str, ...] = Field((), description="what was worse, or why nothing could be compared")


class Promoted(_Done):
    """An alias stands for another version."""

    kind: Literal["promoted"] = "promoted"
    name: str
    version: int
    alias: str
    before: int | None
    gate: Judged
    forced: bool = Field(False, description="whether it was promoted although it was refused")
    why: str = ""


class RolledBack(_Done):
    """An alias stands for the version again that it stood for before."""

    kind: Literal["rolled back"] = "rolled back"
    name: str
    version: int
    alias: str
    before: int
    why: str = ""


class Retired(_Done):
    """A version is no longer wanted: `gc` may remove its files."""

    kind: Literal["retired"] = "retired"
    name: str
    version: int
    why: str = ""


class Collected(_Done):
    """The files of retired versions were removed."""

    kind: Literal["collected"] = "collected"
    versions: tuple[tuple[str, int], ...]


Entry = Annotated[
    Began | Registered | Promoted | RolledBack | Retired | Collected,
    Field(discriminator="kind"),
]
ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
