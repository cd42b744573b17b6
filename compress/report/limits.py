"""Whether the final model kept the recipe's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from compress.measurement import Measurement
from compress.metrics import describe_metric, format_bytes
from compress.numerics.statistics import t_interval
from compress.report.schema import BASELINE, FINAL, LimitResult, Skipped

if TYPE_CHECKING:
    from compress.recipe.recipe import Limit


def check_limits(
    limits: Sequence[Limit],
    measurements: Sequence[Measurement],
    baseline_label: str = BASELINE,
    skipped: Sequence[Skipped] = (),
) -> list[LimitResult]:
    """Judge each limit on the rows of the model `final`.

    ``baseline_label`` is the stage (or `start`) that the rows named `baseline` stand for, so that a limit may
    name either. A limit without its rows has not passed, and says why; on a skipped target it is skipped.
    """
    return [_judge(limit, measurements, baseline_label, skipped) for limit in limits]


def _judge(limit: Limit, rows: Sequence[Measurement], baseline_label: str, skipped: Sequence[Skipped]) -> LimitResult:
    final = _find(rows, FINAL, limit)
    result = _unjudged(limit, final)
    for skip in skipped:
        if skip.target == limit.target and final is None:
            return result.model_copy(update={"skipped": True, "reason": f"target skipped: {skip.reason}"})
    if final is None:
        return result.model_copy(update={"reason": _absent(rows, FINAL, limit)})
    if limit.of is None:
        return result.model_copy(update={"passed": _within(limit, final.value)})
    other = _find(rows, limit.of, limit)
    if other is None and limit.of in (BASELINE, baseline_label):
        other = _find(rows, BASELINE, limit) or _find(rows, baseline_label, limit)
    if other is None:
        return result.model_copy(update={"reason": _absent(rows, limit.of, limit)})
    if other.value == 0:
        return result.model_copy(update={"reason": f"{limit.metric} of {limit.of} is 0, so there is no ratio"})
    ratio = final.value / other.value
    low, high = paired_ratio_interval(final, other) or (None, None)
    found = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "passed": _within(limit, ratio)}
    return result.model_copy(update=found)


def _unjudged(limit: Limit, final: Measurement | None) -> LimitResult:
    return LimitResult(
        metric=limit.metric,
        target=limit.target,
        limit=limit_text(limit, final.unit if final else ""),
        value=final.value if final else None,
        low=final.low if final else None,
        high=final.high if final else None,
        bound=limit.at_least if limit.at_least is not None else limit.at_most,
        of=limit.of,
        passed=False,
    )


def _find(rows: Sequence[Measurement], model: str, limit: Limit) -> Measurement | None:
    wanted = (model, limit.metric, limit.target)
    return next((row for row in rows if (row.model, row.metric, row.target) == wanted), None)


def _absent(rows: Sequence[Measurement], model: str, limit: Limit) -> str:
    measured = sorted({row.metric for row in rows if row.model == model and row.target == limit.target})
    there = f"measured there: {', '.join(measured)}" if measured else "nothing was measured there"
    return f"{limit.metric} of {model} was not measured on {limit.target}; {there}"


def _within(limit: Limit, value: float) -> bool:
    """A value that differs from the bound by rounding alone has reached it; NaN never has."""
    bound = limit.at_least if limit.at_least is not None else limit.at_most
    assert bound is not None
    if math.isclose(value, bound, rel_tol=1e-12):
        return True
    return value > bound if limit.at_least is not None else value < bound


def limit_text(limit: Limit, unit: str = "") -> str:
    """`>= 98.5% of baseline`, `<= 20 MB`, `>= 6x`."""
    sign, bound = (">=", limit.at_least) if limit.at_least is not None else ("<=", limit.at_most)
    assert bound is not None
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


def paired_ratio_interval(above: Measurement, below: Measurement) -> tuple[float, float] | None:
    """95% interval of the ratio of two values measured on the same examples, or None if they were not.

    Of proportions both must keep one outcome of 0 or 1 for each example, whose mean is their value. With
    R = mean(y) / mean(x), var(R) = sum((y - R x)^2) / (n (n - 1) mean(x)^2)
    (Cochran 1977, Sampling Techniques, section 6.4). Of perplexities both must keep their logarithm for each window:
    the ratio is e to the mean difference, and the interval Student's.
    """
    if describe_metric(above.metric).exponential:
        return _ratio_of_exponentials(above, below)
    y, x = above.raw, below.raw
    if y is None or x is None or len(y) != len(x) or len(y) < 2 or {*y, *x} - {0.0, 1.0}:
        return None
    if not (math.isclose(fmean(y), above.value, abs_tol=1e-6) and math.isclose(fmean(x), below.value, abs_tol=1e-6)):
        return None
    ratio, mean, n = fmean(y) / fmean(x), fmean(x), len(x)
    spread = sum((yi - ratio * xi) ** 2 for yi, xi in zip(y, x, strict=True))
    half = NormalDist().inv_cdf(0.975) * math.sqrt(spread / (n * (n - 1))) / mean
    return ratio - half, ratio + half


def _ratio_of_exponentials(above: Measurement, below: Measurement) -> tuple[float, float] | None:
    y, x = above.raw, below.raw
    if y is None or x is None or len(y) != len(x) or len(y) < 2:
        return None
    if not all(math.isclose(fmean(row.raw or ()), math.log(row.value), abs_tol=1e-6) for row in (above, below)):
        return None
    low, high = t_interval([yi - xi for yi, xi in zip(y, x, strict=True)])
    return math.exp(low), math.exp(high)
