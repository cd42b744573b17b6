"""Objectives and limits of a search, and the confidence with which limits have to be met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from compress.plugins.search.outcome import TrialOutcome, constraint_margin
from compress.recipe.recipe import Limit, Recipe
from compress.recipe.search import Search
from compress.results.metrics import describe_metric
from compress.utils.errors import InputError

_DISAGREE = 0.1
"""Share of rows on which a compressed model and its baseline are assumed to differ before anything is measured."""


@dataclass(frozen=True)
class Goal:
    """Metrics to minimize and limits on the target that trials are measured on."""

    minimize: tuple[str, ...]
    limits: tuple[Limit, ...]
    confidence: float

    @classmethod
    def from_recipe(cls, recipe: Recipe, search: Search) -> Goal:
        """Return the goal of a recipe. Raises `InputError` for a metric to minimize that is better the larger it is."""
        target = target_name(recipe, search)
        for metric in search.minimize:
            if describe_metric(metric).better == "higher":
                raise InputError(
                    f"{metric} is better the larger it is, so that it cannot be minimized.",
                    where="search.minimize",
                    expected="size_bytes, latency_ms, perplexity or the like; what must stay high is a limit",
                    hint=f"limits: [{{metric: {metric}, at_least: 0.985, of: baseline}}]",
                )
        return cls(
            search.minimize, tuple(limit for limit in recipe.limits if limit.target == target), search.confidence
        )

    def check_resolution(self, rows: int) -> None:
        """Raise `InputError` for a limit on accuracy that this number of rows cannot resolve."""
        z = NormalDist().inv_cdf(self.confidence)
        for limit in self.quality_limits:
            margin = 1 - limit.bound
            counted = limit.at_least is not None and limit.of is not None and "accuracy" in limit.metric
            if not counted or not 0 < margin < 1:
                continue
            needed = math.ceil(_DISAGREE * (z / margin) ** 2)
            if needed > rows:
                raise InputError(
                    f"{rows:,} rows can't tell whether {limit.metric} is at least {limit.bound:.2%} of the baseline's.",
                    where="search.select.rows",
                    expected=f"about {needed:,} rows, if answers differ on a tenth of them",
                    hint="hold out more rows, or loosen the limit or `search.confidence`",
                )

    @property
    def quality_limits(self) -> tuple[Limit, ...]:
        """Limits on quality, whose rows give a confidence interval."""
        return tuple(limit for limit in self.limits if describe_metric(limit.metric).quality)

    @property
    def needs_timing(self) -> bool:
        """Return whether an objective or a limit is a time."""
        names = (*self.minimize, *(limit.metric for limit in self.limits))
        return any(describe_metric(name).timed for name in names)

    @property
    def compares_times(self) -> bool:
        """Return whether a limit is on a share of the baseline's time."""
        metrics = ((limit, describe_metric(limit.metric)) for limit in self.limits)
        return any(metric.timed and (metric.relative or limit.of is not None) for limit, metric in metrics)

    @property
    def quality_metrics(self) -> tuple[str, ...]:
        """Quality metrics whose outcomes of single rows are stored."""
        limits = tuple(limit.metric for limit in self.quality_limits)
        return (*limits, *(name for name in self.minimize if describe_metric(name).quality))

    def objectives(self, outcome: TrialOutcome) -> tuple[float, ...] | None:
        """Return the values to minimize; None where one is missing."""
        values = [outcome.final.get(metric) for metric in self.minimize]
        return None if None in values else tuple(value for value in values if value is not None)

    def shortfalls(self, outcome: TrialOutcome) -> dict[str, float]:
        """Return by what share of its bound each limit is not met with confidence; at most 0 where it is."""
        shortfalls = {}
        for limit in self.limits:
            margin = constraint_margin(limit, outcome, self.confidence)
            shortfalls[limit_name(limit)] = float("inf") if margin is None else -margin.low
        return shortfalls

    def meets_limits(self, outcome: TrialOutcome) -> bool:
        """Return whether every limit is met with the required confidence."""
        return outcome.error is None and all(short <= 1e-12 for short in self.shortfalls(outcome).values())


def limit_name(limit: Limit) -> str:
    """Return a name that distinguishes the limits of a recipe, such as `accuracy at least 0.97`."""
    return f"{limit.metric} {'at least' if limit.at_least is not None else 'at most'} {limit.bound:g}"


def target_name(recipe: Recipe, search: Search) -> str:
    """Return the target that trials are measured on. Raises `InputError` for a target that the recipe lacks."""
    names = [profile.name for profile in recipe.profiles()]
    if search.target is None:
        return names[0]
    if search.target not in names:
        raise InputError(
            f"The recipe has no target {search.target!r}.", where="search.target", expected=f"one of {', '.join(names)}"
        )
    return search.target


def is_dominated(values: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Return whether one of ``others`` is at most as large in every objective."""
    return any(all(b <= a for a, b in zip(values, other, strict=True)) for other in others)
