"""What a plan holds, as frozen pydantic models: the JSON of `compress check --json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.frozen import Frozen
from compress.recipe.recipe import Limit
from compress.stage.prediction import Estimate


class StagePlan(Frozen):
    """One stage. ``cached`` is ``None`` where nobody knows; what is cached costs nothing again."""

    label: str
    kind: str
    takes: str = Field(description="class of the model that goes in")
    gives: str = Field(description="class of the model that comes out")
    reads: tuple[str, ...] = Field(description="splits and other text")
    refers_to: tuple[str, ...] = Field(description="earlier stages whose outputs it reads beside its input")
    cached: bool | None
    seconds: Estimate
    peak_memory_bytes: Estimate
    disk_bytes: Estimate


class SourcePlan(Frozen):
    """The starting model, a split or unlabeled text."""

    role: str
    reference: str
    status: Literal["here", "unknown until fetched"]
    path: str | None
    size_bytes: int | None = None
    parameters: int | None = None
    rows: int | None = Field(None, description="of data; estimated from the first rows except for Parquet")
    note: str = ""


class TargetPlan(Frozen):
    """Whether a target can be had here, or why it will be skipped."""

    name: str
    available: bool
    reason: str


class Plan(Frozen):
    """Everything that can be said of a run before a model is loaded."""

    recipe: str
    task: str
    task_is_told: bool = Field(False, description="by the model's config, since the recipe names none")
    sources: tuple[SourcePlan, ...]
    stages: tuple[StagePlan, ...]
    targets: tuple[TargetPlan, ...]
    processor: str = Field(description="the kind of processor of this machine")
    decided: dict[str, str] = Field({}, description="label of a stage -> what it leaves to the processors, decided")
    limits: tuple[Limit, ...]
    seconds: Estimate
    disk_needed_bytes: Estimate
    disk_free_bytes: int
    artifacts: str
    plugins: tuple[str, ...] = Field((), description="what other packages register and cannot be used, and why")
