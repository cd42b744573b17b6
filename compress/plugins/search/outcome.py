"""Outcome of a trial: metrics, the rows behind them, and the margins of its limits."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from compress.numerics.statistics import Estimate
from compress.recipe.recipe import Limit
from compress.report.limits import paired_ratio_interval
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL
from compress.utils.pydantic_models import Frozen


class StageCost(Frozen):
    """Cache key of a stage's output, its time, and whether the output was cached."""

    label: str
    key: str
    seconds: float
    cached: bool


class TrialOutcome(Frozen):
    """Outcome of a trial that has ended. With an ``error``, every other field but ``seconds`` is empty.

    Attributes:
        model: Digest of the final model's files.
        final: Metrics of the final model on the selection rows.
        baseline: The same metrics of the baseline.
        spread: 95% intervals of the final model's metrics that have one.
        rows: Outcomes of single rows (`pack_rows`) by model (`final`, `baseline`) and metric.
        stages: Cost of each stage.
        seconds: Time of the whole trial.
        error: First line of the error that ended the trial.
    """

    model: str = ""
    final: dict[str, float] = {}
    baseline: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    rows: dict[str, dict[str, str]] = {}
    stages: tuple[StageCost, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    def measurement(self, model: str, metric: str) -> Measurement | None:
        """Return a metric as a measurement, with the outcomes of single rows where they are stored."""
        value = (self.final if model == FINAL else self.baseline).get(metric)
        if value is None:
            return None
        packed = self.rows.get(model, {}).get(metric)
        raw = None if packed is None else unpack_rows(packed)
        low, high = self.spread.get(metric, (None, None)) if model == FINAL else (None, None)
        n = 1 if raw is None else len(raw)
        return Measurement(
            model=model, metric=metric, target="", value=value, unit="", low=low, high=high, n=n, raw=raw
        )


def pack_rows(outcomes: Sequence[float]) -> str:
    """Encode outcomes of rows as text: as bits where all are 0 or 1, else as 8-byte floats."""
    values = np.asarray(outcomes, dtype="<f8")
    if np.isin(values, (0.0, 1.0)).all():
        return f"bits:{len(values)}:{base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()}"
    return f"f64:{len(values)}:{base64.b64encode(values.tobytes()).decode()}"


@functools.lru_cache(maxsize=4096)
def unpack_rows(text: str) -> tuple[float, ...]:
    """Decode the text of `pack_rows`."""
    kind, count, data = text.split(":")
    content = base64.b64decode(data)
    if kind == "bits":
        bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))[: int(count)]
        return tuple(float(bit) for bit in bits)
    return tuple(float(value) for value in np.frombuffer(content, dtype="<f8"))


def constraint_margin(limit: Limit, outcome: TrialOutcome, confidence: float) -> Estimate | None:
    """Return the margin of a limit as a share of its bound: at least 0 meets it. None if it was not measured.

    The interval of a quality metric is paired with the baseline where the limit is relative. Its lower end is met with
    probability ``confidence``. Sizes and times have no interval.
    """
    final = outcome.measurement(FINAL, limit.metric)
    other = None if limit.of is None else outcome.measurement(BASELINE, limit.metric)
    if final is None or (limit.of is not None and (other is None or other.value == 0)):
        return None
    value = final.value if other is None else final.value / other.value
    low, high = _interval(final, other, 2 * confidence - 1)
    estimate = Estimate(value, value if low is None else low, value if high is None else high)
    if limit.at_least is not None:
        return Estimate(*(_inside(edge, limit.bound) for edge in estimate))
    return Estimate(*(-_inside(edge, limit.bound) for edge in (estimate.value, estimate.high, estimate.low)))


def _inside(value: float, bound: float) -> float:
    return value / bound - 1 if bound else value


def _interval(final: Measurement, other: Measurement | None, confidence: float) -> tuple[float | None, float | None]:
    if not describe_metric(final.metric).quality:
        return None, None
    if other is not None:
        return paired_ratio_interval(final, other, confidence) or (None, None)
    if final.low is None or final.high is None:
        return None, None
    scale = NormalDist().inv_cdf((1 + confidence) / 2) / NormalDist().inv_cdf(0.975)
    value = final.value
    return value - (value - final.low) * scale, value + (final.high - value) * scale


def paired_difference(limit: Limit, first: TrialOutcome, second: TrialOutcome, confidence: float) -> Estimate | None:
    """Return how much larger the margin of ``first`` is than that of ``second``, judged on the same rows.

    Args:
        limit: Limit on quality.
        first: Outcome of one recipe.
        second: Outcome of the other recipe.
        confidence: One-sided confidence of the interval.

    Returns:
        Difference as a share of the bound, as in `constraint_margin`; None where outcomes of rows are not stored.
    """
    above, below = (outcome.measurement(FINAL, limit.metric) for outcome in (first, second))
    if above is None or below is None or above.raw is None or below.raw is None or len(above.raw) != len(below.raw):
        return None
    # Gaps are scaled so that they are shares of the bound.
    scale = limit.bound
    if limit.of is not None:
        base = first.measurement(BASELINE, limit.metric)
        scale *= base.value if base is not None else 1.0
    if describe_metric(limit.metric).exponential:
        # Windows' logarithms: a difference of them is a ratio of the figures.
        scale = limit.bound
    if not scale:
        return None
    sign = 1.0 if limit.at_least is not None else -1.0
    gaps = sign * (np.asarray(above.raw) - np.asarray(below.raw)) / scale
    half = NormalDist().inv_cdf(confidence) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    middle = float(gaps.mean())
    return Estimate(middle, middle - half, middle + half)


def outcome_fields(measurements: Sequence[Measurement], row_metrics: Sequence[str]) -> Mapping[str, object]:
    """Return the fields of a `TrialOutcome` from measurements; outcomes of rows are stored for ``row_metrics`` only."""
    final, baseline, spread = dict[str, float](), dict[str, float](), dict[str, tuple[float, float]]()
    rows: dict[str, dict[str, str]] = {FINAL: {}, BASELINE: {}}
    for row in measurements:
        if row.model not in rows:
            continue
        (final if row.model == FINAL else baseline)[row.metric] = row.value
        if row.model == FINAL and row.low is not None and row.high is not None:
            spread[row.metric] = (row.low, row.high)
        relative = describe_metric(row.metric, row.unit).relative
        if row.metric in row_metrics and row.raw and not (relative and row.model == BASELINE):
            rows[row.model][row.metric] = pack_rows(row.raw)
    return {"final": final, "baseline": baseline, "spread": spread, "rows": rows}
