"""What came of one trial: figures, the rows behind them, and how far inside its limits it lies."""

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
    """One stage of a trial: the key of its output, what it took, and whether that was here already."""

    label: str
    key: str
    seconds: float
    cached: bool


class TrialOutcome(Frozen):
    """A trial that has ended. ``model`` is the digest of its final files; ``seconds`` is what the trial took in all.

    ``final`` and ``baseline`` are figures on the rows that choose, by metric; ``rows`` has, for `final` and `baseline`
    and each metric of a limit, the outcome of each row (`pack_rows`). With an ``error`` there is nothing else.
    """

    model: str = ""
    final: dict[str, float] = {}
    baseline: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    """95% intervals of figures of the final model, of those that have one."""
    rows: dict[str, dict[str, str]] = {}
    stages: tuple[StageCost, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    def measurement(self, model: str, metric: str) -> Measurement | None:
        """A figure as the row that it was, with its raw outcomes where they are kept."""
        value = (self.final if model == FINAL else self.baseline).get(metric)
        if value is None:
            return None
        kept = self.rows.get(model, {}).get(metric)
        raw = None if kept is None else unpack_rows(kept)
        low, high = self.spread.get(metric, (None, None)) if model == FINAL else (None, None)
        n = 1 if raw is None else len(raw)
        return Measurement(
            model=model, metric=metric, target="", value=value, unit="", low=low, high=high, n=n, raw=raw
        )


def pack_rows(outcomes: Sequence[float]) -> str:
    """Outcomes of rows as text: bits where all are 0 or 1, else numbers of 8 bytes."""
    values = np.asarray(outcomes, dtype="<f8")
    if np.isin(values, (0.0, 1.0)).all():
        return f"bits:{len(values)}:{base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()}"
    return f"f64:{len(values)}:{base64.b64encode(values.tobytes()).decode()}"


@functools.lru_cache(maxsize=4096)
def unpack_rows(text: str) -> tuple[float, ...]:
    """The inverse of `pack_rows`."""
    kind, count, data = text.split(":")
    content = base64.b64decode(data)
    if kind == "bits":
        bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))[: int(count)]
        return tuple(float(bit) for bit in bits)
    return tuple(float(value) for value in np.frombuffer(content, dtype="<f8"))


def constraint_margin(limit: Limit, outcome: TrialOutcome, confidence: float) -> Estimate | None:
    """How far inside a limit a trial lies, as a share of the bound: at least 0 keeps it. None if it wasn't measured.

    Of quality the interval is paired with the baseline where the limit is relative; its lower end is reached or passed
    with probability ``confidence``. Of bytes it has no width. Times are taken as they were measured.
    """
    final = outcome.measurement(FINAL, limit.metric)
    other = None if limit.of is None else outcome.measurement(BASELINE, limit.metric)
    if final is None or (limit.of is not None and (other is None or other.value == 0)):
        return None
    value = final.value if other is None else final.value / other.value
    low, high = _interval(final, other, 2 * confidence - 1)
    found = Estimate(value, value if low is None else low, value if high is None else high)
    if limit.at_least is not None:
        return Estimate(*(_inside(edge, limit.bound) for edge in found))
    return Estimate(*(-_inside(edge, limit.bound) for edge in (found.value, found.high, found.low)))


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


def difference(limit: Limit, one: TrialOutcome, other: TrialOutcome, confidence: float) -> Estimate | None:
    """How much further inside a limit on quality ``one`` lies than ``other``, both judged on the same rows.

    None where outcomes of rows aren't kept. As a share of the bound, as `constraint_margin`.
    """
    above, below = (each.measurement(FINAL, limit.metric) for each in (one, other))
    if above is None or below is None or above.raw is None or below.raw is None or len(above.raw) != len(below.raw):
        return None
    scale = limit.bound
    if limit.of is not None:
        base = one.measurement(BASELINE, limit.metric)
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


def figures(measurements: Sequence[Measurement], wanted: Sequence[str]) -> Mapping[str, object]:
    """The fields of an `TrialOutcome` from measured rows; outcomes of rows are kept of the metrics that are ``wanted``."""
    final, baseline, spread = dict[str, float](), dict[str, float](), dict[str, tuple[float, float]]()
    rows: dict[str, dict[str, str]] = {FINAL: {}, BASELINE: {}}
    for row in measurements:
        if row.model not in rows:
            continue
        (final if row.model == FINAL else baseline)[row.metric] = row.value
        if row.model == FINAL and row.low is not None and row.high is not None:
            spread[row.metric] = (row.low, row.high)
        relative = describe_metric(row.metric, row.unit).relative
        if row.metric in wanted and row.raw and not (relative and row.model == BASELINE):
            rows[row.model][row.metric] = pack_rows(row.raw)
    return {"final": final, "baseline": baseline, "spread": spread, "rows": rows}
