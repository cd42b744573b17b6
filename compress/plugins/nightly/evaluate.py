"""Judging one entry of a night: its own limits, and the gate against its baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.plugins.nightly.record import NightFinding
from compress.recipe.policy import Policy
from compress.report.compare.baseline import load_baseline
from compress.report.compare.change import MetricChange
from compress.report.compare.gate import GateResult, Judgement, judge_comparison
from compress.report.compare.reports import compare_reports
from compress.report.rows import limit_bound, limit_result
from compress.results.formatting import format_number, format_value
from compress.results.metrics import describe_metric
from compress.results.report import LimitResult, Report
from compress.utils.errors import CompressError


@dataclass(frozen=True)
class EntryEvaluation:
    """What is wrong with an entry that ran, and what it was judged by.

    ``accepted`` is when the baseline was measured: drift that is older was accepted with it.
    """

    findings: tuple[NightFinding, ...]
    notes: tuple[str, ...]
    policy: Policy
    accepted: str | None = None
    result: GateResult | None = None

    @property
    def summary(self) -> str:
        """What the gate made of it, in a few words."""
        if self.result is None:
            return "limits kept, no baseline to compare with"
        warned = len(self.result.having("warned"))
        known = f", {warned} of them not known" if warned else ""
        return f"{len(self.result.judgements)} metrics against the baseline{known}"


def evaluate_entry(entry: str, report: Report, baseline: Path | None, policy: Policy) -> EntryEvaluation:
    """Judge by the limits and against the ``baseline`` file; a missing one is a note, a bad one a finding."""
    findings = [_missed(entry, report, limit) for limit in report.missed]
    notes = [f"{skip.target} was skipped: {skip.reason}" for skip in report.skipped]
    if baseline is None or not baseline.is_file():
        place = (
            f"at {baseline.name} in the suite's baselines" if baseline else ": the suite names no folder of baselines"
        )
        notes.append(f"no baseline {place}; `compress gate RUN --baseline FILE --update` writes one")
        return EntryEvaluation(tuple(findings), tuple(notes), policy)
    try:
        before = load_baseline(baseline)
        comparison = compare_reports(before, report, policy, names=(baseline.name, f"{entry} tonight"))
    except CompressError as error:
        findings.append(NightFinding(entry=entry, kind="gate", what=f"cannot be compared with its baseline: {error}"))
        return EntryEvaluation(tuple(findings), tuple(notes), policy)
    result = judge_comparison(comparison, policy)
    findings += [_regressed(entry, judgement) for judgement in result.having("failed")]
    notes += _unknown(result.having("warned"))
    return EntryEvaluation(tuple(findings), (*notes, *comparison.notes), policy, before.started, result)


def _missed(entry: str, report: Report, limit: LimitResult) -> NightFinding:
    effect = None if limit.ratio is None else limit.ratio - 1
    what = f"missed its limit of {limit_bound(limit)}: found {limit_result(report, limit)}"
    return NightFinding(entry=entry, kind="limit", metric=limit.metric, target=limit.target, effect=effect, what=what)


def _regressed(entry: str, judgement: Judgement) -> NightFinding:
    change = judgement.change
    part = f"on the slice {judgement.slice}: " if judgement.slice else ""
    what = part + (_words(change, judgement) if change else judgement.reason)
    effect = change.effect if change else None
    return NightFinding(
        entry=entry, kind="gate", metric=judgement.metric, target=judgement.target, effect=effect, what=what
    )  # fmt: skip


def _words(change: MetricChange, judgement: Judgement) -> str:
    """`6.1% higher than the baseline (4.2% to 8.0%), where 5% is allowed: 0.98 ms → 1.04 ms`."""
    metric = describe_metric(change.metric, change.unit)
    direction = "higher" if change.effect > 0 else "lower"
    size = _size(change, abs(change.effect)).removeprefix("+")
    known = "" if change.confidence is None else f" ({_size(change, change.low)} to {_size(change, change.high)})"
    values = f"{format_value(metric, change.baseline)} \u2192 {format_value(metric, change.candidate)}"
    if change.verdict != "worse":
        return f"can't tell whether it got worse by {judgement.margin}{known}: {values}"
    return f"{size} {direction} than the baseline{known}, where {judgement.margin} is allowed: {values}"


def _size(change: MetricChange, effect: float) -> str:
    unit = " points" if change.scale == "absolute" else "%"
    return f"{'+' if effect > 0 else '-' if effect < 0 else ''}{format_number(abs(effect) * 100, 2)}{unit}"


def _unknown(judgements: tuple[Judgement, ...]) -> list[str]:
    """What can't be told, a line for each reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for judgement in judgements:
        part = f" on the slice {judgement.slice}" if judgement.slice else ""
        named = f"{judgement.metric}{part} ({judgement.margin})"
        grouped.setdefault((judgement.target, judgement.reason), []).append(named)
    return [
        f"can't tell on {target} whether these got worse by their margins: {', '.join(names)}"
        + (f"; {reason}" if reason else "")
        for (target, reason), names in grouped.items()
    ]
