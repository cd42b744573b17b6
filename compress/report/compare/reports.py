"""Comparing two stored reports, or two models of one, metric by metric."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compress.recipe.policy import Margin, Policy, comparison_policy, default_margin
from compress.report.compare import effects
from compress.report.compare.change import Change, Comparison, Flip, Side, SideBySide, Sides, SliceChange, Uncompared
from compress.report.compare.effects import Pair, Reference
from compress.report.compare.flips import answer_flips, flips
from compress.report.compare.machine_match import HostDifferences, host_differences, host_words
from compress.report.compare.slices import slice_changes
from compress.report.continuations import side_by_side
from compress.report.limits import unfit_machine
from compress.results.measurement import MACHINE, Measurement
from compress.results.metrics import Metric, context_of, describe_metric, slice_of, split_of
from compress.results.report import BASELINE, Report
from compress.utils.errors import InputError

REFERENCES = ("reference_matmul_ms", "reference_copy_ms")
"""Rows of the model `machine`: fixed kernels, timed alongside."""
MOST_FLIPS = 100
"""Of either kind; the note of a paired change gives their number."""
_ACCURACY = "accuracy"
_SLICED = (_ACCURACY, "exact_match")
"""What is right or wrong row by row."""
_SLICE_MARGIN = Margin(0.02, relative=False)
_SHARPER = "times of different sessions: `compress compare --now` measures both side by side, which is sharper"
_REUSED = "one and the same measurement: the timings were reused, --remeasure takes new ones"


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
    """Compare the model ``policy.model`` of both, or ``baseline_model`` of the baseline with it.

    Two models of one report are rows of one session. Times from different machines get no verdict unless
    ``across_hosts``. The runs' ``folders`` give the answers and texts of examples that flipped. Raises `InputError`
    where a model is missing or nothing was measured on both sides.
    """
    policy = policy or comparison_policy()
    before = baseline_model or policy.model
    for report, model, name in ((baseline, before, names[0]), (candidate, policy.model, names[1])):
        _require(report, model, name)
    ways = _Ways(Sides(baseline, candidate, before, policy.model, *folders), policy, across_hosts)
    compared = [ways.compare(metric, target) for target, metric in ways.metrics()]
    changes = tuple(found for found in compared if isinstance(found, Change))
    if not changes:
        targets = ", ".join(policy.targets or dict.fromkeys((*baseline.targets, *candidate.targets))) or "none"
        raise InputError(
            "The two have no measurement in common.",
            where=f"{names[0]} ({before}) and {names[1]} ({policy.model})",
            expected=f"rows on one target: {targets}",
        )
    return Comparison(
        baseline=_side(baseline, names[0], before),
        candidate=_side(candidate, names[1], policy.model),
        how="from reports",
        changes=changes,
        uncompared=tuple(found for found in compared if isinstance(found, Uncompared)),
        slices=tuple(ways.slices(changes)),
        flips=ways.flips(changes),
        continuations=ways.continuations(),
        host_differences=ways.hosts.machine,
        notes=tuple(ways.notes(changes)),
    )


def _require(report: Report, model: str, name: str) -> None:
    if model in report.models:
        return
    known = ", ".join(found for found in report.models if found != MACHINE)
    raise InputError(
        f"There is no model {model!r} in this report.", where=name, expected=f"one of {known or 'none: it is empty'}"
    )


def _side(report: Report, name: str, model: str) -> Side:
    return Side(name=name, model=model, started=report.started, host=host_words(report.environment))


@dataclass
class _Ways:
    """Knows which way each metric of two reports can be compared."""

    sides: Sides
    policy: Policy
    across_hosts: bool
    reused: bool = field(default=False, init=False)

    @cached_property
    def one_session(self) -> bool:
        """Whether both are models of one report."""
        return self.sides.baseline is self.sides.candidate or self.sides.baseline == self.sides.candidate

    @cached_property
    def hosts(self) -> HostDifferences:
        """How the two machines differ."""
        if self.one_session:
            return HostDifferences((), ())
        return host_differences(self.sides.baseline.environment, self.sides.candidate.environment)

    def metrics(self) -> Iterator[tuple[str, str]]:
        """(target, metric) of everything that either side has, slices apart: those are compared by themselves."""
        both = self.sides
        rows = [row for row in both.baseline.measurements if row.model == both.baseline_model]
        rows += [row for row in both.candidate.measurements if row.model == both.candidate_model]
        for target, metric in dict.fromkeys((row.target, row.metric) for row in rows):
            wanted = not self.policy.targets or target in self.policy.targets
            apart = slice_of(metric) is not None and split_of(metric) is None
            if wanted and not apart and not (describe_metric(metric).relative and self._own_baselines()):
                yield target, metric

    def _own_baselines(self) -> bool:
        """Whether agreement and speed-up, which compare with a run's own baseline, mean different things here."""
        old, new = self.sides.baseline, self.sides.candidate
        if self.one_session:
            return self.sides.baseline_model != self.policy.model
        return (old.recipe, old.baseline) != (new.recipe, new.baseline)

    def compare(self, metric: str, target: str) -> Change | Uncompared:
        """The change of one metric, or why there is none."""
        before, after = self.sides.rows(metric, target)
        if before is None or after is None:
            return self._absent(metric, target, before is None)
        for row, side in ((before, "baseline"), (after, "candidate")):
            if not _is_finite(row):
                reason = f"the {side}'s {metric} is no finite number, or holds samples that are none"
                return Uncompared(metric=metric, target=target, reason=reason, candidate_lacks=side == "candidate")
        known = describe_metric(metric, after.unit)
        rule = self.policy.rule(metric)
        pair = Pair(before, after, rule.margin if rule else default_margin(known.style == "percent"))
        if not pair.is_share and before.value == 0 and after.value != 0:
            return Uncompared(metric=metric, target=target, reason="the baseline is 0, so there is no ratio to it")
        by_kind = self.policy.time_confidence if _varies(known) else self.policy.quality_confidence
        return self._change(pair, known, (rule and rule.confidence) or by_kind)

    def _change(self, pair: Pair, known: Metric, confidence: float) -> Change:
        if known.from_file:
            return effects.exact_change(pair)
        if _varies(known):
            return self._time(pair, known, confidence)
        if known.style in ("bytes", "count"):
            exact = pair.before.low is None or pair.after.low is None or pair.before.value * pair.after.value <= 0
            # Memory hardly varies between sessions, but does with the machine.
            change = effects.exact_change(pair) if exact else effects.time_change(pair, confidence, 0.0, (), None)
            return self._bound_to_host(change)
        if effects.is_paired(pair) and self.sides.same_rows(pair.after.metric):
            return effects.paired_change(pair, confidence)
        if pair.before.low is None or pair.after.low is None:
            return effects.unjudged_change(pair, "no interval is kept with this figure")
        same = self.sides.same_rows(pair.after.metric)
        apart = "kept without the outcomes of single examples" if same else "of different test data"
        return effects.unpaired_change(pair, confidence, f"not paired: {apart}")

    def _time(self, pair: Pair, known: Metric, confidence: float) -> Change:
        before, after = pair.before, pair.after
        if before.value <= 0 or after.value <= 0:
            return effects.unjudged_change(pair, "a time or rate that is not positive has no ratio")
        if self.one_session:
            return self._time_of_one_session(pair, confidence)
        if (before.value, before.low, before.high) == (after.value, after.low, after.high) and before.low is not None:
            self.reused = True
            return effects.exact_change(pair, _REUSED)
        references = self._references(pair, known)
        note = None if references else "no reference kernel on both sides: how fast the machine was is not known"
        change = effects.time_change(pair, confidence, self.policy.session_spread, references, note)
        return self._bound_to_host(self._bound_to_noise(change))

    def _time_of_one_session(self, pair: Pair, confidence: float) -> Change:
        ratios = self._launch_ratios(pair)
        if len(ratios) > 1:
            return effects.launch_change(pair, ratios, confidence)
        return effects.time_change(
            pair, confidence, 0.0, (), "taken in turns in one session, compared by their medians"
        )

    def _launch_ratios(self, pair: Pair) -> tuple[float, ...]:
        """Baseline over candidate, one a launch, where the session kept them."""
        metric, name = pair.after.metric, ""
        if metric.startswith("latency_ms"):
            name = metric.replace("latency_ms", "speedup", 1)
        elif (generated := context_of(metric)) and metric.startswith("time_"):
            name = f"speedup_{generated[0].removesuffix('_ms')}_context_{generated[1]}"
        if name and self.sides.baseline_model == BASELINE:
            speedup = self.sides.candidate.find(self.policy.model, name, pair.after.target)
            return (speedup and speedup.raw) or ()
        before, after = pair.before.raw or (), pair.after.raw or ()
        if metric in ("startup_ms", "session_load_ms") and len(before) == len(after):
            return tuple(a / b for a, b in zip(before, after, strict=True))
        return ()

    def _references(self, pair: Pair, known: Metric) -> tuple[Reference, ...]:
        """The kernels that both sessions timed; start-up is like neither, and a speed-up needs none."""
        if not (pair.after.metric.startswith(("latency", "time_")) or known.style == "rate"):
            return ()
        found = []
        for name in REFERENCES:
            reports = (self.sides.baseline, self.sides.candidate)
            rows = [report.find(MACHINE, name, pair.after.target) for report in reports]
            usable = [row for row in rows if row is not None and _is_finite(row) and row.value > 0]
            if len(usable) == 2:
                found.append(effects.reference(name, *usable))
        return tuple(found)

    def _bound_to_host(self, change: Change) -> Change:
        if not self.hosts.machine or self.across_hosts:
            return change
        return effects.withhold(change, f"measured on different machines ({'; '.join(self.hosts.machine)})")

    def _bound_to_noise(self, change: Change) -> Change:
        noisy = [
            f"the {side}'s machine was too noisy ({reasons})"
            for side, report in (("baseline", self.sides.baseline), ("candidate", self.sides.candidate))
            if (reasons := unfit_machine(report.environment))
        ]
        return effects.withhold(change, "; ".join(noisy)) if noisy else change

    def _absent(self, metric: str, target: str, baseline_lacks: bool) -> Uncompared:
        side = "baseline" if baseline_lacks else "candidate"
        report = self.sides.baseline if baseline_lacks else self.sides.candidate
        skipped = next((skip.reason for skip in report.skipped if skip.target == target), None)
        reason = f"the target was skipped: {skipped}" if skipped else f"the {side} was not measured for it"
        lacks = not baseline_lacks and skipped is None
        return Uncompared(metric=metric, target=target, reason=reason, candidate_lacks=lacks)

    def slices(self, changes: tuple[Change, ...]) -> Iterator[SliceChange]:
        """What is right in each part of the data, wherever that was compared."""
        for change in changes:
            if change.metric in _SLICED:
                rule = self.policy.slice_rule(change.metric)
                margin = (rule.margin if rule else _SLICE_MARGIN).of(change.baseline, relative=False)
                confidence = (rule and rule.confidence) or self.policy.quality_confidence
                yield from slice_changes(self.sides, change.target, margin or 0.0, confidence, metric=change.metric)

    def flips(self, changes: tuple[Change, ...]) -> tuple[Flip, ...]:
        """Examples, or instructions, that one side gets right and the other wrong, on the first target."""
        target = next((change.target for change in changes if change.metric == _ACCURACY), None)
        if target is None:
            return answer_flips(self.sides, most=MOST_FLIPS)
        return flips(self.sides, target, most=MOST_FLIPS)

    def continuations(self) -> tuple[SideBySide, ...]:
        """What both wrote after the same prompts, on the first target that has any."""
        both, models = (self.sides.baseline, self.sides.candidate), (self.sides.baseline_model, self.policy.model)
        for target in self.policy.targets or both[1].targets:
            told = (
                [one for one in report.continuations if (one.model, one.target) == (model, target)]
                for report, model in zip(both, models, strict=True)
            )
            if pairs := side_by_side(*told):
                texts = ((pair.prompt, pair.baseline.text, pair.final.text, pair.same, pair.parting) for pair in pairs)
                names = ("prompt", "baseline", "candidate", "same", "parting")
                return tuple(SideBySide(target=target, **dict(zip(names, text, strict=True))) for text in texts)
        return ()

    def notes(self, changes: tuple[Change, ...]) -> Iterator[str]:
        """What a reader must know besides the rows."""
        old, new = self.sides.baseline, self.sides.candidate
        if self.one_session:
            if self.sides.baseline_model == self.policy.model:
                yield "both sides are one and the same run"
            if noise := unfit_machine(new.environment):
                yield f"the machine was too noisy for sharp times: {noise}"
            return
        if old.recipe != new.recipe:
            yield f"of different recipes: {old.recipe} and {new.recipe}"
        if not self.sides.same_rows():
            yield "judged on different test data: examples do not pair"
        elif old.data is None or new.data is None:
            yield "a report does not name its test data: the same is assumed where the rows are as many"
        yield from (f"software differs: {difference}" for difference in self.hosts.software)
        if self.hosts.machine and self.across_hosts:
            yield f"times are compared across machines, as asked: {'; '.join(self.hosts.machine)}"
        if self.reused:
            yield f"times are {_REUSED}"
        elif any(_varies(describe_metric(change.metric, change.unit)) for change in changes):
            yield _SHARPER


def _varies(known: Metric) -> bool:
    """Times, rates and energies, but not a factor that is taken of a time, such as the real-time factor."""
    return known.style in ("milliseconds", "rate", "times") or known.unit in ("J", "W", "s")


def _is_finite(row: Measurement) -> bool:
    figures = (row.value, row.low or 0.0, row.high or 0.0, *(row.raw or ()))
    return all(map(math.isfinite, figures))
