"""An invented profile with round numbers that are easy to check, for tests of its views."""

from __future__ import annotations

from typing import Any

from compress.benchmark.profile import MachineLimits, OperatorProfile, ProfileRow, total


def row(name: str, operator: str, **changes: Any) -> ProfileRow:
    """Return a node that takes 1 ms for 20 MFLOP and 1 MB of weights; its compute bound is 0.2 ms."""
    values: dict[str, Any] = {
        "name": name, "operators": (operator,), "layer": "encoder.layer.0.feed-forward", "nodes": 1, "time_ms": 1.0,
        "fp32_operations": 20e6, "int8_operations": 0.0, "weight_bytes": 1e6, "activation_bytes": 0.0,
        "compute_bound_ms": 0.2, "memory_bound_ms": 0.0,
    }  # fmt: skip
    return ProfileRow(**{**values, **changes})


def limits(**changes: Any) -> MachineLimits:
    """Return limits of 100 GFLOP/s, 400 int8 GOP/s, 10 GB/s from memory and 40 GB/s within the cache."""
    values: dict[str, Any] = {
        "fp32_per_s": 100e9, "int8_per_s": 400e9, "memory_bytes_per_s": 10e9, "working_set_bytes_per_s": 40e9,
        "memory_buffer_bytes": 268_435_456, "working_set_bytes": 2_000_000, "last_level_cache_bytes": 33_554_432,
    }  # fmt: skip
    return MachineLimits(**{**values, **changes})


def profile(**changes: Any) -> OperatorProfile:
    """Return a profile of four nodes in three layers.

    They are a compute-bound int8 product, a float product, a lookup, and a node of an uncounted operator.
    """
    rows = (
        row("look_up", "Gather", layer="embeddings.word_embeddings", time_ms=0.5, fp32_operations=0.0,
            weight_bytes=10e6, compute_bound_ms=0.0, memory_bound_ms=0.25),
        row("first", "DynamicQuantizeMatMul", time_ms=1.0, fp32_operations=1e6, int8_operations=160e6,
            compute_bound_ms=0.41),
        row("second", "MatMul", time_ms=2.0),
        row("mystery", "Einsum", layer="encoder.layer.0.attention", time_ms=0.5, uncounted_ms=0.5, fp32_operations=0.0,
            weight_bytes=0.0, compute_bound_ms=0.0),
    )  # fmt: skip
    whole = total("whole model", rows).model_copy(update={"time_ms": 5.0, "uncounted_ms": 0.625})
    values: dict[str, Any] = {
        "artifact": "artifacts/runs/tiny/latest/model", "target": "cpu", "threads": 2, "batch_size": 1, "calls": 16,
        "lengths": (9, 50), "passes": 7, "whole": whole, "low_ms": 4.8, "high_ms": 5.3, "profiled_ms": 6.0,
        "operators_ms": 4.1, "rows": rows, "limits": limits(), "notes": ("noise: quiet (rounds vary by 1.0% at most)",),
        "environment": {"processor": "a processor"},
    }  # fmt: skip
    return OperatorProfile(**{**values, **changes})
