"""The few figures a run is judged by: quality kept, times smaller, times faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from compress.report.limits import paired_ratio_interval
from compress.results.formatting import format_value, improvement, significant
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric, quality_metric, shortest_context
from compress.results.report import BASELINE, FINAL, Report

_FEW_BITS = 8.5
"""What is stored in less than 8 bits with their scales is worth saying."""
Status = Literal["passed", "missed", "unknown", "none"]


@dataclass(frozen=True)
class Headline:
    """One tile: ``figure`` is the big number, ``label`` what it counts, ``detail`` where it comes from."""

    label: str
    figure: str
    detail: str
    status: Status = "none"
    limit: str = ""


def verdict(report: Report) -> tuple[Status, str]:
    """Whether all limits were kept, and a sentence that says so."""
    judged = report.judged
    tail = _not_judged(report)
    if report.unmeasured:
        known = f"; of what files weigh, {_kept(report)}" if judged else f", and no limit was judged{tail}"
        what = "Nothing could be run: only sizes are known"
        if report.stand_in:
            what = f"No target could run it: {report.stand_in} measured the weights in place"
        return "missed" if report.missed else "none", f"{what}{known}"
    if not judged:
        return "none", f"No limits were judged{tail}" if report.limits else "The recipe sets no limits"
    unknown = any(limit.unknown for limit in report.limits)
    status: Status = "missed" if report.missed else "unknown" if unknown else "passed"
    sentence = _kept(report)
    return status, f"{sentence[0].upper()}{sentence[1:]}{tail}"


def _kept(report: Report) -> str:
    judged, missed = report.judged, report.missed
    unknown = [limit for limit in judged if limit.unknown]
    chance = [limit for limit in unknown if limit.verdict == "missed"]
    untold = len(unknown) - len(chance)
    further = [f"{untold} of them can't be told" if missed or chance else f"{untold} can't be told"] if untold else []
    further += [f"{len(chance)} missed within chance"] if chance else []
    if missed:
        return ", ".join([f"{len(missed)} of {len(judged)} {_limits(len(judged))} missed", *further])
    if further:
        return ", ".join([f"{len(judged) - len(unknown)} of {len(judged)} {_limits(len(judged))} kept", *further])
    return f"{'the limit is' if len(judged) == 1 else f'all {len(judged)} limits are'} kept"


def _not_judged(report: Report) -> str:
    skipped = [limit for limit in report.limits if limit.skipped]
    gone = {skip.target for skip in report.skipped}
    elsewhere = sum(limit.target not in gone for limit in skipped)
    why = ["target skipped"] if len(skipped) > elsewhere else []
    why += ["for another processor"] if elsewhere else []
    return f" ({len(skipped)} not judged: {', '.join(why)})" if skipped else ""


def _limits(count: int) -> str:
    return "limit" if count == 1 else "limits"


def headlines(report: Report, target: str) -> list[Headline]:
    """The tiles of one target; what was not measured has none."""
    return [
        *_quality(report, target),
        *_size(report, target),
        *_speed(report, target),
        *_generation(report, target),
        *_agreement(report, target),
    ]


def _pair(report: Report, metric: str, target: str) -> tuple[Measurement, Measurement] | None:
    before, after = report.find(BASELINE, metric, target), report.find(FINAL, metric, target)
    return (before, after) if before and after and before.value > 0 and after.value > 0 else None


def _quality(report: Report, target: str) -> Iterator[Headline]:
    metric = quality_metric(report.metrics(target))
    pair = _pair(report, metric.name, target) if metric and metric.quality else None
    if metric is None or pair is None:
        return
    before, after = pair
    detail = _from_to(report, metric.name, target)
    if metric.exponential:
        # The share of a perplexity that was kept would mean nothing to anybody.
        if interval := paired_ratio_interval(after, before):
            detail += f"; 95% interval {interval[0] - 1:+.1%} to {interval[1] - 1:+.1%}"
        change = f"{after.value / before.value - 1:+.1%}"
        yield _tile(report, target, metric.title, change, detail, metric.name)
        return
    higher = metric.better == "higher"
    kept = after.value / before.value if higher else before.value / after.value
    if higher and (interval := paired_ratio_interval(after, before)):
        detail += f"; 95% interval {interval[0] * 100:.1f}\u2013{interval[1] * 100:.1f}%"
    yield _tile(report, target, f"{metric.title} kept", f"{kept * 100:.1f}%", detail, metric.name)


def _size(report: Report, target: str) -> Iterator[Headline]:
    pair = _pair(report, "size_bytes", target)
    if pair:
        figure, word = _figure("size_bytes", pair)
        bits = report.find(FINAL, "bits_per_parameter", target)
        detail = _from_to(report, "size_bytes", target)
        detail += f"; {significant(bits.value)} bits a parameter" if bits and bits.value < _FEW_BITS else ""
        yield _tile(report, target, f"{word} on disk", figure, detail, "size_bytes")


def _speed(report: Report, target: str) -> Iterator[Headline]:
    pair = _pair(report, "latency_ms", target)
    paired = report.find(FINAL, "speedup", target)
    if paired is not None:
        figure, word = f"{significant(paired.value)}x", "Faster" if paired.value >= 1 else "The speed"
    elif pair is not None:
        figure, word = _figure("latency_ms", pair)
    else:
        return
    detail = "; ".join(filter(None, [_from_to(report, "latency_ms", target), _times_interval(paired)]))
    yield _tile(report, target, f"{word} at batch 1", figure, detail, "speedup", "latency_ms")


def _times_interval(row: Measurement | None) -> str:
    if row is None or row.low is None or row.high is None:
        return ""
    return f"95% interval {significant(row.low)}\u2013{significant(row.high)}x"


def _generation(report: Report, target: str) -> Iterator[Headline]:
    """How much faster text is written, and read, after the shortest prompt."""
    context = shortest_context(report.metrics(target))
    kinds = (
        ("time_per_output_token", "tokens_per_second", "Faster writing"),
        ("time_to_first_token", "prefill_tokens_per_second", "Faster reading"),
    )
    for what, rate, label in kinds:
        row = report.find(FINAL, f"speedup_{what}_context_{context}", target)
        if row is not None:
            detail = _from_to(report, f"{rate}_context_{context}", target) + f", prompt of {context}"
            detail = "; ".join(filter(None, [detail, _times_interval(row)]))
            yield _tile(report, target, label, f"{significant(row.value)}x", detail, row.metric)


def _agreement(report: Report, target: str) -> Iterator[Headline]:
    row = report.find(FINAL, "agreement", target)
    if row:
        figure = format_value(describe_metric("agreement", row.unit), row.value)
        about = "same answer as the baseline"
        apart = report.find(FINAL, "kl_divergence", target)
        if apart:
            about = f"same next token as the baseline; KL divergence {significant(apart.value)} nats"
        yield _tile(report, target, "Agreement", figure, about, "agreement")


def _figure(name: str, pair: tuple[Measurement, Measurement]) -> tuple[str, str]:
    """(`22.4x`, `Smaller`) of a cost before and after."""
    text = improvement(describe_metric(name), pair[1].value, pair[0].value)
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
    """With the state of the limits on these metrics: one that is missed goes first."""
    mine = [
        limit for limit in report.limits if limit.metric in metrics and limit.target == target and not limit.skipped
    ]
    if not mine:
        return Headline(label, figure, detail)
    first = min(mine, key=lambda limit: 2 * limit.passed + limit.unknown)
    status: Status = "passed" if first.passed else "unknown" if first.unknown else "missed"
    return Headline(label, figure, detail, status, first.limit)
