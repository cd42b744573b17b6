"""Slow drift and steps over weeks: the current level compared with the best one since the baseline was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from compress.plugins.nightly.record import Night, NightFinding
from compress.plugins.nightly.trend import TIMES, Series, TrendLevel
from compress.recipe.policy import Policy

MACHINE = "machine"
REFERENCE = "reference_"


@dataclass(frozen=True)
class MetricDrift:
    """Change of a series' level for the worse.

    Attributes:
        series: Series that changed.
        best: Best level since the baseline was written.
        now: Current level.
        steps: Number of level changes between the two.
        effect: Change from ``best`` to ``now``.
        net: The same change without the part that the machine's speed explains.
        machine: Change of the time of the reference kernel, None if it was not timed at both levels.
        margin: Largest change that the policy allows.
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
        """Return whether the change exceeds the margin when the machine's part is left out."""
        return self.series.loss(self.net) >= self.margin

    @property
    def first(self) -> int:
        """Number of the night that began it."""
        return self.series.usable[self.best.last + 1].night


def find_drifts(series: Sequence[Series], policy: Policy, accepted: str | None, night: Night) -> list[MetricDrift]:
    """Return the drifts of one entry at ``night``.

    Series without a measurement of ``night`` are left out, and so those of other hosts.

    Args:
        series: All series of the entry.
        policy: Metrics to judge and their margins.
        accepted: Time at which the entry's baseline was measured. Changes before it were accepted with it.
        night: Night to judge.
    """
    drifts = []
    since = None if accepted is None else datetime.fromisoformat(accepted)
    for line in series:
        rule = policy.rule(line.metric)
        # Only series that tonight added a point to are judged.
        measured = bool(line.usable) and line.usable[-1].night == night.number
        judged = line.model == policy.model and (not policy.targets or line.target in policy.targets)
        if rule is None or not measured or not judged or line.described.better == "unknown":
            continue
        # Levels that ended before the baseline was measured were accepted with it.
        ends = [datetime.fromisoformat(line.usable[level.last].started) for level in line.levels]
        levels = [level for level, end in zip(line.levels, ends, strict=True) if since is None or end >= since]
        if len(levels) < 2:
            continue
        # Compare with the best level since the baseline, so that several small steps add up.
        losses = [line.loss(line.effect(levels[0].value, level.value)) for level in levels]
        best, now = levels[losses.index(min(losses))], levels[-1]
        effect = line.effect(best.value, now.value)
        margin = rule.margin.of(best.value, relative=not line.is_share)
        if margin is None or line.loss(effect) <= 0 or line.loss(effect) < margin:
            continue
        # A slower machine multiplies times and divides rates by the change of the reference kernel. Remove that factor.
        machine = _machine_change(series, line, best, now)
        net = effect
        if machine is not None:
            scaled = (1 + effect) / (1 + machine) if line.described.better == "lower" else (1 + effect) * (1 + machine)
            net = scaled - 1
        steps = levels.index(now) - levels.index(best)
        drifts.append(MetricDrift(line, best, now, steps, effect, net, machine, margin))
    return drifts


def drift_finding(drift: MetricDrift, series: Sequence[Series], nights: Mapping[int, Night]) -> NightFinding:
    """Return the drift as a finding that names what else changed with it.

    Args:
        drift: Drift to describe.
        series: All series of the entry.
        nights: Nights by number.
    """
    line = drift.series
    verb = "changed" if drift.steps == 1 else f"drifted in {drift.steps} steps"
    words = [f"the level {verb} by {line.written(drift.effect)}"]
    if drift.machine is not None:
        words.append(f"{line.written(drift.net)} after the change of the machine's own speed")
    # No stage changes the starting model. If it moved in the same direction, the cause lies elsewhere.
    for other in series:
        if (other.model, other.metric, other.target, other.host) == ("baseline", line.metric, line.target, line.host):
            change = _change_between_levels(other, line, drift.best, drift.now)
            if change is not None and line.loss(change) >= drift.margin / 2:
                size = line.written(change)
                words.append(f"the baseline model changed by {size} too, so check the runtime or the machine")
    words += changes_on_night(nights, line.entry, drift.first)
    return NightFinding(
        entry=line.entry,
        kind="drift",
        metric=line.metric,
        target=line.target,
        effect=drift.effect,
        what="; ".join(words),
        since=night_label(nights, drift.first),
    )


def night_label(nights: Mapping[int, Night], number: int) -> str:
    """Return the label of a night, or its number if it is not among ``nights``."""
    return nights[number].label if number in nights else f"night {number}"


def _machine_change(series: Sequence[Series], line: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """Return the largest change of a reference kernel's time.

    None if the metric does not depend on machine load, or if no kernel was timed at both levels."""
    if line.described.style not in TIMES:
        return None
    # Reference kernels are measured with every benchmark and depend on the machine alone.
    changes = [
        _change_between_levels(other, line, best, now)
        for other in series
        if other.model == MACHINE and other.metric.startswith(REFERENCE) and other.host == line.host
    ]
    return max((change for change in changes if change is not None), key=abs, default=None)


def _change_between_levels(other: Series, line: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """Return the change of another series between the nights of two levels; None without a night in either."""
    medians = []
    for level in (best, now):
        # Take the other series' points of the same nights as the level.
        nights = {point.night for point in line.usable[level.first : level.last + 1]}
        values = [point.value for point in other.usable if point.night in nights]
        if not values:
            return None
        medians.append(median(values))
    return other.effect(*medians)


def changes_on_night(nights: Mapping[int, Night], entry: str, first: int) -> Iterator[str]:
    """Yield what else changed in night ``first``: recipe, packages, kernel."""
    after = nights.get(first)
    earlier = [
        night
        for number, night in nights.items()
        if after and number < first and night.host == after.host and _outcome_digest(night, entry)
    ]
    if after is None or not earlier:
        return
    # Compare with the last earlier night on the same host that ran the entry.
    previous = max(earlier, key=lambda night: night.number)
    if _outcome_digest(previous, entry) != _outcome_digest(after, entry):
        yield "the recipe was changed"
    for name in sorted(previous.software.keys() | after.software.keys()):
        old, new = previous.software.get(name), after.software.get(name)
        if old != new:
            yield f"{name} {old or 'none'} \u2192 {new or 'none'}"


def _outcome_digest(night: Night, entry: str) -> str:
    outcome = night.outcome(entry)
    return outcome.recipe_digest if outcome else ""
