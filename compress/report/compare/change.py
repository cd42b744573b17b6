"""Two models with their reports, and what a comparison finds: one row a metric, one record for views and the gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.numerics.differences import Verdict
from compress.results.measurement import Measurement
from compress.results.metrics import split_of
from compress.results.report import FINAL, Report
from compress.utils.pydantic_models import FrozenAliased

SCHEMA = 1

How = Literal["side by side", "from reports"]


class Change(FrozenAliased):
    """One metric of a candidate against that of a baseline.

    ``effect`` is the candidate's value over the baseline's less 1 where ``scale`` is `relative` (latency, size), and
    the difference of the two where it is `absolute` (accuracy and other shares). Positive means that the candidate's
    value is larger, which is not always worse: the verdict knows which way is better.
    """

    metric: str
    target: str
    unit: str
    baseline: float
    candidate: float
    scale: Literal["relative", "absolute"]
    effect: float
    low: float = Field(description="lower bound of the effect at `confidence`; equal to `effect` for exact quantities")
    high: float
    confidence: float | None = Field(None, description="of the interval; None for exact quantities")
    margin: float = Field(ge=0, description="the smallest effect that matters, on the same scale")
    verdict: Verdict
    n: int = Field(ge=1, description="pairs of samples behind the effect")
    more: int | None = Field(0, description="further pairs that should settle it; 0 if settled, None if none would")
    method: str = Field(description="how the interval was made, e.g. `paired rounds, t interval over process launches`")
    note: str | None = Field(None, description="why the verdict is what it is, where figures alone don't say")


class SliceChange(FrozenAliased):
    """The same for a part of the evaluation data."""

    name: str = Field(description="as the recipe's `slices` name it")
    rows: int = Field(ge=1)
    change: Change


class Flip(FrozenAliased):
    """An example that one of the two gets right and the other wrong."""

    row: int = Field(ge=0, description="position in the test split")
    now: Literal["wrong", "right"] = Field(description="what the candidate made of it")
    label: str = Field(description="empty, like the answers, where a run's folder does not tell it")
    baseline_answer: str
    candidate_answer: str
    example: str = Field(description="the example as text, or where it is to be found")


class SideBySide(FrozenAliased):
    """What the two wrote after one prompt, always the likeliest token."""

    target: str
    prompt: str
    baseline: str
    candidate: str
    same: int = Field(ge=0, description="characters that both begin with")
    parting: str = Field(description="the token at which they part, and how likely either found it")


class Uncompared(FrozenAliased):
    """A metric of which nothing can be said: it is missing on one side, or no number."""

    metric: str
    target: str
    reason: str
    candidate_lacks: bool = Field(False, description="the candidate is at fault, so that a gate on it must not pass")


class Side(FrozenAliased):
    """One of the two that are compared."""

    name: str = Field(description="the folder or file, as it was given")
    model: str = Field("final", description="which model of a run")
    started: str | None = Field(None, description="when it was measured, ISO 8601")
    host: str = Field("", description="the machine in a few words")


class Comparison(FrozenAliased):
    """Everything that was found of one candidate against one baseline."""

    schema_version: int = Field(SCHEMA, alias="schema")
    baseline: Side
    candidate: Side
    how: How
    changes: tuple[Change, ...]
    slices: tuple[SliceChange, ...] = ()
    flips: tuple[Flip, ...] = ()
    continuations: tuple[SideBySide, ...] = ()
    host_differences: tuple[str, ...] = Field((), description="how the two machines differ; times then don't compare")
    notes: tuple[str, ...] = ()
    uncompared: tuple[Uncompared, ...] = ()

    def find(self, metric: str, target: str) -> Change | None:
        """The change of that metric on that target, if it was compared."""
        return next((row for row in self.changes if (row.metric, row.target) == (metric, target)), None)

    @property
    def worst_slice(self) -> SliceChange | None:
        """The slice whose quality fell most, or rose least."""
        return min(self.slices, key=lambda part: part.change.effect, default=None)


@dataclass(frozen=True)
class Sides:
    """Two reports, or one twice, a model of each, and the runs' folders where they are known."""

    baseline: Report
    candidate: Report
    baseline_model: str = FINAL
    candidate_model: str = FINAL
    baseline_folder: Path | None = None
    candidate_folder: Path | None = None

    def rows(self, metric: str, target: str) -> tuple[Measurement | None, Measurement | None]:
        """What was measured of either model, the baseline's first."""
        before = self.baseline.find(self.baseline_model, metric, target)
        return before, self.candidate.find(self.candidate_model, metric, target)

    def same_rows(self, metric: str = "") -> bool:
        """Whether both were judged on the same examples by ``metric``, as far as the reports know."""
        old, new = self.baseline.data, self.candidate.data
        if old is None or new is None:
            return True
        if elsewhere := split_of(metric):
            return old.also.get(elsewhere[1]) == new.also.get(elsewhere[1])
        return old.digest == new.digest

    def outcomes(self, metric: str, target: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """What was kept of each example on both sides, if those are the same examples."""
        before, after = (row.raw if row else None for row in self.rows(metric, target))
        if before is None or after is None or len(before) != len(after) or not self.same_rows(metric):
            return None
        return before, after
