from __future__ import annotations

import math

import pytest

from compress.results.formatting import (
    format_bytes,
    format_count,
    format_improvement,
    format_measurement,
    format_number,
    format_seconds,
    format_value,
)
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric, length_range_of, main_metrics, other_metrics, quality_metric


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.04123, "0.0412"), (1.005, "1.00"), (9.996, "10.0"), (99.96, "100"), (1234.5, "1,234"),
     (-2.5, "-2.50"), (math.inf, "\u221e"), (math.nan, "not a number")],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (91_234_567, "91.2 MB"),
        (4.07e9, "4.07 GB"),
    ],
)
def test_bytes_in_decimal_units(value: float, text: str) -> None:
    assert format_bytes(value) == text


def test_counts_in_thousands() -> None:
    assert [format_count(value) for value in (5, 22_713_986, 7e9)] == ["5", "22.7 M", "7.00 B"]


@pytest.mark.parametrize(
    ("name", "unit", "title", "text", "change"),
    [
        ("time_to_first_token_ms", "ms", "Time to first token", "20.0 ms", "2.00x faster"),
        ("time_per_output_token_ms", "ms", "Time per output token", "20.0 ms", "2.00x faster"),
        ("tokens_per_second", "tokens/s", "Tokens per second", "20.0 tokens/s", "2.00x less"),
        ("prefill_tokens_per_second", "tokens/s", "Prompt tokens per second", "20.0 tokens/s", "2.00x less"),
        ("speedup_time_to_first_token", "x", "Speed-up to the first token", "20.0x", ""),
        ("speedup_time_per_output_token", "x", "Speed-up per output token", "20.0x", ""),
    ],
)
def test_generation_is_described_for_every_context(name: str, unit: str, title: str, text: str, change: str) -> None:
    metric = describe_metric(f"{name}_context_512", unit)
    assert (metric.name, metric.title) == (f"{name}_context_512", f"{title}, context 512")
    assert format_value(metric, 20.0) == text
    assert format_improvement(metric, 20.0, 40.0) == change
    assert metric.better == ("lower" if unit == "ms" else "higher")
    assert describe_metric(f"{name}s_context_512", unit).title != metric.title


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.250 s"), (45.26, "45.3 s"), (372, "6 min 12 s"), (7500, "2 h 05 min")]
)
def test_durations(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("name", "unit", "value", "text"),
    [
        ("accuracy", "ratio", 0.8735, "87.35%"),
        ("accuracy", "%", 87.35, "87.35%"),
        ("exact_match", "ratio", 0.5, "50.00%"),
        ("latency_ms", "ms", 0.2314, "0.231 ms"),
        ("latency_ms", "ms", 12_300, "12.3 s"),
        ("parameters", "parameters", 22_713_728, "22.7 M"),
        ("throughput", "examples/s", 5772.4, "5,772 examples/s"),
        ("speedup", "x", 11.72, "11.7x"),
        ("made_up", "widgets", 3.14159, "3.14 widgets"),
    ],
)
def test_values_carry_their_unit(name: str, unit: str, value: float, text: str) -> None:
    assert format_value(describe_metric(name, unit), value) == text


@pytest.mark.parametrize(
    ("name", "value", "reference", "text"),
    [
        ("size_bytes", 5.0, 100.0, "20.0x smaller"),
        ("size_bytes", 100.0, 50.0, "2.00x larger"),
        ("latency_ms", 0.5, 3.0, "6.00x faster"),
        ("throughput", 10.0, 5.0, "2.00x more"),
        ("accuracy", 0.788, 0.80, "98.50%"),
        ("parameters", 10.0, 10.0, "same"),
        ("agreement", 0.9, 1.0, ""),
        ("latency_ms", 1.0, 0.0, ""),
    ],
)
def test_improvement_words(name: str, value: float, reference: float, text: str) -> None:
    assert format_improvement(describe_metric(name), value, reference) == text


def test_an_interval_names_a_shared_unit_once() -> None:
    row = {"model": "final", "target": "cpu", "unit": "ms", "metric": "latency_ms"}
    assert format_measurement(Measurement(value=2.71, low=2.67, high=2.75, **row)) == "2.71 ms (2.67\u20132.75 ms)"
    wide = {**row, "metric": "size_bytes", "unit": "bytes"}
    assert format_measurement(Measurement(value=2000, low=900, high=3000, **wide)) == "2.00 kB (900 B\u20133.00 kB)"


def test_columns_and_the_rest_hold_every_metric_once() -> None:
    units = {
        "zeta": "",
        "latency_ms": "ms",
        "latency_ms_length_9_16": "ms",
        "accuracy": "ratio",
        "size_bytes": "bytes",
    }
    main = [metric.name for metric in main_metrics(units)]
    assert main == ["accuracy", "size_bytes", "latency_ms"]
    assert [metric.name for metric in other_metrics(units)] == ["zeta", "latency_ms_length_9_16"]


def test_the_quality_is_the_tasks_own_metric_before_agreement() -> None:
    quality = quality_metric({"agreement": "ratio", "size_bytes": "bytes", "word_error_rate": "ratio"})
    assert quality is not None
    assert (quality.name, quality.better) == ("word_error_rate", "lower")
    fallback = quality_metric({"agreement": "ratio"})
    assert fallback is not None
    assert fallback.name == "agreement"
    assert quality_metric({"size_bytes": "bytes"}) is None


def test_length_buckets_are_read_from_the_name() -> None:
    assert length_range_of("latency_ms_length_9_16") == (9, 16)
    assert length_range_of("latency_ms_batch_32") is None
    assert describe_metric("latency_ms_length_9_16").title == "Latency, 9\u201316 tokens"
