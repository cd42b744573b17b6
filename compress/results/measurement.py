"""Measurement: the record of everything that is measured."""

from __future__ import annotations

from pydantic import Field

from compress.utils.pydantic_models import Frozen

MACHINE = "machine"
"""Name in place of a model: reference work that was timed beside the models, to relate sessions."""


class Measurement(Frozen):
    """One measured quantity of one model on one target.

    ``low`` and ``high`` bound the 95% confidence interval. Both are ``None`` for exact quantities such as bytes.
    ``raw`` holds the samples behind a statistic: latencies in ms, or outcomes of examples as 0 or 1.
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
