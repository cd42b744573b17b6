"""A change as people read it, the same in every view."""

from __future__ import annotations

from compress.numerics.differences import Verdict
from compress.report.compare.change import Change, Comparison, Side
from compress.report.compare.gate import GateResult, Judgement
from compress.results.formatting import format_value, significant
from compress.results.metrics import describe_metric

SIGNS: dict[Verdict, str] = {"better": "\u2191", "same": "=", "worse": "\u2193", "can't tell": "?"}
ORDER: tuple[Verdict, ...] = ("worse", "can't tell", "better", "same")
"""What a reader wants to see first."""


def title(change: Change) -> str:
    """The metric's name for people."""
    return describe_metric(change.metric, change.unit).title


def value_text(change: Change, value: float) -> str:
    """A value of the metric, bytes to the last one where rounding would hide the change."""
    metric = describe_metric(change.metric, change.unit)
    rounded = [format_value(metric, side) for side in (change.baseline, change.candidate)]
    if metric.style in ("bytes", "count") and change.baseline != change.candidate and rounded[0] == rounded[1]:
        return f"{value:,.0f} {change.unit}"
    return format_value(metric, value)


def effect_text(change: Change) -> str:
    """`-1.10 points` or `+5.2%`; from a doubling on `2.5x`, which is easier to grasp."""
    return scaled_text(change, change.effect)


def scaled_text(change: Change, effect: float, plus: bool = True) -> str:
    """``effect`` on the change's scale, with a sign unless ``plus`` is False and it is positive."""
    sign = "-" if effect < 0 else "+" if effect > 0 and plus else ""
    if change.scale == "absolute":
        return f"{sign}{abs(effect) * 100:.2f} points"
    if effect >= 1:
        return f"{significant(effect + 1)}x"
    size = abs(effect) * 100
    return f"{sign}{size:.1f}%" if size >= 0.1 or size == 0 else f"{sign}{significant(size, 2)}%"


def interval_text(change: Change) -> str:
    """`-1.80 to -0.40 points`, or nothing for an exact figure."""
    if change.confidence is None or change.low == change.high:
        return ""
    if change.scale == "relative" and change.high >= 1:
        return f"{significant(change.low + 1)}x to {significant(change.high + 1)}x"
    low, high = scaled_text(change, change.low), scaled_text(change, change.high)
    unit = " points" if change.scale == "absolute" else ""
    return f"{low.removesuffix(unit)} to {high}"


def confidence_text(change: Change) -> str:
    """`90%`."""
    return "" if change.confidence is None else f"{change.confidence * 100:.4g}%"


def figures(change: Change) -> list[str]:
    """Before, now, change, and the interval of the change with its confidence."""
    interval = interval_text(change)
    known = f"{interval} ({confidence_text(change)})" if interval else ""
    return [value_text(change, change.baseline), value_text(change, change.candidate), effect_text(change), known]


def change_cells(change: Change) -> list[str]:
    """A change as a row: metric, target, `figures`, which changes matter, verdict."""
    return [change.metric, change.target, *figures(change), margin_text(change), verdict_text(change)]


def judgement_cells(judgement: Judgement) -> list[str]:
    """A judgement as a row: metric, target, `figures`, what is allowed, verdict or why there is none."""
    change = judgement.change
    known = figures(change) if change else [""] * 4
    last = verdict_text(change) if change else judgement.reason
    return [judged_name(judgement), judgement.target, *known, judgement.margin, last]


def margin_text(change: Change) -> str:
    """The smallest change that matters; `any` where every one does."""
    return scaled_text(change, change.margin, plus=False) if change.margin else "any"


def verdict_text(change: Change) -> str:
    """`worse`, and for what is not settled how many more pairs should settle it."""
    if change.verdict == "can't tell" and change.more:
        return f"can't tell (about {change.more:,} more would)"
    return change.verdict


def sentence(change: Change) -> str:
    """`accuracy on cpu: 79.00% \u2192 77.90%, -1.10 points (90% interval -1.80 to -0.40 points)`."""
    values = f"{value_text(change, change.baseline)} \u2192 {value_text(change, change.candidate)}"
    interval = interval_text(change)
    known = f" ({confidence_text(change)} interval {interval})" if interval else ""
    return f"{change.metric} on {change.target}: {values}, {effect_text(change)}{known}"


def judged_name(judgement: Judgement) -> str:
    """`accuracy`, or `accuracy in label=negative`."""
    return f"{judgement.metric} in {judgement.slice}" if judgement.slice else judgement.metric


def judgement_text(judgement: Judgement) -> str:
    """Why a judgement is what it is, in one line."""
    if judgement.change is None:
        return f"{judged_name(judgement)} on {judgement.target}: {judgement.reason}"
    part = f" in {judgement.slice}" if judgement.slice else ""
    text = sentence(judgement.change).replace(judgement.metric, f"{judgement.metric}{part}", 1)
    why = f"; {judgement.change.verdict}" + (f": {judgement.reason}" if judgement.reason else "")
    return f"{text}, allowed {judgement.margin} worse{why}"


def gate_sentence(result: GateResult) -> str:
    """`2 of 7 failed, 1 unknown`, or that all is well."""
    failed, warned = result.having("failed"), result.having("warned")
    total = len(result.judgements)
    if not total:
        return "Nothing was judged"
    unknown = f"{len(warned)} can't be told" if warned else ""
    if failed:
        names = ", ".join(dict.fromkeys(judged_name(judgement) for judgement in failed))
        return f"Failed: {names} ({len(failed)} of {total}{f', {unknown}' if unknown else ''})"
    return f"Passed: {total - len(warned)} of {total}" + (f", {unknown}" if unknown else "")


def comparison_sentence(comparison: Comparison) -> str:
    """`Worse: accuracy; better: size_bytes, latency_ms`."""
    parts = []
    for verdict in ("worse", "better"):
        names = [change.metric for change in comparison.changes if change.verdict == verdict]
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            parts.append(f"{verdict}: {', '.join(dict.fromkeys(names[:6]))}{more}")
    for verdict in ("same", "can't tell"):
        count = sum(change.verdict == verdict for change in comparison.changes)
        parts += [f"{count} {verdict}"] if count else []
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def side_text(side: Side) -> str:
    """`runs/quickstart (final), measured 2026-11-25T12:00:00+00:00 on AMD EPYC, ...`."""
    when = f", measured {side.started}" if side.started else ""
    return f"{side.name} ({side.model}){when}" + (f" on {side.host}" if side.host else "")


def ordered(comparison: Comparison) -> list[Change]:
    """Changes by how much a reader should care: worse ones first, in the order of the rows otherwise."""
    return sorted(comparison.changes, key=lambda change: ORDER.index(change.verdict))


def evidence(comparison: Comparison) -> list[str]:
    """Notes and everything that could not be compared, as lines."""
    lines = list(comparison.notes)
    lines += [f"the machines differ: {difference}" for difference in comparison.host_differences]
    reasons: dict[str, list[str]] = {}
    for missing in comparison.uncompared:
        reasons.setdefault(f"on {missing.target}: {missing.reason}", []).append(missing.metric)
    return lines + [f"not compared: {', '.join(metrics)} {reason}" for reason, metrics in reasons.items()]


def alike(comparison: Comparison) -> str:
    """`2 of 8 continuations are the same to the end`; nothing where nothing was written."""
    texts = comparison.continuations
    same = sum(one.baseline == one.candidate for one in texts)
    return f"{same} of {len(texts)} continuations are the same to the end" if texts else ""
