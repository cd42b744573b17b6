"""Text of changes and judgements, the same in every view."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compress.numerics.differences import Verdict
from compress.report.compare.change import ComparedModel, Comparison, JudgedLimit, MetricChange
from compress.report.compare.gate import GateResult, Judgement
from compress.report.plot import Scale, nice_ticks
from compress.results.formatting import format_number, format_value
from compress.results.metrics import describe_metric, main_metrics

SIGNS: dict[Verdict, str] = {"better": "\u2191", "same": "=", "worse": "\u2193", "can't tell": "?"}
VERDICT_TEXTS: dict[Verdict, str] = {"better": "better", "same": "same", "worse": "worse", "can't tell": "inconclusive"}
"""Verdicts as readers see them."""
ORDER: tuple[Verdict, ...] = ("worse", "can't tell", "better", "same")
"""Verdicts in the order in which readers need them."""


_MOST_NAMES = 6


def metric_title(change: MetricChange) -> str:
    """Return the metric's title."""
    return describe_metric(change.metric, change.unit).title


def value_text(change: MetricChange, value: float) -> str:
    """Return a value of the metric, with all digits of bytes if rounding would hide the change."""
    metric = describe_metric(change.metric, change.unit)
    rounded = [format_value(metric, side) for side in (change.baseline, change.candidate)]
    differs = change.baseline != change.candidate and change.verdict != "same"
    if metric.style in ("bytes", "count") and differs and rounded[0] == rounded[1]:
        return f"{value:,.0f} {change.unit}"
    return format_value(metric, value)


def effect_text(change: MetricChange) -> str:
    """Return `-1.10 points` or `+5.2%`, and `2.5x` from a doubling on, which is easier to understand."""
    return scaled_text(change, change.effect)


def scaled_text(change: MetricChange, effect: float, plus: bool = True) -> str:
    """Return ``effect`` on the change's scale, with a sign unless ``plus`` is False and it is positive."""
    sign = "-" if effect < 0 else "+" if effect > 0 and plus else ""
    if change.scale == "absolute":
        return f"{sign}{abs(effect) * 100:.2f} points"
    if effect >= 1:
        return f"{format_number(effect + 1)}x"
    size = abs(effect) * 100
    return f"{sign}{size:.1f}%" if size >= 0.1 or size == 0 else f"{sign}{format_number(size, 2)}%"


def interval_text(change: MetricChange) -> str:
    """Return `-1.80 to -0.40 points`, or nothing for an exact value."""
    if change.confidence is None or change.low == change.high:
        return ""
    if change.scale == "relative" and change.high >= 1:
        return f"{format_number(change.low + 1)}x to {format_number(change.high + 1)}x"
    low, high = scaled_text(change, change.low), scaled_text(change, change.high)
    unit = " points" if change.scale == "absolute" else ""
    return f"{low.removesuffix(unit)} to {high}"


def confidence_text(change: MetricChange) -> str:
    """Return `90%`."""
    return "" if change.confidence is None else f"{change.confidence * 100:.4g}%"


def value_cells(change: MetricChange) -> list[str]:
    """Return before, now, change, and the interval of the change with its confidence. `~` marks noisy times."""
    interval = interval_text(change)
    interval_cell = f"{interval} ({confidence_text(change)})" if interval else ""
    mark = "~" if change.noisy else ""
    return [
        mark + value_text(change, change.baseline),
        mark + value_text(change, change.candidate),
        mark + effect_text(change),
        interval_cell,
    ]


def change_cells(change: MetricChange) -> list[str]:
    """Return a change as a row: metric, target, `value_cells`, margin, verdict."""
    return [change.metric, change.target, *value_cells(change), margin_text(change), verdict_text(change)]


def judgement_cells(judgement: Judgement) -> list[str]:
    """Return a judgement as a row: metric, target, `value_cells`, margin, verdict or the reason for its absence."""
    change = judgement.change
    cells = value_cells(change) if change else [""] * 4
    last = verdict_text(change) if change else limit_verdict_text(judgement) or judgement.reason
    return [judged_name(judgement), judgement.target, *cells, judgement.margin, last]


def margin_text(change: MetricChange) -> str:
    """Return the smallest change that matters, or `any`."""
    return scaled_text(change, change.margin, plus=False) if change.margin else "any"


def verdict_text(change: MetricChange) -> str:
    """Return the verdict, and for an inconclusive one the number of further pairs that should settle it."""
    if change.verdict == "can't tell" and change.more:
        return f"inconclusive (about {change.more:,} more samples needed)"
    return short_verdict(change)


def short_verdict(change: MetricChange) -> str:
    """Return the verdict as one word."""
    return "identical" if change.identical else VERDICT_TEXTS[change.verdict]


LIMIT_VERDICTS = {"kept": "kept", "missed": "missed", "cannot tell": "inconclusive"}
"""Verdicts on limits as readers see them."""


def limit_verdict_text(judgement: Judgement) -> str:
    """Return the verdict on a limit, or nothing for another judgement."""
    return LIMIT_VERDICTS[judgement.limit] if judgement.limit else ""


def limit_line(limit: JudgedLimit) -> str:
    """Return `limit accuracy on cpu ≥ 98.5% of baseline: kept, 99.20% of its own baseline (86.10%)`."""
    return _limit_sentence(limit.metric, limit.target, limit.limit, LIMIT_VERDICTS[limit.verdict], limit.result)


def _limit_sentence(metric: str, target: str, bound: str, verdict: str, result: str) -> str:
    # The other side of a comparison is a baseline too.
    own = result.replace(" of baseline", " of its own baseline")
    return f"limit {metric} on {target} {bound}: {verdict}, {own}"


def change_sentence(change: MetricChange) -> str:
    """Return `accuracy on cpu: 79.00% → 77.90%, -1.10 points (90% interval -1.80 to -0.40 points)`."""
    values = f"{value_text(change, change.baseline)} \u2192 {value_text(change, change.candidate)}"
    interval = interval_text(change)
    interval_phrase = f" ({confidence_text(change)} interval {interval})" if interval else ""
    return f"{change.metric} on {change.target}: {values}, {effect_text(change)}{interval_phrase}"


def detailed_sentence(change: MetricChange) -> str:
    """Return `change_sentence` with the smallest change that matters, and the verdict with the samples needed."""
    return f"{change_sentence(change)}, {margin_phrase(change)}: {verdict_text(change)}"


def judged_name(judgement: Judgement) -> str:
    """Return `accuracy`, or `accuracy in label=negative`."""
    return f"{judgement.metric} in {judgement.slice}" if judgement.slice else judgement.metric


def judgement_text(judgement: Judgement) -> str:
    """Return the reason of a judgement, in one line."""
    if judgement.limit:
        verdict = LIMIT_VERDICTS[judgement.limit]
        return _limit_sentence(judgement.metric, judgement.target, judgement.margin, verdict, judgement.reason)
    if judgement.change is None:
        return f"{judged_name(judgement)} on {judgement.target}: {judgement.reason}"
    slice_phrase = f" in {judgement.slice}" if judgement.slice else ""
    text = change_sentence(judgement.change).replace(judgement.metric, f"{judgement.metric}{slice_phrase}", 1)
    verdict = f"; {VERDICT_TEXTS[judgement.change.verdict]}" + (f": {judgement.reason}" if judgement.reason else "")
    return f"{text}, allowed {judgement.margin} worse{verdict}"


def gate_sentence(result: GateResult) -> str:
    """Return a sentence on how many judgements failed, are inconclusive, or passed."""
    failed, warned = result.having("failed"), result.having("warned")
    total = len(result.judgements)
    if not total:
        return "Nothing was judged"
    inconclusive = f"{len(warned)} inconclusive" if warned else ""
    if failed:
        names = ", ".join(dict.fromkeys(judged_name(judgement) for judgement in failed))
        return f"Failed: {names} ({len(failed)} of {total}{f', {inconclusive}' if inconclusive else ''})"
    return f"Passed: {total - len(warned)} of {total}" + (f", {inconclusive}" if inconclusive else "")


def comparison_sentence(comparison: Comparison) -> str:
    """Return `Worse: accuracy; better: size_bytes, latency_ms`."""
    if all(change.identical for change in comparison.changes):
        return "Identical"
    parts, changes = [], distinct(comparison.changes)
    changed: tuple[Verdict, ...] = ("worse", "better")
    for verdict in changed:
        names = [change.metric for change in changes if change.verdict == verdict]
        if names:
            parts.append(f"{verdict}: {_shortened(list(dict.fromkeys(names)))}")
    unchanged: tuple[Verdict, ...] = ("same", "can't tell")
    for verdict in unchanged:
        count = sum(change.verdict == verdict for change in changes)
        parts += [f"{count} {VERDICT_TEXTS[verdict]}"] if count else []
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def side_text(side: ComparedModel) -> str:
    """Return `runs/quickstart (final), measured 2026-11-25T12:00:00+00:00 on AMD EPYC, ...`."""
    when = f", measured {side.started}" if side.started else ""
    return f"{side.name} ({side.model}){when}" + (f" on {side.host}" if side.host else "")


def by_importance(comparison: Comparison) -> list[MetricChange]:
    """Return changes in the order of `ORDER`, and otherwise in the order of the rows."""
    return sorted(comparison.changes, key=lambda change: ORDER.index(change.verdict))


def main_changes(changes: Sequence[MetricChange], comparison: Comparison) -> list[MetricChange]:
    """Return the changes of main metrics and of metrics with a limit, and all that got worse."""
    units = {change.metric: change.unit for change in changes}
    names = {metric.name for metric in main_metrics(units)} | {limit.metric for limit in comparison.limits}
    return [change for change in changes if change.metric in names or change.verdict == "worse"] or list(changes)


def distinct(changes: Iterable[MetricChange]) -> list[MetricChange]:
    """Return changes without repetitions: the size of one file is measured on each target."""
    kept: dict[tuple[object, ...], MetricChange] = {}
    for change in changes:
        is_file = describe_metric(change.metric, change.unit).from_file
        kept.setdefault(
            (change.metric, *((change.baseline, change.candidate) if is_file else (change.target,))), change
        )
    return list(kept.values())


def evidence_lines(comparison: Comparison) -> list[str]:
    """Return notes and all metrics without a comparison, as lines."""
    lines = list(comparison.notes)
    lines += [f"the machines differ: {difference}" for difference in comparison.host_differences]
    # More samples would not settle these changes.
    unsettled = [change for change in comparison.changes if change.verdict == "can't tell" and change.more is None]
    lines += _grouped("inconclusive", ((change.metric, f": {change.note}") for change in unsettled if change.note))
    missing = ((row.metric, f" on {row.target}: {row.reason}") for row in comparison.uncompared)
    return lines + _grouped("not compared", missing)


def _grouped(heading: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return `heading: metric, metric and 3 more: reason` for each reason of (metric, reason) pairs."""
    metrics: dict[str, list[str]] = {}
    for metric, reason in reasons:
        metrics.setdefault(reason, []).append(metric)
    return [f"{heading}: {_shortened(list(dict.fromkeys(names)))}{reason}" for reason, names in metrics.items()]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )


def equal_texts(comparison: Comparison) -> str:
    """Return `2 of 8 continuations are the same to the end`, or nothing without continuations."""
    texts = comparison.continuations
    same = sum(pair.baseline == pair.candidate for pair in texts)
    return f"{same} of {len(texts)} continuations are the same to the end" if texts else ""


_FACTORS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_FURTHEST = math.log(1000.0)
_PAD = 0.06
_CLOSEST = 0.13
"""Smallest distance of two tick labels as a share of the width."""


def effect_axis(changes: Sequence[MetricChange]) -> Scale:
    """Return a scale in per cent of the width: losses in points of a share, or logarithms of ratios.

    It contains every effect and margin, and of the intervals as much as keeps those visible.
    """
    bounds = [_losses(change) for change in changes]
    margins = [_on_axis(change, change.margin) for change in changes]
    reach = 2.5 * max([*margins, *(abs(value) for value, _, _ in bounds), 1e-4])
    ends = [0.0, *margins, *(-margin for margin in margins)]
    for value, low, high in bounds:
        ends += [value, max(low, -reach), min(high, reach)]
    pad = (max(ends) - min(ends)) * _PAD or 1e-4
    return Scale(min(ends) - pad, max(ends) + pad, 0.0, 100.0)


def ticks(axis: Scale, relative: bool) -> list[tuple[float, str]]:
    """Return losses with their labels, far enough apart to be read. 0 is always one."""
    if relative:
        steps = [
            (math.log(factor), f"{factor:g}x" if factor >= 2 else f"{(factor - 1) * 100:g}%") for factor in _FACTORS
        ]
    else:
        steps = [
            (tick, format_number(tick * 100, 2)) for tick in nice_ticks(0.0, max(axis.high, -axis.low), 4) if tick > 0
        ]
    placed, distance = [(0.0, "0")], _CLOSEST * (axis.high - axis.low)
    for size, words in reversed(steps):
        for loss in (size, -size):
            if axis.low <= loss <= axis.high and all(abs(loss - other) >= distance for other, _ in placed):
                placed.append((loss, words))
    return sorted(placed)


class IntervalBar(NamedTuple):
    """Positions of a change in per cent of the width: band of the margin, ticks, interval, its ends, and effect."""

    band: tuple[float, float]
    ticks: list[tuple[float, str]]
    span: tuple[float, float] | None
    ends: list[float]
    value: float


def interval_bar(change: MetricChange, axis: Scale) -> IntervalBar:
    """Return the change as a dot with its interval, over the band in which it would not matter."""
    value, low, high = _losses(change)
    margin = _on_axis(change, change.margin)
    grid = [(axis(loss), "grid" if loss else "zero") for loss, _ in ticks(axis, change.scale == "relative")]
    ends = [axis(end) for end in (low, high) if low < high and axis.low <= end <= axis.high]
    span = (axis(low), axis(high)) if low < high else None
    return IntervalBar((axis(-margin), axis(margin) - axis(-margin)), grid, span, ends, axis(value))


def change_tooltip(change: MetricChange) -> str:
    """Return the change as text for a tooltip and a screen reader."""
    interval = interval_text(change)
    interval_phrase = f", {confidence_text(change)} interval {interval}" if interval else ""
    verdict = f"{margin_phrase(change)}: {VERDICT_TEXTS[change.verdict]}"
    return f"{change.metric}: {effect_text(change)}{interval_phrase}; {verdict}"


def margin_phrase(change: MetricChange) -> str:
    """Return which changes matter, as a phrase."""
    return f"matters from {margin_text(change)}" if change.margin else "any change matters"


def _losses(change: MetricChange) -> tuple[float, float, float]:
    """Return effect, low and high with signs such that larger is worse."""
    value, low, high = (_on_axis(change, effect) for effect in (change.effect, change.low, change.high))
    if describe_metric(change.metric, change.unit).better == "higher":
        return -value, -high, -low
    return value, low, high


def _on_axis(change: MetricChange, effect: float) -> float:
    if change.scale == "absolute":
        return effect
    return max(-_FURTHEST, min(_FURTHEST, math.log1p(effect))) if effect > -1 else -_FURTHEST
