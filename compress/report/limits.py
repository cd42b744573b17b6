"""Whether the final model kept the recipe's limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

from compress.numerics.statistics import t_interval
from compress.recipe.recipe import Limit, Verdicts
from compress.results.formatting import format_bytes
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, LimitResult, Skipped

_COUNTS = {"word_error_rate": "word_errors"}
"""Rates of what differs in length from row to row -> the metric that keeps what was counted in each."""


def check_limits(
    limits: Sequence[Limit],
    measurements: Sequence[Measurement],
    baseline_label: str = BASELINE,
    skipped: Sequence[Skipped] = (),
    machines: Mapping[str, Mapping[str, Any]] | None = None,
    verdicts: Verdicts | None = None,
) -> list[LimitResult]:
    """Judge each limit on the rows of the model `final`.

    ``baseline_label`` is the stage (or `start`) that the rows named `baseline` stand for, so that a limit may
    name either. A limit without its rows has not passed, and says why; on a skipped target it is skipped, and on one
    with another processor than it is for. ``machines`` are the environments that targets were measured in;
    ``verdicts`` says which limits that are not kept are failures, all where it is None.
    """
    found = []
    for limit in limits:
        machine = (machines or {}).get(limit.target, {})
        known = _judge(limit, measurements, baseline_label, skipped, machine)
        final = _find(measurements, FINAL, limit)
        result = LimitResult(
            metric=limit.metric,
            target=limit.target,
            limit=limit_text(limit, final.unit if final else ""),
            value=final.value if final else None,
            low=final.low if final else None,
            high=final.high if final else None,
            bound=limit.bound,
            of=limit.of,
            processor=limit.processor,
            passed=known["verdict"] == "kept",
            skipped=known["verdict"] == "skipped",
            **known,
        )
        found.append(result.model_copy(update={"fails": _fails(result, verdicts)}))
    return found


def _fails(result: LimitResult, verdicts: Verdicts | None) -> bool:
    if result.verdict == "cannot tell":
        return verdicts is None or verdicts.cannot_tell == "fail"
    chance = bool(result.within_chance) and verdicts is not None and verdicts.within_chance != "fail"
    return result.verdict == "missed" and not chance


def _judge(
    limit: Limit,
    rows: Sequence[Measurement],
    baseline_label: str,
    skipped: Sequence[Skipped],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """What is found of a limit: its verdict, and the reason, ratio or rows behind that."""
    final = _find(rows, FINAL, limit)
    here = machine.get("processor_class")
    if limit.processor is not None and here is not None and here != limit.processor:
        return {"verdict": "skipped", "reason": f"for {limit.processor}; this was measured on {here}"}
    if final is None:
        gone = next((skip.reason for skip in skipped if skip.target == limit.target), None)
        if gone is not None:
            return {"verdict": "skipped", "reason": f"target skipped: {gone}"}
        return {"verdict": "missed", "reason": _absent(rows, FINAL, limit)}
    if limit.of is None:
        return {"verdict": "kept"} if _within(limit, final.value) else _verdict(limit, final, None, machine)
    other = _find(rows, limit.of, limit)
    if other is None and limit.of in (BASELINE, baseline_label):
        other = _find(rows, BASELINE, limit) or _find(rows, baseline_label, limit)
    if other is None:
        return {"verdict": "missed", "reason": _absent(rows, limit.of, limit)}
    if other.value == 0:
        return {"verdict": "missed", "reason": f"{limit.metric} of {limit.of} is 0, so there is no ratio"}
    ratio = final.value / other.value
    counts = _counted(rows, final), _counted(rows, other)
    low, high = paired_ratio_interval(*counts) or (None, None)
    known = {"verdict": "kept"} if _within(limit, ratio) else _verdict(limit, *counts, machine)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, **known}


def _verdict(limit: Limit, final: Measurement, other: Measurement | None, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a limit that the value alone does not keep."""
    interval = _interval(final, other)
    beyond = interval is None or not any(_within(limit, end) for end in interval)
    if describe_metric(limit.metric, final.unit).timed:
        if unfit := unfit_machine(machine):
            return {"verdict": "cannot tell", "reason": f"the machine was not fit to measure: {unfit}"}
        if interval is None:
            return {"verdict": "cannot tell", "reason": "it was timed too seldom to tell it from noise"}
        if not beyond:
            return {"verdict": "cannot tell", "reason": "noise alone may have missed it"}
        return {"verdict": "missed"}
    if interval is None or not final.raw:
        return {"verdict": "missed"}
    return {
        "verdict": "missed",
        "within_chance": not beyond,
        "rows": len(final.raw),
        "rows_lost": _lost(limit, final, other),
    }


def _interval(final: Measurement, other: Measurement | None) -> tuple[float, float] | None:
    """Of the value or the ratio. Two times that were not paired may both be at the ends of their intervals."""
    if other is None:
        return None if final.low is None or final.high is None else (final.low, final.high)
    paired = paired_ratio_interval(final, other)
    if paired is not None or not describe_metric(final.metric, final.unit).timed:
        return paired
    if final.low is None or final.high is None or not other.low or not other.high:
        return None
    return final.low / other.high, final.high / other.low


def unfit_machine(machine: Mapping[str, Any]) -> str:
    """Why times measured there mean nothing, or nothing if they do."""
    noise = machine.get("noise")
    if not isinstance(noise, Mapping) or noise.get("verdict") != "unusable":
        return ""
    return "; ".join(map(str, noise.get("reasons") or ())) or "no reason given"


def _lost(limit: Limit, final: Measurement, other: Measurement | None) -> int | None:
    """Rows fewer than the other has right, or than the bound takes; None where outcomes are not right or wrong."""
    if final.raw is None or {*final.raw} - {0.0, 1.0} or limit.at_least is None:
        return None
    right = sum(final.raw)
    if other is None:
        return math.ceil(limit.at_least * len(final.raw) - right - 1e-9)
    return None if other.raw is None else round(sum(other.raw) - right)


def _counted(rows: Sequence[Measurement], row: Measurement) -> Measurement:
    """The row that holds what a rate counts, whose ratio is the same for the same words."""
    name = _COUNTS.get(row.metric)
    wanted = (row.model, name, row.target)
    return next((each for each in rows if (each.model, each.metric, each.target) == wanted), row)


def _find(rows: Sequence[Measurement], model: str, limit: Limit) -> Measurement | None:
    wanted = (model, limit.metric, limit.target)
    return next((row for row in rows if (row.model, row.metric, row.target) == wanted), None)


def _absent(rows: Sequence[Measurement], model: str, limit: Limit) -> str:
    measured = sorted({row.metric for row in rows if row.model == model and row.target == limit.target})
    there = f"measured there: {', '.join(measured)}" if measured else "nothing was measured there"
    return f"{limit.metric} of {model} was not measured on {limit.target}; {there}"


def _within(limit: Limit, value: float) -> bool:
    """A value that differs from the bound by rounding alone has reached it; NaN never has."""
    bound = limit.bound
    if math.isclose(value, bound, rel_tol=1e-12):
        return True
    return value > bound if limit.at_least is not None else value < bound


def limit_text(limit: Limit, unit: str = "") -> str:
    """`>= 98.5% of baseline`, `<= 20 MB`, `>= 6x`."""
    sign, bound = ">=" if limit.at_least is not None else "<=", limit.bound
    if limit.of is not None:
        return f"{sign} {bound * 100:.6g}% of {limit.of}"
    metric = describe_metric(limit.metric, unit)
    match metric.style:
        case "percent":
            return f"{sign} {bound if metric.unit == '%' else bound * 100:.6g}%"
        case "bytes":
            return f"{sign} {format_bytes(bound)}"
        case "milliseconds":
            return f"{sign} {bound:.6g} ms"
        case "times":
            return f"{sign} {bound:.6g}x"
        case _:
            return f"{sign} {bound:,.6g} {metric.unit}".rstrip()


def paired_ratio_interval(
    above: Measurement, below: Measurement, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of the ratio of two values measured on the same examples, or None if they were not.

    Of counts both must keep one for each example, whose sum is their value; of others that are no times, what each
    example adds, 0 or 1 of a proportion, whose mean it is. With
    R = mean(y) / mean(x), var(R) = sum((y - R x)^2) / (n (n - 1) mean(x)^2)
    (Cochran 1977, Sampling Techniques, section 6.4). Of perplexities both must keep their logarithm for each window:
    the ratio is e to the mean difference, and the interval Student's.
    """
    y, x = above.raw, below.raw
    if y is None or x is None or len(y) != len(x) or len(y) < 2:
        return None
    metric = describe_metric(above.metric, above.unit)
    if above.metric in _COUNTS.values():
        whole = math.isclose(sum(y), above.value) and math.isclose(sum(x), below.value)
    else:
        values = [math.log(row.value) if metric.exponential else row.value for row in (above, below)]
        means = zip((fmean(y), fmean(x)), values, strict=True)
        whole = all(math.isclose(*both, abs_tol=1e-6) for both in means)
        whole = whole and not metric.timed
    if not whole or not any(x):
        return None
    if metric.exponential:
        low, high = t_interval([yi - xi for yi, xi in zip(y, x, strict=True)], confidence)
        return math.exp(low), math.exp(high)
    ratio, mean, n = fmean(y) / fmean(x), fmean(x), len(x)
    spread = sum((yi - ratio * xi) ** 2 for yi, xi in zip(y, x, strict=True))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(spread / (n * (n - 1))) / mean
    return ratio - half, ratio + half
