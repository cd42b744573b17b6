"""Comparison of two models: one row for each metric, and one record for all views and the gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.numerics.differences import Verdict
from compress.results.metrics import split_of
from compress.results.report import FINAL, Measurement, Report
from compress.utils.pydantic_models import FrozenAliased

SCHEMA = 1

Method = Literal["side by side", "from reports"]


class MetricChange(FrozenAliased):
    """Change of one metric from a baseline to a candidate.

    ``effect`` is the candidate's value over the baseline's less 1 if ``scale`` is `relative` (latency, size), and the
    difference of the two if it is `absolute` (accuracy and other shares). A positive effect means that the candidate's
    value is larger, which is not always worse. The verdict accounts for the metric's direction.
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
    confidence: float | None = Field(None, description="confidence of the interval; None for exact quantities")
    margin: float = Field(ge=0, description="the smallest effect that matters, on the same scale")
    verdict: Verdict
    n: int = Field(ge=1, description="number of pairs of samples")
    more: int | None = Field(0, description="further pairs that should settle it; 0 if settled, None if none would")
    method: str = Field(description="how the interval was made, e.g. `paired rounds, t interval over process launches`")
    note: str | None = Field(None, description="reason of the verdict, if the numbers do not show it")
    noisy: bool = Field(False, description="whether it is a time that was measured on a machine too noisy for times")
    identical: bool = Field(False, description="whether both sides are one measurement")


class SliceChange(FrozenAliased):
    """Change of a metric on a slice of the evaluation data."""

    name: str = Field(description="name of the slice in the recipe")
    rows: int = Field(ge=1)
    change: MetricChange


class JudgedLimit(FrozenAliased):
    """Limit of the candidate's recipe with the verdict of its report."""

    metric: str
    target: str
    limit: str = Field(description="limit as text")
    verdict: Literal["kept", "missed", "cannot tell"]
    result: str = Field(description="measured value as text")
    fails: bool = Field(description="whether the exit code of the run is 1 because of it")


class Flip(FrozenAliased):
    """Example that one of the two models gets right and the other wrong."""

    row: int = Field(ge=0, description="position in the test split")
    now: Literal["wrong", "right"] = Field(description="prediction of the candidate")
    label: str = Field(description="correct answer; empty if the run's folder does not contain it")
    baseline_answer: str
    candidate_answer: str
    example: str = Field(description="the example as text, or its location")


class ContinuationChange(FrozenAliased):
    """Greedy continuations of both models after one prompt."""

    target: str
    prompt: str
    baseline: str
    candidate: str
    same: int = Field(ge=0, description="number of leading characters that both have in common")
    parting: str = Field(description="first token that differs, with its probability in both models")


class UncomparedMetric(FrozenAliased):
    """Metric without a comparison: it is missing on one side, or no number."""

    metric: str
    target: str
    reason: str
    candidate_lacks: bool = Field(False, description="whether the candidate is the cause, so that a gate on it fails")


class ComparedModel(FrozenAliased):
    """One of the two compared models."""

    name: str = Field(description="folder or file as given by the user")
    model: str = Field("final", description="model of the run")
    started: str | None = Field(None, description="time of the measurement, ISO 8601")
    host: str = Field("", description="short description of the machine")


class Comparison(FrozenAliased):
    """Comparison of one candidate with one baseline."""

    schema_version: int = Field(SCHEMA, alias="schema")
    baseline: ComparedModel
    candidate: ComparedModel
    how: Method
    changes: tuple[MetricChange, ...]
    slices: tuple[SliceChange, ...] = ()
    limits: tuple[JudgedLimit, ...] = Field((), description="limits of the candidate's recipe, as its report has them")
    flips: tuple[Flip, ...] = ()
    continuations: tuple[ContinuationChange, ...] = ()
    host_differences: tuple[str, ...] = Field(
        (), description="differences that make times of the two machines incomparable"
    )
    notes: tuple[str, ...] = ()
    uncompared: tuple[UncomparedMetric, ...] = ()

    def find(self, metric: str, target: str) -> MetricChange | None:
        """Return the change of that metric on that target, or None."""
        return next((row for row in self.changes if (row.metric, row.target) == (metric, target)), None)

    @property
    def worst_slice(self) -> SliceChange | None:
        """Return the slice whose quality fell most, or rose least."""
        return min(self.slices, key=lambda part: part.change.effect, default=None)


@dataclass(frozen=True)
class ComparedModels:
    """Two reports, or one report twice, a model of each, and the runs' folders if they are known."""

    baseline: Report
    candidate: Report
    baseline_model: str = FINAL
    candidate_model: str = FINAL
    baseline_folder: Path | None = None
    candidate_folder: Path | None = None

    def rows(self, metric: str, target: str) -> tuple[Measurement | None, Measurement | None]:
        """Return the measurements of both models, the baseline's first."""
        baseline = self.baseline.find(self.baseline_model, metric, target)
        return baseline, self.candidate.find(self.candidate_model, metric, target)

    def same_rows(self, metric: str = "") -> bool:
        """Return whether both were evaluated on the same examples by ``metric``, as far as the reports state it."""
        baseline_data, candidate_data = self.baseline.data, self.candidate.data
        if baseline_data is None or candidate_data is None:
            return True
        if on_split := split_of(metric):
            return baseline_data.also.get(on_split[1]) == candidate_data.also.get(on_split[1])
        return baseline_data.digest == candidate_data.digest

    def outcomes(self, metric: str, target: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return the outcome of each example for both models, if those are the same examples."""
        baseline, candidate = (row.raw if row else None for row in self.rows(metric, target))
        if baseline is None or candidate is None or len(baseline) != len(candidate) or not self.same_rows(metric):
            return None
        return baseline, candidate
