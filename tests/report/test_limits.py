"""Limits, from numbers worked by hand."""

from __future__ import annotations

import math
import random

import pytest

from compress.measurement import Measurement
from compress.recipe.recipe import Limit
from compress.report.limits import check_limits, limit_text, paired_ratio_interval
from compress.report.schema import Skipped


def row(model: str, metric: str, value: float, target: str = "cpu", **more: object) -> Measurement:
    fields = {"model": model, "metric": metric, "target": target, "value": value, "unit": "", **more}
    return Measurement.model_validate(fields)


ROWS = [
    row("baseline", "accuracy", 0.80),
    row("distill", "accuracy", 0.79),
    row("final", "accuracy", 0.788, low=0.77, high=0.806),
    row("baseline", "size_bytes", 200.0),
    row("final", "size_bytes", 25.0),
    row("final", "latency_ms", 2.0),
]


@pytest.mark.parametrize(
    ("limit", "ratio", "passed"),
    [
        (
            Limit(metric="accuracy", at_least=0.985, of="baseline"),
            0.985,
            True,
        ),  # 0.788 / 0.80, exactly the bound
        (Limit(metric="accuracy", at_least=0.9851, of="baseline"), 0.985, False),
        (Limit(metric="accuracy", at_least=0.99, of="distill"), 0.788 / 0.79, True),
        (Limit(metric="size_bytes", at_most=0.125, of="baseline"), 0.125, True),
        (Limit(metric="size_bytes", at_most=0.1, of="baseline"), 0.125, False),
        (Limit(metric="latency_ms", at_most=2.0), None, True),
        (Limit(metric="latency_ms", at_most=1.9), None, False),
        (Limit(metric="latency_ms", at_least=1.9), None, True),
    ],
)
def test_a_limit_is_judged_on_the_final_model(limit: Limit, ratio: float | None, passed: bool) -> None:
    (result,) = check_limits([limit], ROWS)
    assert result.passed is passed
    assert result.missed is not passed
    assert result.ratio == (None if ratio is None else pytest.approx(ratio))


def test_the_result_keeps_value_interval_and_bound() -> None:
    (result,) = check_limits([Limit(metric="accuracy", at_least=0.985, of="baseline")], ROWS)
    assert (result.value, result.low, result.high) == (0.788, 0.77, 0.806)
    assert (result.bound, result.of, result.limit) == (0.985, "baseline", ">= 98.5% of baseline")


def test_a_limit_may_name_the_baseline_by_its_stage() -> None:
    limit = Limit(metric="size_bytes", at_most=0.2, of="finetune")
    assert check_limits([limit], ROWS, "finetune")[0].ratio == 0.125
    unknown = check_limits([limit], ROWS, "start")[0]
    assert unknown.missed
    assert "size_bytes of finetune was not measured on cpu" in (unknown.reason or "")


def test_what_was_not_measured_has_not_passed() -> None:
    (result,) = check_limits([Limit(metric="f1", at_least=0.5)], ROWS)
    assert result.missed
    assert result.value is None
    assert result.reason == "f1 of final was not measured on cpu; measured there: accuracy, latency_ms, size_bytes"


def test_a_limit_on_a_skipped_target_is_neither_passed_nor_missed() -> None:
    limit = Limit(metric="latency_ms", target="gpu", at_most=1)
    skipped = [Skipped(target="gpu", reason="no driver")]
    (result,) = check_limits([limit], ROWS, skipped=skipped)
    assert (result.passed, result.skipped, result.missed) == (False, True, False)
    assert result.reason == "target skipped: no driver"
    assert check_limits([limit], ROWS)[0].missed


def test_no_ratio_to_zero_and_nan_never_passes() -> None:
    rows = [row("baseline", "loss", 0.0), row("final", "loss", 1.0), row("final", "perplexity", math.nan)]
    relative = Limit(metric="loss", at_most=2, of="baseline")
    absolute = Limit(metric="perplexity", at_most=20)
    results = check_limits([relative, absolute], rows)
    assert [result.passed for result in results] == [False, False]
    assert results[0].reason == "loss of baseline is 0, so there is no ratio"


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit(metric="accuracy", at_least=0.985, of="baseline"), ">= 98.5% of baseline"),
        (Limit(metric="accuracy", at_least=0.7), ">= 70%"),
        (Limit(metric="size_bytes", at_most=20_000_000), "<= 20.0 MB"),
        (Limit(metric="latency_ms", at_most=0.5), "<= 0.5 ms"),
        (Limit(metric="speedup", at_least=6), ">= 6x"),
        (Limit(metric="throughput", at_least=1000), ">= 1,000 examples/s"),
    ],
)
def test_the_limit_reads_well(limit: Limit, text: str) -> None:
    assert limit_text(limit) == text


def test_paired_interval_agrees_with_the_bootstrap() -> None:
    draw = random.Random(0)
    x = [float(draw.random() < 0.87) for _ in range(600)]
    y = [xi if draw.random() < 0.95 else 1 - xi for xi in x]
    above = row("final", "accuracy", sum(y) / 600, raw=tuple(y))
    below = row("baseline", "accuracy", sum(x) / 600, raw=tuple(x))
    interval = paired_ratio_interval(above, below)
    assert interval is not None
    ratios = []
    for _ in range(1500):
        drawn = draw.choices(range(600), k=600)
        ratios.append(sum(y[i] for i in drawn) / sum(x[i] for i in drawn))
    ratios.sort()
    assert interval[0] == pytest.approx(ratios[37], abs=0.004)
    assert interval[1] == pytest.approx(ratios[1462], abs=0.004)


def test_paired_interval_of_a_hand_worked_case() -> None:
    # x = 1,1,1,1 and y = 1,1,1,0: R = 3/4, residuals 1/4, 1/4, 1/4, -3/4, squares sum to 3/4, mean(x) = 1.
    above = row("final", "accuracy", 0.75, raw=(1.0, 1.0, 1.0, 0.0))
    below = row("baseline", "accuracy", 1.0, raw=(1.0,) * 4)
    half = 1.959963985 * math.sqrt(0.75 / (4 * 3))
    assert paired_ratio_interval(above, below) == pytest.approx((0.75 - half, 0.75 + half))


def test_latencies_and_unlike_samples_are_not_paired() -> None:
    latency = row("final", "latency_ms", 2.0, raw=(2.0, 2.1))
    short = row("baseline", "accuracy", 1.0, raw=(1.0,))
    assert paired_ratio_interval(latency, row("baseline", "latency_ms", 3.0, raw=(3.0, 3.1))) is None
    assert paired_ratio_interval(row("final", "accuracy", 0.5, raw=(1.0, 0.0)), short) is None
