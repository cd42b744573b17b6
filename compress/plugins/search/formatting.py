"""Text of trials and models for the console, the page and the best recipe."""

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
    """Evaluated model as text. ``figures`` are the objectives; ``lines`` show each limit."""

    name: str
    words: str
    figures: tuple[str, ...]
    verdict: str
    state: str
    lines: tuple[str, ...]


def format_model(model: EvaluatedModel, minimize: Sequence[str]) -> FormattedModel:
    """Format an evaluated model."""
    missed = [limit for limit in model.limits if limit.missed]
    unknown = [limit for limit in model.limits if limit.unknown]
    verdict = f"{len(missed)} missed" if missed else f"{len(unknown)} can't tell" if unknown else "all kept"
    state = "missed" if missed else "unknown" if unknown else "passed"
    figures = tuple(format_metric(name, model.final[name]) if name in model.final else "" for name in minimize)
    return FormattedModel(model.name, model.words, figures, verdict, state, format_limits(model.limits))


def format_limits(limits: Sequence[LimitResult]) -> tuple[str, ...]:
    """Format limits as `accuracy at least 97% of baseline: 98.20% of baseline`."""
    return tuple(
        f"{limit.metric} {limit.limit}: "
        + (f"{limit.ratio:.2%} of {limit.of}" if limit.ratio is not None and limit.of
           else format_metric(limit.metric, limit.value))
        for limit in limits
    )  # fmt: skip


def format_metric(metric: str, value: float | None) -> str:
    """Format the value of a metric for people."""
    return "not measured" if value is None else format_value(describe_metric(metric), value)


def format_objectives(
    minimize: Sequence[str], final: Mapping[str, float], spread: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Format the objectives with their intervals: `latency 0.4 ms (0.38-0.42)`."""
    texts = []
    for name in minimize:
        if name in final:
            metric = describe_metric(name)
            interval = format_interval(metric, *spread.get(name, (None, None)))
            texts.append(
                f"{metric.title.lower()} {format_metric(name, final[name])}" + (f" ({interval})" if interval else "")
            )
    return texts


def format_margin(limit: str, value: float, low: float) -> str:
    """Format a margin as `accuracy at least 0.97: +1.20% inside, surely +0.31%`."""
    return f"{limit}: {value:+.2%} inside" + ("" if low == value else f", surely {low:+.2%}")


def format_outcome(goal: Goal, outcome: TrialOutcome) -> list[str]:
    """Format the metrics of a trial on the selection rows: objectives, then every limit that was measured."""
    margins = ((limit, constraint_margin(limit, outcome, goal.confidence)) for limit in goal.limits)
    lines = [format_margin(limit_name(limit), room.value, room.low) for limit, room in margins if room is not None]
    return [*format_objectives(goal.minimize, outcome.final, outcome.spread), *lines]
