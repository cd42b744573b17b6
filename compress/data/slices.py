"""Slices of a recipe: parts of the evaluation data whose metrics are reported separately."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from compress.data.columns import value_text
from compress.utils.pydantic_models import Frozen

Unit = Literal["characters", "tokens"]

_PREDICATES = ("matches", "contains", "equals", "at_least", "at_most")
_LENGTHS = "`quartiles`, or lengths at which slices begin, rising from at least 1, e.g. [16, 32]"


class Slice(Frozen):
    """One way to divide the evaluation data: by a column's values, by text length, or by a predicate.

    ``column: source`` makes one slice per value, named `source=imdb`. ``length: quartiles`` makes four, named
    `characters=Q1` to `characters=Q4`; ``length: [16, 32]`` makes `characters<16`, `characters=16-31` and
    `characters>=32`. A ``name`` with a ``column`` and a predicate makes one slice of the rows that satisfy it.
    """

    name: str | None = Field(
        None,
        pattern=r"^[^\[\]\s][^\[\]\n]{0,59}$",
        description="name of a slice that a predicate defines, e.g. `negated`",
    )
    column: str | None = Field(
        None, min_length=1, description="a column, by the task's name for it or by its name in the files"
    )
    length: Literal["quartiles"] | tuple[int, ...] | None = Field(None, description=_LENGTHS)
    unit: Unit = Field(
        "characters",
        description="unit of `length`; tokens are those of the baseline's tokenizer, truncated at `max_length`",
    )
    max_values: int = Field(
        12, ge=1, description="maximum number of values with a slice of their own, the most frequent first"
    )
    min_rows: int = Field(
        20, ge=1, description="minimum rows of a slice; rows of rarer values form the slice `COLUMN=(other)`"
    )
    matches: str | None = Field(None, description="regular expression to search for in the value")
    contains: str | None = Field(None, min_length=1, description="substring of the value")
    equals: Annotated[str | None, WithJsonSchema({"type": ["string", "number", "boolean", "null"]})] = Field(
        None, description="the value as text, where true, 1 and 1.0 are `true`, `1` and `1`"
    )
    at_least: float | None = Field(None, description="smallest value in the slice")
    at_most: float | None = Field(None, description="largest value in the slice")

    @field_validator("length", mode="wrap")
    @classmethod
    def _rising(cls, value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            length = validate(tuple(value) if isinstance(value, list) else value)
        except ValidationError:
            raise ValueError(_LENGTHS) from None
        if isinstance(length, tuple) and (not length or any(low >= high for low, high in pairwise((0, *length)))):
            raise ValueError(_LENGTHS)
        return length

    @field_validator("equals", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return value_text(value) if isinstance(value, bool | int | float) else value

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"a regular expression of Python's `re` ({error})") from None
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Slice:
        if (self.column is None) == (self.length is None):
            raise ValueError("exactly one of `column` and `length`")
        predicates = self.predicates()
        if self.length is not None and (predicates or self.name is not None):
            raise ValueError("`length` with `unit` alone: its slices have names of their own, and predicates a column")
        if len(predicates) > 1 and set(predicates) != {"at_least", "at_most"}:
            raise ValueError("one predicate; of two, only `at_least` and `at_most` go together")
        if bool(predicates) != (self.name is not None) and self.column is not None:
            raise ValueError(f"a `name` together with a predicate: {', '.join(_PREDICATES)}")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and low > high:
            raise ValueError("`at_least` no larger than `at_most`")
        # Some fields only make sense for another way to divide the data.
        idle: tuple[str, ...] = () if self.length is not None else ("unit",)
        idle += ("max_values", "min_rows") if self.length is not None or predicates else ()
        defaults = type(self).model_fields
        unused = [name for name in idle if getattr(self, name) != defaults[name].default]
        if unused:
            raise ValueError(f"no `{unused[0]}`, which does not apply here")
        return self

    def predicates(self) -> tuple[str, ...]:
        """Return the names of the predicates that are set."""
        return tuple(name for name in _PREDICATES if getattr(self, name) is not None)


def check_names(slices: Iterable[Slice]) -> None:
    """Raise `ValueError` for two slices with the same name, or the same slice twice."""
    seen: set[str] = set()
    for part in slices:
        key = part.name or f"{part.column} {part.length} {part.unit}"
        if key in seen:
            raise ValueError(f"every slice once, and each name once ({part.name or 'one is given twice'!r})")
        seen.add(key)


def extra_columns(slices: Iterable[Slice], known: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that ``slices`` read besides the ``known`` columns of the task, each once."""
    task = set(known)
    return tuple(dict.fromkeys(part.column for part in slices if part.column and part.column not in task))
