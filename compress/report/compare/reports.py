"""Comparison of two reports, or of two models of one, metric by metric.

Two reports are paired by target and metric. Rows that only one of them has are listed as missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from compress.recipe.policy import Margin, Policy, comparison_policy, default_margin
from compress.report.compare import effects
from compress.report.compare.change import (
    ComparedModel,
    ComparedModels,
    Comparison,
    ContinuationChange,
    Flip,
    JudgedLimit,
    MetricChange,
    SliceChange,
    UncomparedMetric,
)
from compress.report.compare.effects import KernelRatio, MeasurementPair, slice_changes
from compress.report.compare.flips import find_answer_flips, find_flips
from compress.report.compare.machine_match import MachineDifferences, machine_differences, machine_summary
from compress.report.generated_outputs import pair_by_prompt
from compress.report.limits import unusable_machine
from compress.report.rows import NOTABLE_DIFFERENCE, limit_bound, limit_result, limit_state
from compress.results.metrics import Metric, context_of, describe_metric, slice_of, split_of
from compress.results.report import BASELINE, FINAL, MACHINE, Measurement, Report
from compress.utils.errors import InputError

REFERENCES = ("reference_matmul_ms", "reference_copy_ms")
"""Metrics of the model `machine`: reference kernels, timed beside the models."""
MOST_FLIPS = 100
"""Largest number of flips of either kind. The note of a paired change states how many there are."""
_ACCURACY = "accuracy"
_SLICED = (_ACCURACY, "exact_match")
"""Metrics whose outcomes are right or wrong for each row."""
_SLICE_MARGIN = Margin(0.02, relative=False)
_SHARPER = "times of different sessions: `compress compare --now` times both alternately, which is more precise"
_IN_TURNS = "changes of times are mean ratios of calls timed in turns, which can differ from the columns' quotient"
_CORRECTED = (
    "changes of times are divided by those of reference kernels timed in both sessions, so they differ from the "
    "columns' quotient"
)
_REUSED = "the same measurement: the timings were reused, --remeasure repeats them"


def _differs_from_columns(changes: tuple[MetricChange, ...]) -> bool:
    """Return whether the change of a time differs notably from the quotient of its two values."""
    timed = (
        change
        for change in changes
        if change.scale == "relative" and change.baseline > 0 and describe_metric(change.metric, change.unit).timed
    )
    quotients = ((1 + change.effect) * change.baseline / change.candidate for change in timed if change.candidate > 0)
    return any(abs(quotient - 1) > NOTABLE_DIFFERENCE for quotient in quotients)


def compare_reports(
    baseline: Report,
    candidate: Report,
    policy: Policy | None = None,
    *,
    names: tuple[str, str] = ("baseline", "candidate"),
    baseline_model: str | None = None,
    across_hosts: bool = False,
    folders: tuple[Path | None, Path | None] = (None, None),
) -> Comparison:
    """Compare the model ``policy.model`` of both reports, or ``baseline_model`` of the baseline with it.

    Two models of one report were measured in one session.

    Args:
        baseline: Report of the baseline.
        candidate: Report of the candidate.
        policy: Margins and confidences. Default: those of the metrics table.
        names: Names of both in messages and views.
        baseline_model: Model of the baseline's report, if it differs from ``policy.model``.
        across_hosts: Whether times from different machines get a verdict.
        folders: Folders of the runs, for the answers and texts of flips.

    Raises:
        InputError: A model is missing, or nothing was measured on both sides.
    """
    policy = policy or comparison_policy()
    baseline_model_name = baseline_model or policy.model
    for report, model, name in ((baseline, baseline_model_name, names[0]), (candidate, policy.model, names[1])):
        if model not in report.models:
            models = ", ".join(other for other in report.models if other != MACHINE) or "none: it is empty"
            raise InputError(f"There is no model {model!r} in this report.", where=name, expected=f"one of {models}")
    ways = _Ways(ComparedModels(baseline, candidate, baseline_model_name, policy.model, *folders), policy, across_hosts)
    compared = [ways.compare(metric, target) for target, metric in ways.metrics()]
    changes = tuple(result for result in compared if isinstance(result, MetricChange))
    if not changes:
        targets = ", ".join(policy.targets or dict.fromkeys((*baseline.targets, *candidate.targets))) or "none"
        raise InputError(
            "The two have no measurement in common.",
            where=f"{names[0]} ({baseline_model_name}) and {names[1]} ({policy.model})",
            expected=f"rows on one target: {targets}",
        )
    sides = zip((baseline, candidate), names, (baseline_model_name, policy.model), strict=True)
    compared_models = [
        ComparedModel(name=name, model=model, started=report.started, host=machine_summary(report.environment))
        for report, name, model in sides
    ]
    return Comparison(
        baseline=compared_models[0],
        candidate=compared_models[1],
        how="from reports",
        changes=changes,
        uncompared=tuple(result for result in compared if isinstance(result, UncomparedMetric)),
        slices=tuple(ways.slices(changes)),
        limits=tuple(ways.limits()),
        flips=ways.find_flips(changes),
        continuations=ways.continuations(),
        host_differences=ways.hosts.machine,
        notes=tuple(ways.notes(changes)),
    )


@dataclass
class _Ways:
    """Knows which way each metric of two reports can be compared."""

    sides: ComparedModels
    policy: Policy
    across_hosts: bool
    reused: bool = field(default=False, init=False)

    @cached_property
    def one_session(self) -> bool:
        """Return whether both are models of one report."""
        return self.sides.baseline is self.sides.candidate or self.sides.baseline == self.sides.candidate

    @property
    def one_model(self) -> bool:
        """Return whether both sides are one model of one run."""
        return self.one_session and self.sides.baseline_model == self.sides.candidate_model

    @cached_property
    def hosts(self) -> MachineDifferences:
        """Return the differences of the two machines."""
        if self.one_session:
            return MachineDifferences((), ())
        return machine_differences(self.sides.baseline.environment, self.sides.candidate.environment)

    def metrics(self) -> Iterator[tuple[str, str]]:
        """Yield (target, metric) of everything that either side has, without slices, which are compared separately."""
        sides = self.sides
        baseline, candidate = sides.baseline, sides.candidate
        # Metrics that compare with a run's own baseline, such as agreement, need the same baseline on both sides.
        if self.one_session:
            same_meaning = sides.baseline_model == self.policy.model
        else:
            same_meaning = (baseline.recipe, baseline.baseline) == (candidate.recipe, candidate.baseline)
        rows = [row for row in baseline.measurements if row.model == sides.baseline_model]
        rows += [row for row in candidate.measurements if row.model == sides.candidate_model]
        for target, metric in dict.fromkeys((row.target, row.metric) for row in rows):
            is_selected = not self.policy.targets or target in self.policy.targets
            is_slice = slice_of(metric) is not None and split_of(metric) is None
            if is_selected and not is_slice and (same_meaning or not describe_metric(metric).relative):
                yield target, metric

    def compare(self, metric: str, target: str) -> MetricChange | UncomparedMetric:
        """Return the change of one metric, or why there is none."""
        baseline, candidate = self.sides.rows(metric, target)
        if baseline is None or candidate is None:
            side, report = ("candidate", self.sides.candidate) if baseline else ("baseline", self.sides.baseline)
            skipped = next((skip.reason for skip in report.skipped if skip.target == target), None)
            reason = f"the target was skipped: {skipped}" if skipped else f"the {side} was not measured for it"
            lacks = side == "candidate" and skipped is None
            return UncomparedMetric(metric=metric, target=target, reason=reason, candidate_lacks=lacks)
        for row, side in ((baseline, "baseline"), (candidate, "candidate")):
            if not _is_finite(row):
                reason = f"the {side}'s {metric} or one of its samples is not finite"
                lacks = side == "candidate"
                return UncomparedMetric(metric=metric, target=target, reason=reason, candidate_lacks=lacks)
        described, rule = describe_metric(metric, candidate.unit), self.policy.rule(metric)
        margin = rule.margin if rule else default_margin(described.style == "percent")
        pair = MeasurementPair(baseline, candidate, margin)
        if not pair.is_share and baseline.value == 0 and candidate.value != 0:
            reason = "the baseline is 0, so there is no ratio to it"
            return UncomparedMetric(metric=metric, target=target, reason=reason)
        by_kind = self.policy.time_confidence if _varies(described) else self.policy.quality_confidence
        if self.one_model:
            return effects.exact_change(pair).model_copy(update={"identical": True})
        change = self._change(pair, described, (rule and rule.confidence) or by_kind)
        reports = (self.sides.baseline, self.sides.candidate)
        noisy = described.timed and any(unusable_machine(report.environment) for report in reports)
        return change.model_copy(update={"noisy": noisy})

    def limits(self) -> Iterator[JudgedLimit]:
        """Yield the limits that the candidate's report judged. Limits apply to the final model only."""
        report = self.sides.candidate
        words: dict[str, Literal["kept", "missed", "cannot tell"]] = {
            "passed": "kept", "missed": "missed", "unknown": "cannot tell"
        }  # fmt: skip
        for limit in report.judged if self.policy.model == FINAL else ():
            if not self.policy.targets or limit.target in self.policy.targets:
                yield JudgedLimit(
                    metric=limit.metric,
                    target=limit.target,
                    limit=limit_bound(limit),
                    verdict=words[limit_state(limit)],
                    result=limit_result(report, limit),
                    fails=limit.missed,
                )

    def _change(self, pair: MeasurementPair, metric: Metric, confidence: float) -> MetricChange:
        if metric.from_file:
            return effects.exact_change(pair)
        if _varies(metric):
            return self._time(pair, metric, confidence)
        if metric.style in ("bytes", "count"):
            rows = (pair.before, pair.after)
            exact = any(row.low is None or min(row.low, row.value) <= 0 for row in rows)
            # Memory hardly varies between sessions, but does with the machine.
            change = effects.exact_change(pair) if exact else effects.time_change(pair, confidence, 0.0, (), None)
            return self._bound_to_host(change)
        if effects.is_paired(pair) and self.sides.same_rows(pair.after.metric):
            return effects.paired_change(pair, confidence)
        if pair.before.low is None or pair.after.low is None:
            return effects.unjudged_change(pair, "no interval is stored with this value")
        same = self.sides.same_rows(pair.after.metric)
        reason = "stored without the outcomes of single examples" if same else "of different test data"
        return effects.unpaired_change(pair, confidence, f"not paired: {reason}")

    def _time(self, pair: MeasurementPair, metric: Metric, confidence: float) -> MetricChange:
        baseline, candidate = pair.before, pair.after
        figures = [(row.value, row.low, row.high) for row in (baseline, candidate)]
        if any(number is not None and number <= 0 for figure in figures for number in figure):
            return effects.unjudged_change(pair, "a time or rate that is not positive has no ratio")
        if self.one_session:
            if len(ratios := self._launch_ratios(pair)) > 1:
                return effects.launch_change(pair, ratios, confidence)
            note = "interleaved in one session, compared by their medians"
            return effects.time_change(pair, confidence, 0.0, (), note)
        if baseline.low is not None and figures[0] == figures[1]:
            self.reused = True
            return effects.exact_change(pair, _REUSED)
        references = self._references(pair, metric)
        unknown = None if references else "no reference kernel on both sides: the speed of the machine is unknown"
        change = effects.time_change(pair, confidence, self.policy.session_spread, references, unknown)
        noisy = [
            f"the {side}'s machine was too noisy ({reasons})"
            for side, report in (("baseline", self.sides.baseline), ("candidate", self.sides.candidate))
            if (reasons := unusable_machine(report.environment))
        ]
        return self._bound_to_host(effects.without_verdict(change, "; ".join(noisy)) if noisy else change)

    def _launch_ratios(self, pair: MeasurementPair) -> tuple[float, ...]:
        """Return baseline over candidate, one ratio for each launch, if the session kept them."""
        metric, name = pair.after.metric, ""
        if metric.startswith("latency_ms"):
            name = metric.replace("latency_ms", "speedup", 1)
        elif (context := context_of(metric)) and metric.startswith("time_"):
            name = f"speedup_{context[0].removesuffix('_ms')}_context_{context[1]}"
        if name and self.sides.baseline_model == BASELINE:
            speedup = self.sides.candidate.find(self.policy.model, name, pair.after.target)
            return (speedup and speedup.raw) or ()
        baseline, candidate = pair.before.raw or (), pair.after.raw or ()
        if metric in ("startup_ms", "session_load_ms") and len(baseline) == len(candidate):
            return tuple(a / b for a, b in zip(baseline, candidate, strict=True))
        return ()

    def _references(self, pair: MeasurementPair, metric: Metric) -> tuple[KernelRatio, ...]:
        """Return the ratios of the kernels that both sessions timed.

        Start-up resembles neither kernel, and a speed-up needs none.
        """
        if not (pair.after.metric.startswith(("latency", "time_")) or metric.style == "rate"):
            return ()
        ratios = []
        for name in REFERENCES:
            reports = (self.sides.baseline, self.sides.candidate)
            rows = [report.find(MACHINE, name, pair.after.target) for report in reports]
            usable = [row for row in rows if row is not None and _is_finite(row) and row.value > 0]
            if len(usable) == 2:
                ratios.append(effects.kernel_ratio(name, *usable))
        return tuple(ratios)

    def _bound_to_host(self, change: MetricChange) -> MetricChange:
        if not self.hosts.machine or self.across_hosts:
            return change
        return effects.without_verdict(change, f"measured on different machines ({'; '.join(self.hosts.machine)})")

    def slices(self, changes: tuple[MetricChange, ...]) -> Iterator[SliceChange]:
        """Yield the changes of each slice, wherever slices were compared."""
        for change in changes:
            if change.metric in _SLICED:
                rule = self.policy.slice_rule(change.metric)
                margin = (rule.margin if rule else _SLICE_MARGIN).of(change.baseline, relative=False)
                confidence = (rule and rule.confidence) or self.policy.quality_confidence
                yield from slice_changes(self.sides, change.target, margin or 0.0, confidence, metric=change.metric)

    def find_flips(self, changes: tuple[MetricChange, ...]) -> tuple[Flip, ...]:
        """Return examples, or instructions, that only one side gets right, on the first target."""
        for change in changes:
            if change.metric == _ACCURACY:
                return find_flips(self.sides, change.target, most=MOST_FLIPS)
        return find_answer_flips(self.sides, most=MOST_FLIPS)

    def continuations(self) -> tuple[ContinuationChange, ...]:
        """Return the continuations of both models after the same prompts, on the first target that has any."""
        sides = (self.sides.baseline, self.sides.baseline_model), (self.sides.candidate, self.policy.model)
        for target in self.policy.targets or self.sides.candidate.targets:
            records = (
                [record for record in report.continuations if (record.model, record.target) == (model, target)]
                for report, model in sides
            )
            if pairs := pair_by_prompt(*records):
                return tuple(
                    ContinuationChange(
                        target=target, prompt=pair.prompt, baseline=pair.baseline.text, candidate=pair.final.text,
                        same=pair.same, parting=pair.parting,
                    )
                    for pair in pairs
                )  # fmt: skip
        return ()

    def notes(self, changes: tuple[MetricChange, ...]) -> Iterator[str]:
        """Yield notes on the comparison as a whole."""
        if not self.one_session:
            yield from self._notes_on_sessions(changes)
            return
        if self.one_model:
            yield "both sides are the same run"
        if noise := unusable_machine(self.sides.candidate.environment):
            yield f"the machine was too noisy for precise times, although ratios of calls in turns hold: {noise}"
        if _differs_from_columns(changes):
            yield _IN_TURNS

    def _notes_on_sessions(self, changes: tuple[MetricChange, ...]) -> Iterator[str]:
        """Yield notes on the comparison of two runs."""
        baseline, candidate = self.sides.baseline, self.sides.candidate
        if baseline.recipe != candidate.recipe:
            yield (
                f"from different recipes: {baseline.recipe} and {candidate.recipe}; `compress diff` shows the fields "
                "that differ"
            )
        if not self.sides.same_rows():
            yield "evaluated on different test data: examples cannot be paired"
        elif baseline.data is None or candidate.data is None:
            yield "a report does not identify its test data: equal data is assumed if the numbers of rows are equal"
        yield from (f"software differs: {difference}" for difference in self.hosts.software)
        if self.hosts.machine and self.across_hosts:
            yield f"times are compared across machines, as requested: {'; '.join(self.hosts.machine)}"
        if _differs_from_columns(changes):
            yield _CORRECTED
        if self.reused:
            yield f"times are {_REUSED}"
        elif any(_varies(describe_metric(change.metric, change.unit)) and self._matters(change) for change in changes):
            yield _SHARPER

    def _matters(self, change: MetricChange) -> bool:
        """Return whether the policy has a rule for the change, or none that would choose among the metrics."""
        return not self.policy.rules or self.policy.rule(change.metric) is not None


def _varies(metric: Metric) -> bool:
    """Return whether a metric is a time, a rate or an energy, but not a factor such as the real-time factor."""
    return metric.style in ("milliseconds", "rate", "times") or metric.unit in ("J", "W", "s")


def _is_finite(row: Measurement) -> bool:
    numbers = (row.value, row.low or 0.0, row.high or 0.0, *(row.raw or ()))
    return all(map(math.isfinite, numbers))
