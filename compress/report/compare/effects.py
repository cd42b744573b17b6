"""From two measurements of one metric to a change with its interval and verdict."""

from __future__ import annotations

import math
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
    relative,
    samples_to_settle,
    widen,
)
from compress.numerics.statistics import Estimate, geometric_interval, wilson_interval
from compress.recipe.policy import Margin
from compress.report.compare.change import Change
from compress.results.measurement import Measurement
from compress.results.metrics import Metric, describe_metric

_MEASURED_CONFIDENCE = 0.95
"""Of the interval that a measurement keeps."""


@dataclass(frozen=True)
class Pair:
    """The two rows of one metric, and the smallest change of it that matters."""

    before: Measurement
    after: Measurement
    margin: Margin

    @property
    def metric(self) -> Metric:
        """What is known of the metric."""
        return describe_metric(self.after.metric, self.after.unit)

    @property
    def is_share(self) -> bool:
        """Whether changes are differences in points rather than ratios."""
        return self.metric.style == "percent"

    @property
    def margin_value(self) -> float:
        """The margin on the scale of the effect; 0 where it is a part of nothing."""
        return self.margin.of(self.before.value, relative=not self.is_share) or 0.0


class Reference(NamedTuple):
    """How many times slower the machine was in the candidate's session, by one kernel that both timed."""

    name: str
    log_ratio: Estimate


def exact_change(pair: Pair, note: str | None = None) -> Change:
    """Of quantities without an interval, such as bytes: the figures decide. The baseline must not be 0."""
    effect = _effect(pair)
    return make_change(pair, Estimate(effect, effect, effect), None, 1, "figures compared as they are", note)


def unjudged_change(pair: Pair, reason: str) -> Change:
    """Of figures of which nobody knows how far chance moves them."""
    change = exact_change(pair, reason)
    if change.effect == 0:
        return change
    n = min(pair.before.n, pair.after.n)
    return change.model_copy(update={"verdict": "can't tell", "more": None, "n": n, "method": "no interval is kept"})


def paired_change(pair: Pair, confidence: float, seed: int = 0) -> Change:
    """Of outcomes kept for each example, of the same examples: what both find hard cancels.

    Raises `ValueError` where the two don't pair.
    """
    before, after = _outcomes(pair.before), _outcomes(pair.after)
    n = len(before)
    if {*before, *after} <= {0.0, 1.0}:
        only_before, only_after = discordant(before, after)
        # An error rate keeps its outcomes as errors, so that the difference is the effect either way.
        found = difference_of_shares(only_before, only_after, n, confidence)
        method = f"paired on {n:,} examples, adjusted Wald interval (Agresti and Min 2005)"
        note = f"{only_before} right before and wrong now, {only_after} the other way round"
        note += f"; McNemar's mid-p {mcnemar_mid_p(only_before, only_after):.2g}"
        return make_change(pair, found, confidence, n, method, note if pair.metric.better == "higher" else None)

    def change(old: np.ndarray, new: np.ndarray) -> float:
        if pair.metric.exponential:
            return math.expm1(float(new.mean() - old.mean()))
        return float(new.mean() - old.mean()) if pair.is_share else float(new.mean() / old.mean() - 1)

    found = paired_bootstrap(before, after, change, seed, confidence=confidence)
    what = "windows" if pair.metric.exponential else "examples"
    return make_change(pair, found, confidence, n, f"paired bootstrap over {n:,} {what}")


def is_paired(pair: Pair) -> bool:
    """Whether both rows keep one outcome an example, as many on both sides, whose mean is their value."""
    rows = (pair.before, pair.after)
    if any(row.raw is None or len(row.raw) < 2 for row in rows) or pair.metric.style == "milliseconds":
        return False
    if len(_outcomes(pair.before)) != len(_outcomes(pair.after)):
        return False
    values = (math.log(row.value) if pair.metric.exponential and row.value > 0 else row.value for row in rows)
    means = (fmean(_outcomes(row)) for row in rows)
    return all(math.isclose(*both, rel_tol=1e-6, abs_tol=1e-9) for both in zip(means, values, strict=True))


def unpaired_change(pair: Pair, confidence: float, note: str) -> Change:
    """Of quality measured on different examples, or kept without them: each row's own interval."""
    before, after = (_own_interval(row, confidence) for row in (pair.before, pair.after))
    method = "each side's own interval (Zou and Donner 2008)"
    if pair.is_share:
        found = difference_of_estimates(before, after)
    elif min(before.low, after.low) > 0:
        found = relative(difference_of_estimates(logarithm(before), logarithm(after)))
    else:
        return unjudged_change(pair, f"an interval that reaches 0 has no ratio; {note}")
    return make_change(pair, found, confidence, min(pair.before.n, pair.after.n), method, note)


def time_change(
    pair: Pair, confidence: float, session_spread: float, references: tuple[Reference, ...], note: str | None
) -> Change:
    """Of times, rates and other positive figures with intervals, from two sessions (or one: a spread of 0).

    ln(after / before) gets the interval that both rows' own imply, widened by ``session_spread`` for each session.
    ``references`` are divided out, each by itself, since nobody knows which of them the model is like; the interval
    holds the intervals by all of them, and the effect is the middle of theirs.
    """
    before, after = (logarithm(_own_interval(row, confidence)) for row in (pair.before, pair.after))
    ratio = difference_of_estimates(before, after)
    sign = -1.0 if pair.metric.style == "rate" else 1.0
    found = ratio
    if by_each := [_divided(ratio, known, sign, confidence) for known in references]:
        values, lows, highs = zip(*by_each, strict=True)
        found = Estimate(fmean(values), min(lows), max(highs))
    spread = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(2) * session_spread
    found = relative(allow_for(found, spread))
    by = f", divided by {' and '.join(known.name for known in references)}" if references else ""
    method = f"ratio of the medians, each with its own interval{by}"
    if session_spread:
        method += f"; allowance of {session_spread:.1%} for each session"
    change = make_change(pair, found, confidence, min(pair.before.n, pair.after.n), method, note)
    # More samples of the same two sessions leave the sessions' own spread as it is.
    return change.model_copy(update={"more": None}) if session_spread and change.more else change


def launch_change(pair: Pair, ratios: tuple[float, ...], confidence: float) -> Change:
    """Of processes that were launched side by side: ``ratios`` are baseline over candidate, one a launch.

    Raises `ValueError` for fewer than two launches.
    """
    inverse = geometric_interval(1 / np.asarray(ratios, dtype=np.float64), confidence)
    found = Estimate(*(value - 1 for value in inverse))
    method = f"calls paired side by side, t interval over {len(ratios)} launches of both"
    return make_change(pair, found, confidence, len(ratios), method)


def make_change(
    pair: Pair, found: Estimate, confidence: float | None, n: int, method: str, note: str | None = None
) -> Change:
    """The change with the verdict that its interval and margin give."""
    better, margin = pair.metric.better, pair.margin_value
    value, low, high = found
    loss = Estimate(-value, -high, -low) if better == "higher" else found
    verdict, more = decide(loss, margin), samples_to_settle(loss, margin, n)
    if better == "unknown" and verdict in ("worse", "better"):
        verdict, more = "can't tell", None
        note = note or "it is not known whether more or less of it is better"
    return Change(
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


def withhold(change: Change, reason: str) -> Change:
    """The same figures without a verdict, because ``reason`` makes one meaningless."""
    return change.model_copy(update={"verdict": "can't tell", "more": None, "note": reason})


def reference(name: str, before: Measurement, after: Measurement) -> Reference:
    """From a kernel's rows of both sessions. Raises `ValueError` for times that are not positive."""
    own = (logarithm(_own_interval(row, _MEASURED_CONFIDENCE)) for row in (before, after))
    return Reference(name, difference_of_estimates(*own))


def _effect(pair: Pair) -> float:
    before, after = pair.before.value, pair.after.value
    return after - before if pair.is_share else after / before - 1 if after != before else 0.0


def _outcomes(row: Measurement) -> tuple[float, ...]:
    assert row.raw is not None
    return row.raw


def _own_interval(row: Measurement, confidence: float) -> Estimate:
    """The row's interval at ``confidence``: Wilson's anew where it is one, else the kept one widened."""
    if row.low is None or row.high is None:
        return Estimate(row.value, row.value, row.value)
    right = round(row.value * row.n)
    if 0 <= right <= row.n:
        wilson = wilson_interval(right, row.n, _MEASURED_CONFIDENCE)
        if all(math.isclose(own, kept, abs_tol=1e-9) for own, kept in zip(wilson, (row.low, row.high), strict=True)):
            low, high = wilson_interval(right, row.n, confidence)
            return Estimate(row.value, min(low, row.value), max(high, row.value))
    kept = Estimate(row.value, min(row.low, row.value), max(row.high, row.value))
    if kept.low <= 0:
        return widen(kept, _MEASURED_CONFIDENCE, confidence)
    return Estimate(*map(math.exp, widen(logarithm(kept), _MEASURED_CONFIDENCE, confidence)))


def _divided(ratio: Estimate, known: Reference, sign: float, confidence: float) -> Estimate:
    slower = widen(known.log_ratio, _MEASURED_CONFIDENCE, confidence)
    turned = slower if sign > 0 else Estimate(-slower.value, -slower.high, -slower.low)
    return difference_of_estimates(turned, ratio)
