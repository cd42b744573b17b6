"""Search block of a recipe: fields that `compress search` varies, their values, the objective and the budget."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from compress.data.config import HoldOut
from compress.results.formatting import parse_duration
from compress.utils.pydantic_models import Frozen


class Search(Frozen):
    """Settings of a search. Limits are the recipe's own, and the unchanged recipe is the first trial."""

    minimize: tuple[str, ...] = Field(
        ("size_bytes",),
        min_length=1,
        max_length=2,
        description="a metric, or two for a Pareto front, to minimize within the limits",
    )
    budget: str = Field("60m", description="time for all trials and the session at the end: 90s, 60m, 1h30m")
    trials: int | None = Field(None, ge=1, description="largest number of recipes to try")
    select: HoldOut = Field(
        HoldOut(rows=1500),
        description="rows held out of training, by which recipes are selected: {from: train, rows: N}",
    )
    choices: dict[str, tuple[Any, ...]] = Field(
        {}, description="maps fields, named as in `--set`, to values to try beside the recipe's own"
    )
    optional: tuple[str, ...] = Field((), description="labels of stages that may be left out")
    target: str | None = Field(None, description="target that trials are measured on; default: the recipe's first")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="probability with which a recipe must keep a limit on quality"
    )
    rungs: tuple[float, ...] = Field(
        (1 / 9, 1 / 3),
        description="shares of the training after which a trial may be stopped; (): no early stopping",
    )
    past: bool = Field(
        True,
        description="start from earlier searches of the same task and from shipped recipes; they only affect the order "
        "of trials",
    )
    seeds: int = Field(2, ge=0, le=9, description="additional seeds that the best recipe is trained with at the end")
    refit: bool | None = Field(
        None,
        description="retrain the best recipe at the end with the selection rows as well; default: if they are at least "
        "5% of the training rows",
    )

    @field_validator("minimize", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("budget")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        parse_duration(value)
        return value

    @field_validator("rungs")
    @classmethod
    def _rising_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < share < 1 for share in value) or list(value) != sorted(set(value)):
            raise ValueError("rising shares between 0 and 1")
        return value

    @property
    def seconds(self) -> float:
        """Return the budget in seconds."""
        return parse_duration(self.budget)
