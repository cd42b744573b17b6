"""Findings of slow drifts and steps in the measurements of many nights.

A series of measurements consists of constant levels (`compress.plugins.nightly.trend`). Its current level is compared
with the best one since the baseline was written, so that several changes that are too small for a gate add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from compress.plugins.nightly.record import Night, NightFinding
from compress.plugins.nightly.trend import TIMES, Series, TrendLevel
from compress.recipe.policy import Policy

MACHINE = "machine"
"""Name of the model of series that measure the machine itself."""
REFERENCE = "reference_"
"""Beginning of the names of metrics that are times of reference kernels, which depend on the machine only."""


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
        """Return whether the change for the worse reaches the margin without the part that the machine explains."""
        return self.series.loss(self.net) >= self.margin

    @property
    def first(self) -> int:
        """Number of the first night after the best level."""
        return self.series.usable[self.best.last + 1].night


def find_drifts(series: Sequence[Series], policy: Policy, accepted: str | None, night: Night) -> list[MetricDrift]:
    """Return the drifts of one entry, a recipe that runs every night, at ``night``.

    Series without a measurement of ``night`` are left out, and so are those of other hosts: a night has one host.

    Args:
        series: All series of the entry.
        policy: Metrics to judge and their margins.
        accepted: Time at which the entry's baseline was measured. Changes before it were accepted with it.
        night: Night to judge.
    """
    drifts = []
    since = None if accepted is None else datetime.fromisoformat(accepted)
    for candidate in series:
        rule = policy.rule(candidate.metric)
        # Only series to which this night added a point are judged.
        is_measured = bool(candidate.usable) and candidate.usable[-1].night == night.number
        in_policy = candidate.model == policy.model and (not policy.targets or candidate.target in policy.targets)
        if rule is None or not is_measured or not in_policy or candidate.described.better == "unknown":
            continue
        # Levels that ended before the baseline was measured were accepted with it.
        ends = [datetime.fromisoformat(candidate.usable[level.last].started) for level in candidate.levels]
        levels = [level for level, end in zip(candidate.levels, ends, strict=True) if since is None or end >= since]
        if len(levels) < 2:
            continue
        # Compare with the best level since the baseline, so that several small steps add up.
        losses = [candidate.loss(candidate.effect(levels[0].value, level.value)) for level in levels]
        best, now = levels[losses.index(min(losses))], levels[-1]
        effect = candidate.effect(best.value, now.value)
        margin = rule.margin.of(best.value, relative=not candidate.is_share)
        if margin is None or candidate.loss(effect) <= 0 or candidate.loss(effect) < margin:
            continue
        # A slower machine multiplies times and divides rates by the change of the reference kernel. Remove that factor.
        machine = _machine_change(series, candidate, best, now)
        better, net = candidate.described.better, effect
        if machine is not None:
            ratio = (1 + effect) / (1 + machine) if better == "lower" else (1 + effect) * (1 + machine)
            net = ratio - 1
        steps = levels.index(now) - levels.index(best)
        drifts.append(MetricDrift(candidate, best, now, steps, effect, net, machine, margin))
    return drifts


def drift_finding(drift: MetricDrift, series: Sequence[Series], nights: Mapping[int, Night]) -> NightFinding:
    """Return the drift as a finding that names what else changed with it.

    Args:
        drift: Drift to describe.
        series: All series of the entry.
        nights: Nights by number.
    """
    drifted, verb = drift.series, "changed" if drift.steps == 1 else f"drifted in {drift.steps} steps"
    clauses = [f"the level {verb} by {drifted.written(drift.effect)}"]
    if drift.machine is not None:
        clauses.append(f"{drifted.written(drift.net)} after the change of the machine's own speed")
    # No stage changes the baseline model. If it became worse too, the cause lies outside the recipe's stages.
    baseline_key = "baseline", drifted.metric, drifted.target, drifted.host
    for other in series:
        if (other.model, other.metric, other.target, other.host) == baseline_key:
            change = _change_between_levels(other, drifted, drift.best, drift.now)
            if change is not None and drifted.loss(change) >= drift.margin / 2:
                change_text = drifted.written(change)
                clauses.append(f"the baseline model changed by {change_text} too, so check the runtime or the machine")
    clauses += changes_on_night(nights, drifted.entry, drift.first)
    return NightFinding(
        entry=drifted.entry,
        kind="drift",
        metric=drifted.metric,
        target=drifted.target,
        effect=drift.effect,
        what="; ".join(clauses),
        since=night_label(nights, drift.first),
    )


def night_label(nights: Mapping[int, Night], number: int) -> str:
    """Return the label of a night, or its number if it is not among ``nights``."""
    return nights[number].label if number in nights else f"night {number}"


def _machine_change(series: Sequence[Series], drifted: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """Return the largest change of a reference kernel's time.

    Returns None if the metric does not depend on machine load, or if no kernel was timed at both levels.
    """
    if drifted.described.style not in TIMES:
        return None
    # Reference kernels are measured with every benchmark and depend on the machine alone.
    changes = [
        _change_between_levels(other, drifted, best, now)
        for other in series
        if other.model == MACHINE and other.metric.startswith(REFERENCE) and other.host == drifted.host
    ]
    return max((change for change in changes if change is not None), key=abs, default=None)


def _change_between_levels(other: Series, drifted: Series, best: TrendLevel, now: TrendLevel) -> float | None:
    """Return the change of ``other`` from the nights of level ``best`` of a drifted series to those of ``now``.

    Returns None if ``other`` has no measurement in the nights of one of the levels.
    """
    medians = []
    for level in (best, now):
        # Take the other series' points of the same nights as the level.
        nights = {point.night for point in drifted.usable[level.first : level.last + 1]}
        values = [point.value for point in other.usable if point.night in nights]
        if not values:
            return None
        medians.append(median(values))
    return other.effect(*medians)


def changes_on_night(nights: Mapping[int, Night], entry: str, first: int) -> Iterator[str]:
    """Yield what else changed in night ``first``: the recipe, and versions of packages and of the kernel."""
    after = nights.get(first)
    earlier = [
        night
        for number, night in nights.items()
        if after and number < first and night.host == after.host and _recipe_digest(night, entry)
    ]
    if after is None or not earlier:
        return
    # Compare with the last earlier night on the same host that ran the entry.
    previous = max(earlier, key=lambda night: night.number)
    if _recipe_digest(previous, entry) != _recipe_digest(after, entry):
        yield "the recipe was changed"
    for name in sorted(previous.software.keys() | after.software.keys()):
        old, new = previous.software.get(name), after.software.get(name)
        if old != new:
            yield f"{name} {old or 'none'} \u2192 {new or 'none'}"


def _recipe_digest(night: Night, entry: str) -> str:
    # A night without the entry has no digest.
    outcome = night.outcome(entry)
    return outcome.recipe_digest if outcome else ""
