"""Headline numbers of a run: quality kept, times smaller, times faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from compress.numerics.differences import mcnemar_mid_p
from compress.report.limits import paired_ratio_interval, unusable_machine
from compress.report.rows import limit_state
from compress.results.formatting import format_improvement, format_number, format_value
from compress.results.metrics import describe_metric, quality_metric, shortest_context
from compress.results.report import BASELINE, FINAL, Measurement, Report

_FEW_BITS = 8.5
"""Number of bits with their scales below which the headline names the storage of weights."""
_SIGNIFICANT = 0.05
Status = Literal["passed", "missed", "unknown", "none"]


@dataclass(frozen=True)
class Headline:
    """Tile of the report. ``figure`` is the large number, ``label`` its meaning, ``detail`` the values behind it."""

    label: str
    figure: str
    detail: str
    status: Status = "none"
    limit: str = ""


def verdict(report: Report) -> tuple[Status, str]:
    """Return whether all limits were met, and a sentence that says so."""
    judged = report.judged
    skipped = [limit for limit in report.limits if limit.skipped]
    skipped_targets = {skip.target for skip in report.skipped}
    other_processors = sum(limit.target not in skipped_targets for limit in skipped)
    # Limits may be skipped for two reasons, and the sentence names both.
    reasons = ["target skipped"] if len(skipped) > other_processors else []
    reasons += ["for another processor"] if other_processors else []
    remark = f" ({len(skipped)} not judged: {', '.join(reasons)})" if skipped else ""
    # Without a runnable file only sizes are known, so limits on quality and speed were not judged.
    if report.unmeasured:
        summary = f"; of what files weigh, {_kept(report)}" if judged else f", and no limit was evaluated{remark}"
        summary_of_run = "Nothing could be run: only sizes are known"
        if report.stand_in:
            summary_of_run = f"No target could run it: {report.stand_in} measured the weights instead"
        return "missed" if report.missed else "none", f"{summary_of_run}{summary}"
    if not judged:
        return "none", f"No limits were evaluated{remark}" if report.limits else "The recipe sets no limits"
    unknown = any(limit.unknown for limit in report.limits)
    status: Status = "missed" if report.missed else "unknown" if unknown else "passed"
    sentence = _kept(report)
    return status, f"{sentence[0].upper()}{sentence[1:]}{remark}"


def _kept(report: Report) -> str:
    """Return `all 3 limits are kept`, `2 of 3 limits kept, 1 inconclusive`, or `1 of 3 limits missed`."""
    judged = report.judged
    missed = [limit for limit in judged if limit_state(limit) == "missed"]
    unknown = [limit for limit in judged if limit_state(limit) == "unknown"]
    inconclusive = [f"{len(unknown)} inconclusive"] if unknown else []
    if missed:
        return ", ".join([f"{len(missed)} of {len(judged)} {_limits(len(judged))} missed", *inconclusive])
    if unknown:
        return ", ".join([f"{len(judged) - len(unknown)} of {len(judged)} {_limits(len(judged))} kept", *inconclusive])
    return f"{'the limit is' if len(judged) == 1 else f'all {len(judged)} limits are'} kept"


def _limits(count: int) -> str:
    return "limit" if count == 1 else "limits"


def headlines(report: Report, target: str) -> list[Headline]:
    """Return the tiles of one target, without those that were not measured."""
    return [
        *_quality(report, target),
        *_size(report, target),
        *_speed(report, target),
        *_generation(report, target),
        *_agreement(report, target),
    ]


def _pair(report: Report, metric: str, target: str) -> tuple[Measurement, Measurement] | None:
    baseline, final = report.find(BASELINE, metric, target), report.find(FINAL, metric, target)
    return (baseline, final) if baseline and final and baseline.value > 0 and final.value > 0 else None


def _quality(report: Report, target: str) -> Iterator[Headline]:
    metric = quality_metric(report.metrics(target))
    pair = _pair(report, metric.name, target) if metric and metric.quality else None
    if metric is None or pair is None:
        return
    baseline, final = pair
    detail = _from_to(report, metric.name, target)
    # A ratio of perplexities is not a share of quality, so its change is shown.
    if metric.exponential:
        # The share of a perplexity that was kept would mean nothing to anybody.
        if interval := paired_ratio_interval(final, baseline):
            detail += f"; 95% interval {interval[0] - 1:+.1%} to {interval[1] - 1:+.1%}"
        change = f"{final.value / baseline.value - 1:+.1%}"
        yield _tile(report, target, metric.title, change, detail, metric.name)
        return
    # For error rates the ratio is inverted, so that 100% always means that nothing was lost.
    higher = metric.better == "higher"
    ratio = final.value / baseline.value if higher else baseline.value / final.value
    if higher and (interval := paired_ratio_interval(final, baseline)):
        detail += f"; 95% interval {interval[0] * 100:.1f}\u2013{interval[1] * 100:.1f}%"
    yield _tile(report, target, f"{metric.title} kept", f"{ratio * 100:.1f}%", detail, metric.name)


def _size(report: Report, target: str) -> Iterator[Headline]:
    pair = _pair(report, "size_bytes", target)
    if pair:
        figure, word = _figure("size_bytes", pair)
        bits = report.find(FINAL, "bits_per_parameter", target)
        detail = _from_to(report, "size_bytes", target)
        # Bits per parameter tell readers how strongly the weights are quantized.
        detail += f"; {format_number(bits.value)} bits a parameter" if bits and bits.value < _FEW_BITS else ""
        yield _tile(report, target, f"{word} on disk", figure, detail, "size_bytes")


def _speed(report: Report, target: str) -> Iterator[Headline]:
    pair = _pair(report, "latency_ms", target)
    paired = report.find(FINAL, "speedup", target)
    # The paired ratio is preferred: it removes noise that both models share.
    if paired is not None:
        figure, word = _ratio(report, paired), "Faster" if paired.value >= 1 else "The speed"
    elif pair is not None:
        figure, word = _figure("latency_ms", pair)
    else:
        return
    detail = "; ".join(filter(None, [_from_to(report, "latency_ms", target), _times_interval(paired)]))
    yield _tile(report, target, f"{word} at batch 1", figure, detail, "speedup", "latency_ms")


def _ratio(report: Report, row: Measurement) -> str:
    """Return a speed-up, marked as approximate if other programs disturbed the measurement."""
    return f"{'~' if unusable_machine(report.environment) else ''}{format_number(row.value)}x"


def _times_interval(row: Measurement | None) -> str:
    if row is None or row.low is None or row.high is None:
        return ""
    return f"95% interval {format_number(row.low)}\u2013{format_number(row.high)}x"


def _generation(report: Report, target: str) -> Iterator[Headline]:
    """Yield the speed-ups of generation and of prompt processing after the shortest prompt."""
    context = shortest_context(report.metrics(target))
    # Reading a prompt is bound by arithmetic, writing by memory, so they are shown apart.
    kinds = (
        ("time_per_output_token", "tokens_per_second", "Faster writing"),
        ("time_to_first_token", "prefill_tokens_per_second", "Faster reading"),
    )
    for metric, rate, label in kinds:
        row = report.find(FINAL, f"speedup_{metric}_context_{context}", target)
        if row is not None:
            detail = _from_to(report, f"{rate}_context_{context}", target) + f", prompt of {context}"
            detail = "; ".join(filter(None, [detail, _times_interval(row)]))
            yield _tile(report, target, label, _ratio(report, row), detail, row.metric)


def _agreement(report: Report, target: str) -> Iterator[Headline]:
    row = report.find(FINAL, "agreement", target)
    if row:
        figure = format_value(describe_metric("agreement", row.unit), row.value)
        explanation = "same answer as the baseline"
        divergence = report.find(FINAL, "kl_divergence", target)
        if divergence:
            explanation = f"same next token as the baseline; KL divergence {format_number(divergence.value)} nats"
        elif changes := _changed_answers(report, target):
            explanation = f"{explanation}; {changes}"
        yield _tile(report, target, "Agreement", figure, explanation, "agreement")


def _changed_answers(report: Report, target: str) -> str:
    """Return how many answers became wrong and right, and whether chance explains the difference (McNemar's test)."""
    pair = _pair(report, "accuracy", target)
    outcomes = [row.raw or () for row in pair or ()]
    if not pair or not outcomes[0] or len(outcomes[0]) != len(outcomes[1]) or {*outcomes[0], *outcomes[1]} - {0.0, 1.0}:
        return ""
    wrong = sum(before > after for before, after in zip(*outcomes, strict=True))
    right = sum(before < after for before, after in zip(*outcomes, strict=True))
    differs = mcnemar_mid_p(wrong, right) <= _SIGNIFICANT
    kind = ("worse" if wrong > right else "better") if differs else "no loss beyond chance"
    return f"{wrong:,} became wrong, {right:,} right ({kind})"


def _figure(name: str, pair: tuple[Measurement, Measurement]) -> tuple[str, str]:
    """Return (`22.4x`, `Smaller`) for a cost before and after."""
    text = format_improvement(describe_metric(name), pair[1].value, pair[0].value)
    if text == "same":
        return "1x", "Same"
    figure, _, word = text.partition(" ")
    return figure, word.capitalize()


def _from_to(report: Report, name: str, target: str) -> str:
    pair = _pair(report, name, target)
    if not pair:
        return ""
    metric = describe_metric(name, pair[0].unit)
    return f"{format_value(metric, pair[0].value)} \u2192 {format_value(metric, pair[1].value)}"


def _tile(report: Report, target: str, label: str, figure: str, detail: str, *metrics: str) -> Headline:
    """Return a tile with the state of the limits on its metrics; a missed limit comes first.

    Args:
        report: Report of the run.
        target: Target of the measurements.
        label: Meaning of the number.
        figure: Number as text.
        detail: Values behind the number.
        *metrics: Metrics whose limits count.
    """
    limits = [
        limit for limit in report.limits if limit.metric in metrics and limit.target == target and not limit.skipped
    ]
    if not limits:
        return Headline(label, figure, detail)
    # A missed limit comes before an inconclusive one, and that before a passed one.
    decisive_limit = min(limits, key=lambda limit: 2 * limit.passed + limit.unknown)
    status: Status = "passed" if decisive_limit.passed else "unknown" if decisive_limit.unknown else "missed"
    return Headline(label, figure, detail, status, decisive_limit.limit)
