"""Slow drift and steps over weeks: the level of tonight against the best one since the baseline was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

from compress.plugins.nightly.record import Night, NightFinding
from compress.plugins.nightly.trend import TIMES, Series, TrendLevel
from compress.recipe.policy import Policy

MACHINE = "machine"
REFERENCE = "reference_"
BASELINE = "baseline"


@dataclass(frozen=True)
class MetricDrift:
    """A series whose level got worse by ``effect`` from ``best`` to ``now``, by ``net`` after what the machine did.

    ``machine`` is how much longer the reference kernel takes now, None where it was not timed on both sides.
    """

    series: Series
    best: TrendLevel
    now: TrendLevel
    steps: int
    effect: float
    net: float
    machine: float | None
    margin: float

    @property
    def fails(self) -> bool:
        """Whether it matters, the machine's own share left out."""
        return self.series.loss(self.net) >= self.margin

    @property
    def first(self) -> int:
        """Number of the night that began it."""
        return self.series.usable[self.best.last + 1].night


def find_drifts(series: Sequence[Series], policy: Policy, accepted: str | None, night: Night) -> list[MetricDrift]:
    """The drifts of one entry's ``series`` at ``night``, by the rules of ``policy``.

    A change that is older than ``accepted``, the time at which the entry's baseline was measured, was accepted with
    it. Series that ``night`` added nothing to, and so those of other hosts, are left alone.
    """
    found = []
    for one in series:
        rule = policy.rule(one.metric)
        due = bool(one.usable) and one.usable[-1].night == night.number
        judged = one.model == policy.model and (not policy.targets or one.target in policy.targets)
        if rule is None or not due or not judged or one.described.better == "unknown":
            continue
        since = None if accepted is None else datetime.fromisoformat(accepted)
        ends = [datetime.fromisoformat(one.usable[level.last].started) for level in one.levels]
        levels = [level for level, end in zip(one.levels, ends, strict=True) if since is None or end >= since]
        if len(levels) < 2:
            continue
        best = min(levels, key=lambda level: one.loss(one.effect(levels[0].value, level.value)))
        now = levels[-1]
        effect = one.effect(best.value, now.value)
        margin = rule.margin.of(best.value, relative=not one.is_share)
        if margin is None or one.loss(effect) <= 0 or one.loss(effect) < margin:
            continue
        machine = _machine(series, one, best, now)
        net = (1 + effect) / (1 + machine) - 1 if machine is not None and one.described.better == "lower" else effect
        if machine is not None and one.described.better == "higher":
            net = (1 + effect) * (1 + machine) - 1
        steps = levels.index(now) - levels.index(best)
        found.append(MetricDrift(one, best, now, steps, effect, net, machine, margin))
    return found


def drift_finding(drift: MetricDrift, series: Sequence[Series], nights: Mapping[int, Night]) -> NightFinding:
    """The drift as a finding that names what changed with it."""
    one = drift.series
    how = "changed" if drift.steps == 1 else f"drifted in {drift.steps} steps"
    words = [f"the level {how} by {one.written(drift.effect)}"]
    if drift.machine is not None:
        words.append(f"{one.written(drift.net)} after what the machine's own speed changed")
    words += _companions(series, drift)
    words += changes_on_night(nights, one.entry, drift.first)
    return NightFinding(
        entry=one.entry,
        kind="drift",
        metric=one.metric,
        target=one.target,
        effect=drift.effect,
        what="; ".join(words),
        since=nights[drift.first].label if drift.first in nights else f"night {drift.first}",
    )


def _machine(series: Sequence[Series], one: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """How much longer the reference kernels take, of a time or a rate; the largest where there are several."""
    if one.described.style not in TIMES:
        return None
    changes = [
        change
        for other in series
        if other.model == MACHINE and other.metric.startswith(REFERENCE) and other.host == one.host
        for change in [_alongside(other, one, best, now)]
        if change is not None
    ]
    return max(changes, key=abs, default=None)


def _alongside(other: Series, one: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """The change of another series between the nights of the two levels; None without a night in either."""
    sides = []
    for level in (best, now):
        nights = {point.night for point in one.usable[level.first : level.last + 1]}
        values = [point.value for point in other.usable if point.night in nights]
        if not values:
            return None
        sides.append(median(values))
    return other.effect(*sides)


def _companions(series: Sequence[Series], drift: MetricDrift) -> Iterator[str]:
    """Whether the starting model, which nobody compresses, went the same way."""
    one = drift.series
    for other in series:
        if (other.model, other.metric, other.target, other.host) == (BASELINE, one.metric, one.target, one.host):
            change = _alongside(other, one, drift.best, drift.now)
            if change is not None and one.loss(change) >= drift.margin / 2:
                yield f"the baseline model moved by {one.written(change)} too, so look at the runtime or the machine"


def changes_on_night(nights: Mapping[int, Night], entry: str, first: int) -> Iterator[str]:
    """What else was new that night: recipe, packages, kernel."""
    after = nights.get(first)
    earlier = [
        night
        for number, night in nights.items()
        if after and number < first and night.host == after.host and _outcome_digest(night, entry)
    ]
    if after is None or not earlier:
        return
    before = max(earlier, key=lambda night: night.number)
    if _outcome_digest(before, entry) != _outcome_digest(after, entry):
        yield "the recipe was changed"
    for name in sorted(before.software.keys() | after.software.keys()):
        old, new = before.software.get(name), after.software.get(name)
        if old != new:
            yield f"{name} {_or_none(old)} \u2192 {_or_none(new)}"


def _outcome_digest(night: Night, entry: str) -> str:
    return next((outcome.recipe_digest for outcome in night.outcomes if outcome.entry == entry), "")


def _or_none(value: Any) -> str:
    return "none" if value is None else str(value)
