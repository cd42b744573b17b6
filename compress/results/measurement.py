"""The one row in which everything measured is written down."""

from __future__ import annotations

from pydantic import Field

from compress.utils.pydantic_models import Frozen

MACHINE = "machine"
"""In place of a model: fixed work that was timed beside the models, to relate sessions by."""


class Measurement(Frozen):
    """One measured quantity of one model on one target.

    ``low`` and ``high`` bound the 95% confidence interval; both are ``None`` for exact quantities such as bytes.
    ``raw`` keeps the samples behind a statistic (latencies in ms; per-example outcomes as 0 or 1).
    """

    model: str = Field(description="`baseline`, a stage's label, `final`, or `machine`")
    metric: str
    target: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = Field(1, ge=1, description="number of samples behind the value")
    raw: tuple[float, ...] | None = None
