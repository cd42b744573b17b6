"""What a recipe leaves to `compress search`: which fields, between which values, for what, in what time."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from compress.data.config import HoldOut
from compress.results.formatting import parse_duration
from compress.utils.pydantic_models import Frozen


class Search(Frozen):
    """What is searched. Limits are the recipe's own, and the recipe as it stands is the first trial."""

    minimize: tuple[str, ...] = Field(
        ("size_bytes",),
        min_length=1,
        max_length=2,
        description="a metric, or two whose front is looked for: what is to be as small as the limits let it be",
    )
    budget: str = Field("60m", description="time for all trials and the session at the end: 90s, 60m, 1h30m")
    trials: int | None = Field(None, ge=1, description="how many recipes are tried at most")
    select: HoldOut = Field(
        HoldOut(rows=1500), description="rows held out of training that the choice is made by: {from: train, rows: N}"
    )
    choices: dict[str, tuple[Any, ...]] = Field(
        {}, description="fields, named as `--set` names them, and the values that may be tried beside the recipe's own"
    )
    optional: tuple[str, ...] = Field((), description="labels of stages that may be left out")
    target: str | None = Field(None, description="where trials are measured; left out: the recipe's first target")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="how sure it has to be that a recipe keeps a limit on quality"
    )
    rungs: tuple[float, ...] = Field(
        (1 / 9, 1 / 3),
        description="shares of the training after which a recipe may be given up; (): each is trained in full",
    )
    past: bool = Field(
        True,
        description="whether earlier searches of the same task, and recipes at hand, say where to look first; what "
        "they say counts for nothing else",
    )
    seeds: int = Field(2, ge=0, le=9, description="further seeds that the winner is trained with at the end")
    refit: bool | None = Field(
        None,
        description="whether the winner is trained anew at the end, from the rows that chose it too; left out: where "
        "they are at least a twentieth of what training has",
    )

    @field_validator("minimize", mode="before")
    @classmethod
    def _one_or_two(cls, value: Any) -> Any:
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
        """The budget."""
        return parse_duration(self.budget)
