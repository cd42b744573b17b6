"""Outcome of a trial with the margins of its limits, and the goal of a search: objectives and limits."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from compress.formats.target_profile import TargetProfile
from compress.numerics.statistics import IntervalEstimate
from compress.recipe.recipe import Limit, Recipe
from compress.report.limits import paired_ratio_interval
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, Measurement
from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen


class StageCost(Frozen):
    """Cache key of a stage's output, its time, and whether the output was cached."""

    label: str
    key: str
    seconds: float
    cached: bool


def _check_rows(text: str) -> str:
    """Return a text of `pack_rows`. Raises `ValueError` for another text."""
    unpack_rows(text)
    return text


class TrialOutcome(Frozen):
    """Outcome of a trial that has ended. With an ``error``, every other field but ``seconds`` is empty.

    Attributes:
        model: Digest of the final model's files.
        final: Metrics of the final model on the selection rows.
        baseline: The same metrics of the baseline.
        spread: 95% intervals of the final model's metrics that have one.
        rows: Outcomes of single rows (`pack_rows`) by model (`final`, `baseline`) and metric.
        stages: Cost of each stage.
        seconds: Time of the whole trial.
        error: First line of the error that ended the trial.
    """

    model: str = ""
    final: dict[str, float] = {}
    baseline: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    rows: dict[str, dict[str, Annotated[str, AfterValidator(_check_rows)]]] = {}
    stages: tuple[StageCost, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    @classmethod
    def from_measurements(cls, measurements: Iterable[Measurement], row_metrics: Sequence[str] = ()) -> TrialOutcome:
        """Return the outcome with these measurements; outcomes of rows are stored for ``row_metrics`` only."""
        values: dict[str, dict[str, float]] = {FINAL: {}, BASELINE: {}}
        rows: dict[str, dict[str, str]] = {FINAL: {}, BASELINE: {}}
        spread: dict[str, tuple[float, float]] = {}
        for row in measurements:
            if row.model not in rows:
                continue
            values[row.model][row.metric] = row.value
            if row.model == FINAL and row.low is not None and row.high is not None:
                spread[row.metric] = (row.low, row.high)
            relative = describe_metric(row.metric, row.unit).relative
            if row.metric in row_metrics and row.raw and not (relative and row.model == BASELINE):
                rows[row.model][row.metric] = pack_rows(row.raw)
        return cls(final=values[FINAL], baseline=values[BASELINE], spread=spread, rows=rows)

    def measurement(self, model: str, metric: str) -> Measurement | None:
        """Return a metric as a measurement, with the outcomes of single rows where they are stored."""
        value = (self.final if model == FINAL else self.baseline).get(metric)
        if value is None:
            return None
        # Single rows are stored for quality metrics only.
        packed = self.rows.get(model, {}).get(metric)
        raw = None if packed is None else unpack_rows(packed)
        low, high = self.spread.get(metric, (None, None)) if model == FINAL else (None, None)
        n = 1 if raw is None else len(raw)
        return Measurement(
            model=model, metric=metric, target="", value=value, unit="", low=low, high=high, n=n, raw=raw
        )


def pack_rows(outcomes: Sequence[float]) -> str:
    """Encode outcomes of rows as text: as bits where all are 0 or 1, else as 8-byte floats."""
    values = np.asarray(outcomes, dtype="<f8")
    # Correct or wrong takes one bit a row. A ledger of many trials stays small.
    is_binary = np.isin(values, (0.0, 1.0)).all()
    content = np.packbits(values.astype(bool)) if is_binary else values
    return f"{'bits' if is_binary else 'f64'}:{len(values)}:{base64.b64encode(content.tobytes()).decode()}"


@functools.lru_cache(maxsize=4096)
def unpack_rows(text: str) -> tuple[float, ...]:
    """Decode the text of `pack_rows`."""
    kind, count, data = text.split(":")
    content = np.frombuffer(base64.b64decode(data), dtype=np.uint8)
    if int(count) > 8 * content.size:
        raise ValueError(f"{count} outcomes in {content.size} bytes")
    values = np.unpackbits(content, count=int(count)).astype(float) if kind == "bits" else content.view("<f8")
    return tuple(values.tolist())


def constraint_margin(limit: Limit, outcome: TrialOutcome, confidence: float) -> IntervalEstimate | None:
    """Return the margin of a limit as a share of its bound: at least 0 meets it. None if it was not measured.

    The interval of a quality metric is paired with the baseline where the limit is relative. Its lower end is met with
    probability ``confidence``. Sizes and times have no interval.
    """
    final = outcome.measurement(FINAL, limit.metric)
    other = None if limit.of is None else outcome.measurement(BASELINE, limit.metric)
    if final is None or (limit.of is not None and (other is None or other.value == 0)):
        return None
    value = final.value if other is None else final.value / other.value
    # The lower end has the one-sided confidence of the goal, so the interval is two-sided with 2 c - 1.
    low, high = _interval(final, other, 2 * confidence - 1)
    estimate = IntervalEstimate(value, value if low is None else low, value if high is None else high)
    if limit.at_least is not None:
        return IntervalEstimate(*(_relative_margin(edge, limit.bound) for edge in estimate))
    edges = (estimate.value, estimate.high, estimate.low)
    return IntervalEstimate(*(-_relative_margin(edge, limit.bound) for edge in edges))


def _relative_margin(value: float, bound: float) -> float:
    return value / bound - 1 if bound else value


def _interval(final: Measurement, other: Measurement | None, confidence: float) -> tuple[float | None, float | None]:
    if not describe_metric(final.metric).quality:
        return None, None
    if other is not None:
        return paired_ratio_interval(final, other, confidence) or (None, None)
    if final.low is None or final.high is None:
        return None, None
    scale = NormalDist().inv_cdf((1 + confidence) / 2) / NormalDist().inv_cdf(0.975)
    value = final.value
    return value - (value - final.low) * scale, value + (final.high - value) * scale


def paired_difference(
    limit: Limit, first: TrialOutcome, second: TrialOutcome, confidence: float
) -> IntervalEstimate | None:
    """Return how much larger the margin of ``first`` is than that of ``second``, judged on the same rows.

    Args:
        limit: Limit on quality.
        first: Outcome of one recipe.
        second: Outcome of the other recipe.
        confidence: One-sided confidence of the interval.

    Returns:
        Difference as a share of the bound, as in `constraint_margin`; None where outcomes of rows are not stored.
    """
    above, below = (outcome.measurement(FINAL, limit.metric) for outcome in (first, second))
    if above is None or below is None or above.raw is None or below.raw is None or len(above.raw) != len(below.raw):
        return None
    # Gaps are scaled so that they are shares of the bound.
    scale = limit.bound
    if limit.of is not None:
        base = first.measurement(BASELINE, limit.metric)
        scale *= base.value if base is not None else 1.0
    if describe_metric(limit.metric).exponential:
        # The rows hold logarithms, whose differences are logarithms of ratios of the metric.
        scale = limit.bound
    if not scale:
        return None
    # A margin grows with the metric for a lower limit and shrinks for an upper one.
    sign = 1.0 if limit.at_least is not None else -1.0
    return mean_interval(sign * (np.asarray(above.raw) - np.asarray(below.raw)) / scale, confidence)


def mean_interval(values: NDArray[np.float64], confidence: float) -> IntervalEstimate:
    """Return the mean of rows, with an interval whose ends each have this one-sided confidence."""
    count, middle = len(values), float(values.mean())
    half = NormalDist().inv_cdf(confidence) * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return IntervalEstimate(middle, middle - half, middle + half)


_DISAGREEMENT = 0.1
"""Share of rows on which a compressed model and its baseline are assumed to differ before anything is measured."""


@dataclass(frozen=True)
class Goal:
    """Metrics to minimize and limits on the target that trials are measured on."""

    minimize: tuple[str, ...]
    limits: tuple[Limit, ...]
    confidence: float

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Goal:
        """Return the goal of a recipe. Raises `InputError` for a metric to minimize that is better the larger it is."""
        target, search = target_profile(recipe).name, recipe.search
        assert search is not None
        for metric in search.minimize:
            if describe_metric(metric).better == "higher":
                raise InputError(
                    f"{metric} is better the larger it is, so that it cannot be minimized.",
                    where="search.minimize",
                    expected="size_bytes, latency_ms, perplexity or the like; a metric that must stay high is a limit",
                    hint=f"limits: [{{metric: {metric}, at_least: 0.985, of: baseline}}]",
                )
        # Limits on other targets are checked by a run, and not by the search.
        limits = tuple(limit for limit in recipe.limits if limit.target == target)
        return cls(search.minimize, limits, search.confidence)

    def check_resolution(self, rows: int) -> None:
        """Raise `InputError` for a limit on accuracy that this number of rows cannot resolve."""
        z = NormalDist().inv_cdf(self.confidence)
        for limit in self.quality_limits:
            margin = 1 - limit.bound
            counted = limit.at_least is not None and limit.of is not None and "accuracy" in limit.metric
            if not counted or not 0 < margin < 1:
                continue
            # The mean of n paired differences of -1, 0 or 1 has a variance of the disagreement over n.
            needed = math.ceil(_DISAGREEMENT * (z / margin) ** 2)
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
        is_complete = all(metric in outcome.final for metric in self.minimize)
        return tuple(outcome.final[metric] for metric in self.minimize) if is_complete else None

    def margins(self, outcome: TrialOutcome) -> dict[str, IntervalEstimate | None]:
        """Return the margin of each limit by its name; None where it was not measured."""
        return {limit_name(limit): constraint_margin(limit, outcome, self.confidence) for limit in self.limits}

    def shortfalls(self, outcome: TrialOutcome) -> dict[str, float]:
        """Return by what share of its bound each limit is not met with confidence; at most 0 where it is."""
        return {name: math.inf if margin is None else -margin.low for name, margin in self.margins(outcome).items()}

    def meets_limits(self, outcome: TrialOutcome) -> bool:
        """Return whether every limit is met with the required confidence."""
        return outcome.error is None and all(short <= 1e-12 for short in self.shortfalls(outcome).values())


def limit_name(limit: Limit) -> str:
    """Return a name that distinguishes the limits of a recipe, such as `accuracy at least 0.97`."""
    return f"{limit.metric} {'at least' if limit.at_least is not None else 'at most'} {limit.bound:g}"


def target_profile(recipe: Recipe) -> TargetProfile:
    """Return the target that trials are measured on. Raises `InputError` for a target that the recipe lacks."""
    assert recipe.search is not None
    name, profiles = recipe.search.target, recipe.profiles()
    for profile in profiles:
        if name in (None, profile.name):
            return profile
    names = ", ".join(profile.name for profile in profiles)
    raise InputError(f"The recipe has no target {name!r}.", where="search.target", expected=f"one of {names}")


def is_dominated(values: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Return whether one of ``others`` is at most as large in every objective."""
    return any(all(b <= a for a, b in zip(values, other, strict=True)) for other in others)
