"""Change of one metric from two measurements, with interval and verdict.

Verdicts depend on the interval of a change and on the margin that the policy gives to the metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

from compress.numerics.differences import (
    allow_for,
    decide,
    difference_of_estimates,
    difference_of_shares,
    discordant,
    logarithm,
    mcnemar_mid_p,
    paired_bootstrap,
    paired_difference,
    relative,
    samples_to_settle,
    widen,
)
from compress.numerics.statistics import IntervalEstimate, geometric_interval, wilson_interval
from compress.recipe.policy import Margin
from compress.report.compare.change import ComparedModels, MetricChange, SliceChange
from compress.results.metrics import Metric, describe_metric
from compress.results.report import Measurement

_MEASURED_CONFIDENCE = 0.95
"""Confidence of the interval that a measurement keeps."""


@dataclass(frozen=True)
class MeasurementPair:
    """Two measurements of one metric, and the smallest change of it that matters."""

    before: Measurement
    after: Measurement
    margin: Margin

    @property
    def metric(self) -> Metric:
        """Return the metric."""
        return describe_metric(self.after.metric, self.after.unit)

    @property
    def is_share(self) -> bool:
        """Return whether changes are differences in points rather than ratios."""
        return self.metric.style == "percent"

    @property
    def margin_value(self) -> float:
        """Return the margin on the scale of the effect, or 0 if it is relative to 0."""
        return self.margin.of(self.before.value, relative=not self.is_share) or 0.0


class KernelRatio(NamedTuple):
    """Ratio of the machine's time in the candidate's session to the baseline's, by one kernel that both timed."""

    name: str
    log_ratio: IntervalEstimate


def exact_change(pair: MeasurementPair, note: str | None = None) -> MetricChange:
    """Return the change of values without an interval, such as bytes. The baseline must not be 0."""
    baseline, candidate = pair.before.value, pair.after.value
    relative_effect = candidate / baseline - 1 if not pair.is_share and candidate != baseline else 0.0
    effect = candidate - baseline if pair.is_share else relative_effect
    return make_change(pair, IntervalEstimate(effect, effect, effect), None, 1, "figures compared as they are", note)


def unjudged_change(pair: MeasurementPair, reason: str) -> MetricChange:
    """Return the change of values whose random variation is unknown."""
    change = exact_change(pair, reason)
    if change.effect == 0:
        return change
    n = min(pair.before.n, pair.after.n)
    return change.model_copy(update={"verdict": "can't tell", "more": None, "n": n, "method": "no interval is kept"})


def paired_change(pair: MeasurementPair, confidence: float, seed: int = 0) -> MetricChange:
    """Return the change of outcomes on the same examples. Examples that are hard for both models cancel out.

    Raises:
        ValueError: The outcomes don't pair.
    """
    baseline, candidate = _outcomes(pair.before), _outcomes(pair.after)
    n = len(baseline)
    if baseline == candidate:
        return make_change(
            pair, IntervalEstimate(0.0, 0.0, 0.0), None, n, f"paired on {n:,} examples, all outcomes equal"
        )
    # Outcomes of 0 and 1 have an exact treatment, other values are resampled.
    if {*baseline, *candidate} <= {0.0, 1.0}:
        only_before, only_after = discordant(baseline, candidate)
        # An error rate keeps its outcomes as errors, so that the difference is the effect either way.
        estimate = difference_of_shares(only_before, only_after, n, confidence)
        method = f"paired on {n:,} examples, adjusted Wald interval (Agresti and Min 2005)"
        note = f"{only_before} right before and wrong now, {only_after} wrong before and right now"
        note += f"; McNemar's mid-p {mcnemar_mid_p(only_before, only_after):.2g}"
        return make_change(pair, estimate, confidence, n, method, note if pair.metric.better == "higher" else None)

    def change(old: np.ndarray, new: np.ndarray) -> float:
        if pair.metric.exponential:
            return math.expm1(float(new.mean() - old.mean()))
        return float(new.mean() - old.mean()) if pair.is_share else float(new.mean() / old.mean() - 1)

    estimate = paired_bootstrap(baseline, candidate, change, seed, confidence=confidence)
    samples = "windows" if pair.metric.exponential else "examples"
    return make_change(pair, estimate, confidence, n, f"paired bootstrap over {n:,} {samples}")


def is_paired(pair: MeasurementPair) -> bool:
    """Return whether both keep one outcome for each example, equally many, whose mean is their value."""
    rows = (pair.before, pair.after)
    if any(row.raw is None or len(row.raw) < 2 for row in rows) or pair.metric.style == "milliseconds":
        return False
    if len(_outcomes(pair.before)) != len(_outcomes(pair.after)):
        return False
    values = (math.log(row.value) if pair.metric.exponential and row.value > 0 else row.value for row in rows)
    means = (fmean(_outcomes(row)) for row in rows)
    return all(math.isclose(*both, rel_tol=1e-6, abs_tol=1e-9) for both in zip(means, values, strict=True))


def unpaired_change(pair: MeasurementPair, confidence: float, note: str) -> MetricChange:
    """Return the change of a quality on different examples, or without outcomes, from each measurement's interval."""
    baseline, candidate = (_own_interval(row, confidence) for row in (pair.before, pair.after))
    method = "each side's own interval (Zou and Donner 2008)"
    if pair.is_share:
        estimate = difference_of_estimates(baseline, candidate)
    elif min(baseline.low, candidate.low) > 0:
        estimate = relative(difference_of_estimates(logarithm(baseline), logarithm(candidate)))
    else:
        return unjudged_change(pair, f"an interval that reaches 0 has no ratio; {note}")
    return make_change(pair, estimate, confidence, min(pair.before.n, pair.after.n), method, note)


def time_change(
    pair: MeasurementPair,
    confidence: float,
    session_spread: float,
    references: tuple[KernelRatio, ...],
    note: str | None,
) -> MetricChange:
    """Return the change of times, rates and other positive values with intervals.

    ln(after / before) has the interval that both measurements' intervals imply, widened by ``session_spread`` for each
    session. ``references`` are divided out, each separately, because it is unknown which of them resembles the model.
    The interval contains the intervals by all of them, and the effect is their mean.

    Args:
        pair: Measurements of the metric.
        confidence: Confidence of the interval.
        session_spread: Standard deviation of a time between sessions, relative. 0 for a single session.
        references: Ratios of the reference kernels.
        note: Note on the change.
    """
    baseline, candidate = (logarithm(_own_interval(row, confidence)) for row in (pair.before, pair.after))
    ratio = difference_of_estimates(baseline, candidate)
    sign = -1.0 if pair.metric.style == "rate" else 1.0
    estimate = ratio
    by_kernel = []
    for kernel in references:
        # A rate falls where a time rises, so the kernel's ratio is inverted for rates.
        slower = widen(kernel.log_ratio, _MEASURED_CONFIDENCE, confidence)
        divisor = slower if sign > 0 else IntervalEstimate(-slower.value, -slower.high, -slower.low)
        by_kernel.append(difference_of_estimates(divisor, ratio))
    if by_kernel:
        values, lows, highs = zip(*by_kernel, strict=True)
        estimate = IntervalEstimate(fmean(values), min(lows), max(highs))
    allowance = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(2) * session_spread
    estimate = relative(allow_for(estimate, allowance))
    divisors = f", divided by {' and '.join(kernel.name for kernel in references)}" if references else ""
    method = f"ratio of the medians, each with its own interval{divisors}"
    if session_spread:
        method += f"; allowance of {session_spread:.1%} for each session"
    change = make_change(pair, estimate, confidence, min(pair.before.n, pair.after.n), method, note)
    # More samples of the same two sessions leave the sessions' own spread as it is.
    return change.model_copy(update={"more": None}) if session_spread and change.more else change


def launch_change(pair: MeasurementPair, ratios: tuple[float, ...], confidence: float) -> MetricChange:
    """Return the change of times from processes that were launched side by side.

    Args:
        pair: Measurements of the metric.
        ratios: Baseline over candidate, one for each launch.
        confidence: Confidence of the interval.

    Raises:
        ValueError: There are fewer than two launches.
    """
    inverse = geometric_interval(1 / np.asarray(ratios, dtype=np.float64), confidence)
    estimate = IntervalEstimate(*(value - 1 for value in inverse))
    method = f"calls paired side by side, t interval over {len(ratios)} launches of both"
    return make_change(pair, estimate, confidence, len(ratios), method)


def make_change(
    pair: MeasurementPair,
    effect: IntervalEstimate,
    confidence: float | None,
    n: int,
    method: str,
    note: str | None = None,
) -> MetricChange:
    """Return the change with the verdict of its interval and margin.

    Args:
        pair: Measurements of the metric.
        effect: Effect with its interval.
        confidence: Confidence of the interval, or None for exact values.
        n: Number of pairs of samples.
        method: Description of the method.
        note: Note on the change.
    """
    better, margin = pair.metric.better, pair.margin_value
    value, low, high = effect
    loss = IntervalEstimate(-value, -high, -low) if better == "higher" else effect
    verdict, more = decide(loss, margin), samples_to_settle(loss, margin, n)
    if better == "unknown" and verdict in ("worse", "better"):
        verdict, more = "can't tell", None
        note = note or "it is unknown whether higher or lower is better"
    return MetricChange(
        metric=pair.after.metric,
        target=pair.after.target,
        unit=pair.after.unit,
        baseline=pair.before.value,
        candidate=pair.after.value,
        scale="absolute" if pair.is_share else "relative",
        effect=value,
        low=low,
        high=high,
        confidence=confidence,
        margin=margin,
        verdict=verdict,
        n=n,
        more=more if confidence is not None else 0,
        method=method,
        note=note,
    )


def without_verdict(change: MetricChange, reason: str) -> MetricChange:
    """Return the change without a verdict, because ``reason`` makes one meaningless."""
    return change.model_copy(update={"verdict": "can't tell", "more": None, "note": reason})


def kernel_ratio(name: str, before: Measurement, after: Measurement) -> KernelRatio:
    """Return the ratio of a kernel's times in both sessions. Raises `ValueError` for times that are not positive."""
    intervals = (logarithm(_own_interval(row, _MEASURED_CONFIDENCE)) for row in (before, after))
    return KernelRatio(name, difference_of_estimates(*intervals))


def _outcomes(row: Measurement) -> tuple[float, ...]:
    assert row.raw is not None
    return row.raw


def _own_interval(row: Measurement, confidence: float) -> IntervalEstimate:
    """Return the interval at ``confidence``: a Wilson interval is computed again, any other is widened."""
    if row.low is None or row.high is None:
        return IntervalEstimate(row.value, row.value, row.value)
    # A time may be so large that its product is infinite.
    if 0 <= row.value <= 1:
        right = round(row.value * row.n)
        wilson = wilson_interval(right, row.n, _MEASURED_CONFIDENCE)
        if all(
            math.isclose(bound, estimate, abs_tol=1e-9)
            for bound, estimate in zip(wilson, (row.low, row.high), strict=True)
        ):
            low, high = wilson_interval(right, row.n, confidence)
            return IntervalEstimate(row.value, min(low, row.value), max(high, row.value))
    estimate = IntervalEstimate(row.value, min(row.low, row.value), max(row.high, row.value))
    if estimate.low <= 0:
        return widen(estimate, _MEASURED_CONFIDENCE, confidence)
    return IntervalEstimate(*map(math.exp, widen(logarithm(estimate), _MEASURED_CONFIDENCE, confidence)))


_METHOD = "paired outcomes, adjusted Wald interval (Agresti and Min 2005), Bonferroni over slices"


def slice_changes(
    sides: ComparedModels, target: str, margin: float, confidence: float, metric: str = "accuracy"
) -> tuple[SliceChange, ...]:
    """Return the change of ``metric`` in each slice of the test data, the largest fall first, or nothing without pairs.

    Among many slices one looks bad by chance. So each interval has a confidence of 1 - (1 - ``confidence``) / m for m
    slices (Bonferroni; Dunn 1961). Together they contain all true changes with at least ``confidence``, whether slices
    overlap or not. For equally good models, at most about (1 - ``confidence``) / 2 of the comparisons call any slice
    worse. The slices are the candidate's, or the baseline's if the candidate's report has none.

    Args:
        sides: Compared models.
        target: Target of the measurements.
        margin: Smallest difference of shares that matters: 0.005 is half a point.
        confidence: Confidence of all intervals together.
        metric: Metric of which outcomes count.
    """
    (baseline, candidate), raw = sides.rows(metric, target), sides.outcomes(metric, target)
    slices = {
        name: (measurements.rows, measurements.indices())
        for name, measurements in (sides.candidate.slices or sides.baseline.slices).items()
    }
    if raw is None or baseline is None or candidate is None or not slices or {*raw[0], *raw[1]} - {0.0, 1.0}:
        return ()
    if any(indices[-1] >= len(raw[0]) for _, indices in slices.values()):
        return ()
    slice_confidence = 1 - (1 - confidence) / len(slices)
    note = (
        f"{len(slices)} slices are compared together: each interval is computed at {slice_confidence:.2%}"
        if len(slices) > 1
        else None
    )
    changes = []
    for name, (count, indices) in slices.items():
        baseline_outcomes, candidate_outcomes = ([outcomes[index] for index in indices] for outcomes in raw)
        estimate = paired_difference(baseline_outcomes, candidate_outcomes, slice_confidence)
        measurements = (
            baseline.model_copy(update={"value": fmean(baseline_outcomes)}),
            candidate.model_copy(update={"value": fmean(candidate_outcomes)}),
        )
        pair = MeasurementPair(measurements[0], measurements[1], Margin(margin, relative=False))
        changes.append(
            SliceChange(
                name=name, rows=count, change=make_change(pair, estimate, slice_confidence, count, _METHOD, note)
            )
        )
    return tuple(sorted(changes, key=lambda measurements: measurements.change.effect))


def largest_change(slices: Iterable[SliceChange]) -> SliceChange | None:
    """Return the slice that changed most, for better or worse."""
    return max(slices, key=lambda part: abs(part.change.effect), default=None)
