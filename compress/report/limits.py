"""Judgement of the final model by the recipe's limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean
from typing import Any

from compress.numerics.statistics import t_interval
from compress.recipe.recipe import Limit, Verdicts
from compress.results.formatting import format_bytes
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, LimitResult, Measurement, SkippedTarget, Verdict

_COUNTS = {"word_error_rate": "word_errors"}
"""Error rates of rows of different lengths -> the metric that keeps the errors of each row."""
INSIDE = "the limit is inside the interval"
"""Reason of an inconclusive limit."""


def check_limits(
    limits: Sequence[Limit],
    measurements: Sequence[Measurement],
    baseline_label: str = BASELINE,
    skipped: Sequence[SkippedTarget] = (),
    machines: Mapping[str, Mapping[str, object]] | None = None,
    verdicts: Verdicts | None = None,
) -> list[LimitResult]:
    """Judge each limit on the measurements of the model `final`.

    A limit without measurements is missed, and its reason says so. On a skipped target, or on a processor other than
    its own, it is skipped.

    Args:
        limits: Limits of the recipe.
        measurements: Measurements of the run.
        baseline_label: Stage (or `start`) that the rows named `baseline` stand for. A limit may use either name.
        skipped: Skipped targets.
        machines: Environment in which each target was measured.
        verdicts: Effect of an inconclusive limit on the exit code. None: the defaults.
    """
    results = []
    for limit in limits:
        machine = (machines or {}).get(limit.target, {})
        # Each limit is judged on its own. Several limits on one metric may have different verdicts.
        judgement = _judge(limit, measurements, baseline_label, skipped, machine)
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
            passed=judgement["verdict"] == "kept",
            skipped=judgement["verdict"] == "skipped",
            **judgement,
        )
        results.append(result.model_copy(update={"fails": _fails(result, verdicts or Verdicts())}))
    return results


def interval_verdict(limit: Limit, low: float, high: float) -> Verdict:
    """Return the verdict on a value with the interval ``low``..``high``. Every limit is judged by this rule.

    *kept* if the whole interval meets the limit, *missed* if no part of it does, *cannot tell* (inconclusive)
    otherwise. An exact value has an interval of width 0. NaN misses every limit.
    """
    meets = {_within(limit, low), _within(limit, high)}
    if len(meets) == 2:
        return "cannot tell"
    return "kept" if meets == {True} else "missed"


def _fails(result: LimitResult, verdicts: Verdicts) -> bool:
    """Return whether the exit code is 1 because of the limit."""
    if result.verdict != "cannot tell":
        return result.verdict == "missed"
    return verdicts.action(bool(result.within_chance)) == "fail"


def _judge(
    limit: Limit,
    rows: Sequence[Measurement],
    baseline_label: str,
    skipped: Sequence[SkippedTarget],
    machine: Mapping[str, object],
) -> dict[str, Any]:
    """Return the verdict of a limit with its reason, ratio or rows.

    Args:
        limit: Limit of the recipe.
        rows: Measurements of the run.
        baseline_label: Stage that the rows named `baseline` stand for.
        skipped: Skipped targets.
        machine: Environment of the target.
    """
    final = _find(rows, FINAL, limit)
    processor = machine.get("processor_class")
    # A limit may apply to one kind of processor only.
    if limit.processor is not None and processor is not None and processor != limit.processor:
        return {"verdict": "skipped", "reason": f"for {limit.processor}; this was measured on {processor}"}
    if final is None:
        skip_reason = next((skip.reason for skip in skipped if skip.target == limit.target), None)
        if skip_reason is not None:
            return {"verdict": "skipped", "reason": f"target skipped: {skip_reason}"}
        return {"verdict": "missed", "reason": _absent(rows, FINAL, limit)}
    # An absolute bound needs no other model.
    if limit.of is None:
        return _verdict(limit, final, None, machine)
    reference = _find(rows, limit.of, limit)
    # The baseline may be named by its role or by its stage.
    if reference is None and limit.of in (BASELINE, baseline_label):
        reference = _find(rows, BASELINE, limit) or _find(rows, baseline_label, limit)
    if reference is None:
        return {"verdict": "missed", "reason": _absent(rows, limit.of, limit)}
    # A ratio to zero has no value, so the limit cannot be met.
    if reference.value == 0:
        return {"verdict": "missed", "reason": f"{limit.metric} of {limit.of} is 0, so there is no ratio"}
    ratio = final.value / reference.value
    counts = _counted(rows, final), _counted(rows, reference)
    low, high = paired_ratio_interval(*counts) or (None, None)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, **_verdict(limit, *counts, machine, ratio)}


def _verdict(
    limit: Limit,
    final: Measurement,
    other: Measurement | None,
    machine: Mapping[str, object],
    ratio: float | None = None,
) -> dict[str, Any]:
    """Return the verdict of a limit, with the reason if it is inconclusive.

    Args:
        limit: Limit of the recipe.
        final: Measurement of the final model.
        other: Measurement of the model that the limit refers to, or None.
        machine: Environment of the target.
        ratio: Value of the final model over that of the other, or None.
    """
    value = final.value if ratio is None else ratio
    interval = _interval(final, other)
    verdict = interval_verdict(limit, *(interval or (value, value)))
    if describe_metric(limit.metric, final.unit).timed:
        # Times of an unsuitable machine, and single times, prove no miss.
        if verdict != "kept" and (noise := unusable_machine(machine)):
            return {"verdict": "cannot tell", "reason": f"the machine was too noisy: {noise}"}
        if verdict == "missed" and interval is None:
            return {"verdict": "cannot tell", "reason": "too few timings to distinguish it from noise"}
    result: dict[str, Any] = {"verdict": verdict}
    if verdict == "cannot tell":
        result["reason"] = INSIDE
    if verdict != "kept" and interval is not None and final.raw and not describe_metric(limit.metric, final.unit).timed:
        result["within_chance"] = verdict == "cannot tell"
        result["rows"] = len(final.raw)
        result["rows_lost"] = _lost(limit, final, other)
    return result


def _interval(final: Measurement, other: Measurement | None) -> tuple[float, float] | None:
    """Return the interval of the value or the ratio.

    Two times that were not paired may both lie at the ends of their intervals.
    """
    if other is None:
        return None if final.low is None or final.high is None else (final.low, final.high)
    paired = paired_ratio_interval(final, other)
    if paired is not None or not describe_metric(final.metric, final.unit).timed:
        return paired
    if final.low is None or final.high is None or not other.low or not other.high:
        return None
    return final.low / other.high, final.high / other.low


def unusable_machine(machine: Mapping[str, object]) -> str:
    """Return why times measured on the machine are meaningless, or nothing if they are meaningful."""
    noise = machine.get("noise")
    if not isinstance(noise, Mapping) or noise.get("verdict") != "unusable":
        return ""
    return "; ".join(map(str, noise.get("reasons") or ())) or "no reason given"


def _lost(limit: Limit, final: Measurement, other: Measurement | None) -> int | None:
    """Return the number of fewer correct rows, or None if outcomes are not correct or wrong."""
    if final.raw is None or {*final.raw} - {0.0, 1.0} or limit.at_least is None:
        return None
    right = sum(final.raw)
    if other is None:
        return math.ceil(limit.at_least * len(final.raw) - right - 1e-9)
    return None if other.raw is None else round(sum(other.raw) - right)


def _counted(rows: Sequence[Measurement], row: Measurement) -> Measurement:
    """Return the measurement with the counts behind an error rate, whose ratio is the same for the same words."""
    name = _COUNTS.get(row.metric)
    key = (row.model, name, row.target)
    return next(
        (measurement for measurement in rows if (measurement.model, measurement.metric, measurement.target) == key), row
    )


def _find(rows: Sequence[Measurement], model: str, limit: Limit) -> Measurement | None:
    key = (model, limit.metric, limit.target)
    return next((row for row in rows if (row.model, row.metric, row.target) == key), None)


def _absent(rows: Sequence[Measurement], model: str, limit: Limit) -> str:
    measured = sorted({row.metric for row in rows if row.model == model and row.target == limit.target})
    available = f"measured there: {', '.join(measured)}" if measured else "nothing was measured there"
    return f"{limit.metric} of {model} was not measured on {limit.target}; {available}"


def _within(limit: Limit, value: float) -> bool:
    """Return whether the value meets the limit. A value within rounding of the bound meets it, NaN never does."""
    bound = limit.bound
    # Otherwise a bound such as 98.5% could be missed by a rounding error in the 16th digit.
    if math.isclose(value, bound, rel_tol=1e-12):
        return True
    return value > bound if limit.at_least is not None else value < bound


def limit_text(limit: Limit, unit: str = "") -> str:
    """Return `>= 98.5% of baseline`, `<= 20 MB` or `>= 6x`."""
    sign, bound = ">=" if limit.at_least is not None else "<=", limit.bound
    if limit.of is not None:
        return f"{sign} {bound * 100:.6g}% of {limit.of}"
    metric = describe_metric(limit.metric, unit)
    # The unit follows the metric, as people write it.
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
    """Return the interval of the ratio of two values measured on the same examples, or None if they were not.

    Counts must keep one count for each example, whose sum is their value. Other metrics except times must keep the
    contribution of each example (0 or 1 for a proportion), whose mean is their value. With
    R = mean(y) / mean(x), var(R) = sum((y - R x)^2) / (n (n - 1) mean(x)^2)
    (Cochran 1977, Sampling Techniques, section 6.4). Perplexities must keep the logarithm for each sequence: the ratio
    is e to the mean difference, and the interval is Student's.
    """
    y, x = above.raw, below.raw
    if y is None or x is None or len(y) != len(x) or len(y) < 2:
        return None
    metric = describe_metric(above.metric, above.unit)
    # The kept samples must be those that the values were computed from.
    if above.metric in _COUNTS.values():
        is_paired = math.isclose(sum(y), above.value) and math.isclose(sum(x), below.value)
    else:
        values = [math.log(row.value) if metric.exponential else row.value for row in (above, below)]
        means = zip((fmean(y), fmean(x)), values, strict=True)
        is_paired = all(math.isclose(*both, abs_tol=1e-6) for both in means)
        is_paired = is_paired and not metric.timed
    if not is_paired or not any(x):
        return None
    if metric.exponential:
        low, high = t_interval([yi - xi for yi, xi in zip(y, x, strict=True)], confidence)
        return math.exp(low), math.exp(high)
    # The delta method on pairs: examples are independent, the two values of an example are not.
    ratio, mean, n = fmean(y) / fmean(x), fmean(x), len(x)
    spread = sum((yi - ratio * xi) ** 2 for yi, xi in zip(y, x, strict=True))
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(spread / (n * (n - 1))) / mean
    return ratio - half_width, ratio + half_width
