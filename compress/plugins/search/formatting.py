"""Trials and models in words, as the console, the page and the recipe that is found write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.plugins.search.final_evaluation import EvaluatedModel
from compress.plugins.search.goal import Goal, limit_name
from compress.plugins.search.outcome import TrialOutcome, constraint_margin
from compress.results.formatting import format_interval, format_value
from compress.results.metrics import describe_metric
from compress.results.report import LimitResult


@dataclass(frozen=True)
class FormattedModel:
    """``figures`` are those that are minimized; ``lines`` say of each limit how it is kept."""

    name: str
    words: str
    figures: tuple[str, ...]
    verdict: str
    state: str
    lines: tuple[str, ...]


def format_model(one: EvaluatedModel, minimize: Sequence[str]) -> FormattedModel:
    """One model."""
    missed = [limit for limit in one.limits if limit.missed]
    unknown = [limit for limit in one.limits if limit.unknown]
    verdict = f"{len(missed)} missed" if missed else f"{len(unknown)} can't tell" if unknown else "all kept"
    state = "missed" if missed else "unknown" if unknown else "passed"
    figures = tuple(figure(name, one.final[name]) if name in one.final else "" for name in minimize)
    return FormattedModel(one.name, one.words, figures, verdict, state, format_limits(one.limits))


def format_limits(limits: Sequence[LimitResult]) -> tuple[str, ...]:
    """`accuracy at least 97% of baseline: 98.20% of baseline`."""
    return tuple(
        f"{limit.metric} {limit.limit}: "
        + (f"{limit.ratio:.2%} of {limit.of}" if limit.ratio is not None and limit.of
           else figure(limit.metric, limit.value))
        for limit in limits
    )  # fmt: skip


def figure(metric: str, value: float | None) -> str:
    """A figure as people read it."""
    return "not measured" if value is None else format_value(describe_metric(metric), value)


def format_objectives(
    minimize: Sequence[str], final: Mapping[str, float], spread: Mapping[str, tuple[float, float]]
) -> list[str]:
    """What is minimized, with its interval where one is known: `latency 0.4 ms (0.38-0.42)`."""
    found = []
    for name in minimize:
        if name in final:
            metric = describe_metric(name)
            interval = format_interval(metric, *spread.get(name, (None, None)))
            found.append(f"{metric.title.lower()} {figure(name, final[name])}" + (f" ({interval})" if interval else ""))
    return found


def format_margin(limit: str, value: float, low: float) -> str:
    """`accuracy at least 0.97: +1.20% inside, surely +0.31%`."""
    return f"{limit}: {value:+.2%} inside" + ("" if low == value else f", surely {low:+.2%}")


def format_outcome(goal: Goal, outcome: TrialOutcome) -> list[str]:
    """What the rows that choose say of a trial: what is minimized, then every limit that was measured."""
    rooms = ((limit, constraint_margin(limit, outcome, goal.confidence)) for limit in goal.limits)
    lines = [format_margin(limit_name(limit), room.value, room.low) for limit, room in rooms if room is not None]
    return [*format_objectives(goal.minimize, outcome.final, outcome.spread), *lines]
