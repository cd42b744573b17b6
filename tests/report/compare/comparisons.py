"""Builders of invented reports for the tests of comparisons; the figures are no measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.numerics.statistics import wilson_interval
from compress.results.report import DataRecord, Measurement, Report

MACHINE = {
    "processor": "an invented processor", "features": ["avx2"], "cores": 4, "cores_granted": 4, "cores_quota": None,
    "governor": None, "memory_bytes": 16_000_000_000, "memory_limit_bytes": None, "platform": "Linux x86_64",
    "kernel": "6.1.0", "python": "3.11.7", "packages": {"onnxruntime": "1.32.0"}, "threads": 2,
    "runtime_settings": {"final": {"provider": "CPUExecutionProvider"}},
}  # fmt: skip
DIGEST = "ab" * 32


def row(metric: str, value: float, unit: str = "ms", **more: Any) -> Measurement:
    """Return a measurement of the final model on the target cpu."""
    return Measurement.model_validate(
        {"model": "final", "metric": metric, "target": "cpu", "value": value, "unit": unit, **more}
    )


def time_row(metric: str, value: float, spread: float = 0.01, **more: Any) -> Measurement:
    """Return a measurement with an interval from value / (1 + ``spread``) to value * (1 + ``spread``)."""
    return row(metric, value, low=value / (1 + spread), high=value * (1 + spread), n=100, **more)


def accuracy(outcomes: Sequence[float], **more: Any) -> Measurement:
    """Return an accuracy measurement with Wilson interval from outcomes (1 for correct, 0 for wrong)."""
    n = len(outcomes)
    low, high = wilson_interval(int(sum(outcomes)), n)
    raw = tuple(map(float, outcomes))
    return row("accuracy", sum(outcomes) / n, "ratio", raw=raw, n=n, low=low, high=high, **more)


def outcomes(right: int, of: int = 2000, lost: int = 0, gained: int = 0) -> list[float]:
    """Return ``of`` outcomes: ``right`` correct, of which ``lost`` become wrong, and ``gained`` more correct ones."""
    return [1.0 if (i >= lost if i < right else i < right + gained) else 0.0 for i in range(of)]


def report(*rows: Measurement, **changes: Any) -> Report:
    """Return a report with those measurements."""
    values: dict[str, Any] = {
        "recipe": "made-up",
        "started": "2026-11-25T12:00:00+00:00",
        "environment": MACHINE,
        "measurements": rows,
        "data": DataRecord(digest=DIGEST, rows=2000),
        **changes,
    }
    return Report(**values)
