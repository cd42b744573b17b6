"""What a report keeps of one stage: its cost, and what it found or chose."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

Cell = str | int | float
"""A word, a count, or a measured number."""


class FrozenRecord(BaseModel):
    """Frozen. Keys that a later version may add to schema 1 are ignored, so that its reports open."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, serialize_by_alias=True)


class StageTable(FrozenRecord):
    """What a stage found, in rows that belong together: each layer's damage, say."""

    title: str
    columns: tuple[str, ...] = Field(min_length=1)
    rows: tuple[tuple[Cell, ...], ...] = ()

    @model_validator(mode="after")
    def _rectangular(self) -> StageTable:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"rows of {len(self.columns)} cells")
        return self


class StageRecord(FrozenRecord):
    """One stage of the run, and its cost in this run: next to nothing when ``cached``.

    ``seconds`` is what it took to load its input, do its work and write its output; ``check_seconds`` what the checks
    of that output took besides. ``remarks`` and ``tables`` are what it found or chose, whenever that was.
    """

    name: str
    key: str
    cached: bool
    seconds: float = Field(ge=0)
    check_seconds: float = Field(0.0, ge=0)
    peak_rss_bytes: int | None = Field(None, ge=0)
    remarks: tuple[str, ...] = ()
    tables: tuple[StageTable, ...] = ()
