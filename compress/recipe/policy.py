"""Rules of gates and comparisons: the regression that matters for each metric, and the action if inconclusive."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from compress.results.metrics import metric_on_split, metrics_table
from compress.utils.pydantic_models import Frozen

CannotTell = Literal["pass", "warn", "fail"]

_MARGIN = r"^\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%|points?)\s*$"
_EXPECTED = "a margin: `5%` of the baseline, `0.5 points` of a share, or a number of at least 0 in the metric's unit"


class Margin(NamedTuple):
    """Margin of a metric: ``value`` in the metric's unit, or as a share of the baseline's value if ``relative``."""

    value: float
    relative: bool

    def of(self, baseline: float, relative: bool) -> float | None:
        """Return the margin as a share of ``baseline`` or in the metric's unit, or None if ``baseline`` is 0."""
        if self.relative == relative:
            return self.value
        if self.relative:
            return self.value * abs(baseline)
        return self.value / abs(baseline) if baseline else None


def parse_margin(written: str | float) -> Margin:
    """Parse `5%`, `0.5 points` or a number. Raises `ValueError` for anything else."""
    if isinstance(written, str):
        match = re.match(_MARGIN, written)
        if not match:
            raise ValueError(_EXPECTED)
        return Margin(float(match[1]) / 100, relative=match[2] == "%")
    if not 0 <= written < float("inf"):
        raise ValueError(_EXPECTED)
    return Margin(float(written), relative=False)


class Rule(Frozen):
    """Largest acceptable regression of a metric, or of its worst slice."""

    metric: str = Field(min_length=1, description="a metric's name, or a pattern such as `latency_ms*`")
    worse_by: float | str = Field(
        description="the smallest regression that matters: `5%` of the baseline, `0.5 points` of a share such as "
        "accuracy, or a number in the metric's unit"
    )
    slices: Literal["worst"] | None = Field(None, description="`worst`: judge the slice with the largest drop")
    cannot_tell: CannotTell | None = Field(None, description="action if inconclusive, if it differs from the policy's")
    confidence: float | None = Field(
        None, gt=0.5, lt=1, description="confidence of the interval; default: by kind of metric"
    )

    @field_validator("worse_by", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(_EXPECTED)
        parse_margin(value)
        return value

    @property
    def margin(self) -> Margin:
        """Return `worse_by` as a margin."""
        return parse_margin(self.worse_by)

    def covers(self, metric: str) -> bool:
        """Return True if the rule applies to a metric."""
        return self.metric == metric or fnmatchcase(metric, self.metric)


def gate_rules() -> tuple[Rule, ...]:
    """Return the rules of a gate that has no policy: the gate margins of the metrics table.

    Latency by length and its tails have none: of many noisy metrics one is always bad.
    """
    rows = [(row, row.gate_margin) for row in metrics_table().rows if row.gate_margin is not None]
    # A quality on another split than the test split has the margin of the metric. Names that end in `]` are kinds of
    # tokens, which are not judged one by one.
    on_splits = [
        Rule(metric=f"{metric_on_split(row.name, '*')}[!]]", worse_by=margin)
        for row, margin in rows
        if row.quality and row.name == row.pattern
    ]
    return (*(Rule(metric=row.pattern, worse_by=margin) for row, margin in rows), *on_splits)


class Policy(Frozen):
    """Rules of a gate or a comparison."""

    rules: tuple[Rule, ...] = Field(
        default_factory=gate_rules,
        description="rules that replace the default ones; an exact name precedes patterns, otherwise the first match "
        "applies",
    )
    cannot_tell: CannotTell = Field("warn", description="action if neither a regression nor its absence is shown")
    model: str = Field("final", min_length=1, description="model to compare: `final`, or a stage's label")
    targets: tuple[str, ...] = Field((), description="targets; default: every target that both were measured on")
    quality_confidence: float = Field(
        0.90,
        gt=0.5,
        lt=1,
        description="confidence of intervals of quality: at 90%, at most 5% of equal models are reported as worse",
    )
    time_confidence: float = Field(
        0.99, gt=0.5, lt=1, description="confidence of intervals of times and rates: high, since there are many of them"
    )
    session_spread: float = Field(
        0.03,
        ge=0,
        lt=1,
        description="standard deviation of one model's time between sessions on one machine (0.03: 3%); widens the "
        "intervals of times that were not measured side by side",
    )

    def rule(self, metric: str) -> Rule | None:
        """Return the rule on all rows that covers a metric: by its exact name, else the first pattern."""
        rules = [rule for rule in self.rules if rule.slices is None]
        exact = (rule for rule in rules if rule.metric == metric)
        return next(exact, None) or next((rule for rule in rules if rule.covers(metric)), None)

    def slice_rule(self, metric: str) -> Rule | None:
        """Return the rule on the worst slice of a metric."""
        return next((rule for rule in self.rules if rule.slices and rule.covers(metric)), None)

    def if_inconclusive(self, rule: Rule) -> CannotTell:
        """Return the action of ``rule`` if a comparison is inconclusive."""
        return rule.cannot_tell or self.cannot_tell


def comparison_policy() -> Policy:
    """Return the policy of a comparison that names none: the margins of the metrics table, finer than a gate's."""
    rows = metrics_table().rows
    return Policy(rules=tuple(Rule(metric=row.pattern, worse_by=row.margin) for row in rows if row.margin is not None))


def default_margin(share: bool) -> Margin:
    """Return the margin of a metric without a rule: half a point of a share, 1% of anything else."""
    return Margin(0.005, relative=False) if share else Margin(0.01, relative=True)
