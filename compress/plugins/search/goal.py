"""What a search wants: which figure is to be small, within which limits, and how sure of them it has to be."""

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
"""Share of rows on which a compressed model and its baseline give different answers, before anything is measured."""


@dataclass(frozen=True)
class Goal:
    """The metrics to minimize, and the limits on the target that trials are measured on."""

    minimize: tuple[str, ...]
    limits: tuple[Limit, ...]
    confidence: float

    @classmethod
    def from_recipe(cls, recipe: Recipe, search: Search) -> Goal:
        """The recipe's goal. Raises `InputError` for a metric that is better the larger it is."""
        target = target_name(recipe, search)
        for metric in search.minimize:
            if describe_metric(metric).better == "higher":
                raise InputError(
                    f"{metric} is better the larger it is, so that it cannot be minimized.",
                    where="search.minimize",
                    expected="size_bytes, latency_ms, perplexity or the like; what must stay high is a limit",
                    hint=f"limits: [{{metric: {metric}, at_least: 0.985, of: baseline}}]",
                )
        return cls(search.minimize, tuple(one for one in recipe.limits if one.target == target), search.confidence)

    def check_resolution(self, rows: int) -> None:
        """Raise `InputError` for a limit on accuracy that so many rows could not resolve."""
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
        """Limits whose rows say how sure one can be."""
        return tuple(limit for limit in self.limits if describe_metric(limit.metric).quality)

    @property
    def needs_timing(self) -> bool:
        """Whether a time has to be measured for it."""
        names = (*self.minimize, *(limit.metric for limit in self.limits))
        return any(describe_metric(name).timed for name in names)

    @property
    def compares_times(self) -> bool:
        """Whether a limit is on a time as a share of the baseline's."""
        metrics = ((limit, describe_metric(limit.metric)) for limit in self.limits)
        return any(metric.timed and (metric.relative or limit.of is not None) for limit, metric in metrics)

    @property
    def quality_metrics(self) -> tuple[str, ...]:
        """Metrics of quality whose outcomes of rows have to be kept."""
        limits = tuple(limit.metric for limit in self.quality_limits)
        return (*limits, *(name for name in self.minimize if describe_metric(name).quality))

    def objectives(self, outcome: TrialOutcome) -> tuple[float, ...] | None:
        """The figures to minimize; None where one is missing."""
        found = [outcome.final.get(metric) for metric in self.minimize]
        return None if None in found else tuple(value for value in found if value is not None)

    def shortfalls(self, outcome: TrialOutcome) -> dict[str, float]:
        """Limit -> by what share of its bound it is not safely kept; at most 0 where it is."""
        found = {}
        for limit in self.limits:
            room = constraint_margin(limit, outcome, self.confidence)
            found[limit_name(limit)] = float("inf") if room is None else -room.low
        return found

    def meets_limits(self, outcome: TrialOutcome) -> bool:
        """Whether every limit is kept, as surely as is wanted."""
        return outcome.error is None and all(short <= 1e-12 for short in self.shortfalls(outcome).values())


def limit_name(limit: Limit) -> str:
    """`accuracy on cpu`, which limits of a recipe are told apart by; both bounds of one metric are two."""
    return f"{limit.metric} {'at least' if limit.at_least is not None else 'at most'} {limit.bound:g}"


def target_name(recipe: Recipe, search: Search) -> str:
    """Where trials are measured. Raises `InputError` for a target that the recipe has not."""
    names = [profile.name for profile in recipe.profiles()]
    if search.target is None:
        return names[0]
    if search.target not in names:
        raise InputError(
            f"The recipe has no target {search.target!r}.", where="search.target", expected=f"one of {', '.join(names)}"
        )
    return search.target


def is_dominated(values: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether one of ``others`` is as small in everything and smaller in something, or the same."""
    return any(all(b <= a for a, b in zip(values, other, strict=True)) for other in others)
