"""Tests of limits, with expected values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compress.recipe.recipe import Limit, Verdicts
from compress.report.limits import check_limits, interval_verdict, paired_ratio_interval
from compress.results.report import LimitResult, Measurement, SkippedTarget


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
        (Limit(metric="accuracy", at_least=0.985, of="baseline"), 0.985, True),  # 0.788 / 0.80, exactly the bound
        (Limit(metric="accuracy", at_least=0.9851, of="baseline"), 0.985, False),
        (Limit(metric="accuracy", at_least=0.99, of="distill"), 0.788 / 0.79, True),
        (Limit(metric="size_bytes", at_most=0.125, of="baseline"), 0.125, True),
        (Limit(metric="size_bytes", at_most=0.1, of="baseline"), 0.125, False),
        (Limit(metric="latency_ms", at_most=2.0), None, True),
        (Limit(metric="latency_ms", at_least=1.9), None, True),
    ],
)
def test_limit_applies_to_the_final_model(limit: Limit, ratio: float | None, passed: bool) -> None:
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


def test_unmeasured_metric_misses_its_limit() -> None:
    (result,) = check_limits([Limit(metric="f1", at_least=0.5)], ROWS)
    assert result.missed
    assert result.value is None
    assert result.reason == "f1 of final was not measured on cpu; measured there: accuracy, latency_ms, size_bytes"


def test_a_limit_on_a_skipped_target_is_neither_passed_nor_missed() -> None:
    limit = Limit(metric="latency_ms", target="gpu", at_most=1)
    skipped = [SkippedTarget(target="gpu", reason="no driver")]
    (result,) = check_limits([limit], ROWS, skipped=skipped)
    assert (result.passed, result.skipped, result.missed) == (False, True, False)
    assert result.reason == "target skipped: no driver"
    assert check_limits([limit], ROWS)[0].missed


def test_ratio_to_zero_and_nan_miss_their_limits() -> None:
    rows = [row("baseline", "loss", 0.0), row("final", "loss", 1.0), row("final", "perplexity", math.nan)]
    relative = Limit(metric="loss", at_most=2, of="baseline")
    absolute = Limit(metric="perplexity", at_most=20)
    results = check_limits([relative, absolute], rows)
    assert [result.passed for result in results] == [False, False]
    assert results[0].reason == "loss of baseline is 0, so there is no ratio"


def test_paired_interval_matches_manual_calculation() -> None:
    # x = 1,1,1,1 and y = 1,1,1,0: R = 3/4, residuals 1/4, 1/4, 1/4, -3/4, squares sum to 3/4, mean(x) = 1.
    above = row("final", "accuracy", 0.75, raw=(1.0, 1.0, 1.0, 0.0))
    below = row("baseline", "accuracy", 1.0, raw=(1.0,) * 4)
    half = 1.959963985 * math.sqrt(0.75 / (4 * 3))
    assert paired_ratio_interval(above, below) == pytest.approx((0.75 - half, 0.75 + half))


def test_paired_interval_of_contributions_per_image() -> None:
    # R = 4/2; residuals y - 2x are 1, -1, 2, -2, whose squares sum to 10.
    above = row("final", "frechet_distance", 4.0, raw=(3.0, 1.0, 8.0, 4.0))
    below = row("baseline", "frechet_distance", 2.0, raw=(1.0, 1.0, 3.0, 3.0))
    half = 1.959963985 * math.sqrt(10 / (4 * 3)) / 2
    assert paired_ratio_interval(above, below) == pytest.approx((2 - half, 2 + half))
    nothing = row("baseline", "frechet_distance", 0.0, raw=(0.0,) * 4)
    assert paired_ratio_interval(above, nothing) is None


def test_latencies_and_samples_of_unequal_length_are_not_paired() -> None:
    latency = row("final", "latency_ms", 2.0, raw=(2.0, 2.1))
    short = row("baseline", "accuracy", 1.0, raw=(1.0,))
    assert paired_ratio_interval(latency, row("baseline", "latency_ms", 3.0, raw=(3.0, 3.1))) is None
    assert paired_ratio_interval(row("final", "accuracy", 0.5, raw=(1.0, 0.0)), short) is None


VNNI: dict[str, Any] = {"processor_class": "x86-vnni", "noise": {"verdict": "noisy", "reasons": ["others"]}}
UNFIT: dict[str, Any] = {"processor_class": "x86-vnni", "noise": {"verdict": "unusable", "reasons": ["it was stolen"]}}
SELDOM = "too few timings to distinguish it from noise"
INSIDE, UNABLE = "the limit is inside the interval", "the machine was too noisy: it was stolen"
WARN = Verdicts()


@pytest.mark.parametrize(
    ("limit", "machine", "verdict", "reason"),
    [
        ({"metric": "speedup", "at_least": 2.3}, VNNI, "kept", None),
        ({"metric": "speedup", "at_least": 2.5}, VNNI, "cannot tell", INSIDE),
        ({"metric": "speedup", "at_least": 2.8}, VNNI, "cannot tell", INSIDE),
        ({"metric": "speedup", "at_least": 3.1}, VNNI, "missed", None),
        ({"metric": "speedup", "at_least": 3.1}, UNFIT, "cannot tell", UNABLE),
        ({"metric": "speedup", "at_least": 2.3}, UNFIT, "kept", None),
        ({"metric": "latency_ms", "at_most": 3.9}, VNNI, "cannot tell", INSIDE),
        ({"metric": "latency_ms", "at_most": 3.4}, VNNI, "missed", None),
        # 4 ms over 10 ms; at worst 3.5 over 11 and 4.5 over 9.
        ({"metric": "latency_ms", "at_most": 0.32, "of": "baseline"}, VNNI, "cannot tell", INSIDE),
        ({"metric": "latency_ms", "at_most": 0.31, "of": "baseline"}, VNNI, "missed", None),
        ({"metric": "speedup_batch_32", "at_least": 3.1}, VNNI, "cannot tell", SELDOM),
        ({"metric": "size_bytes", "at_most": 1}, UNFIT, "missed", None),
    ],
)  # fmt: skip
def test_time_limit_is_missed_only_outside_interval_on_quiet_machine(
    limit: dict[str, Any], machine: dict[str, Any], verdict: str, reason: str | None
) -> None:
    rows = [
        row("final", "speedup", 2.7, low=2.4, high=3.0),
        row("final", "speedup_batch_32", 2.7),
        row("final", "latency_ms", 4.0, low=3.5, high=4.5),
        row("baseline", "latency_ms", 10.0, low=9.0, high=11.0),
        row("final", "size_bytes", 2.0),
    ]
    (result,) = check_limits([Limit.model_validate(limit)], rows, machines={"cpu": machine}, verdicts=WARN)
    assert (result.verdict, result.reason) == (verdict, reason)
    assert result.passed is (verdict == "kept") and result.missed is (verdict == "missed")
    assert result.unknown is (verdict == "cannot tell")
    (strict,) = check_limits(
        [Limit.model_validate(limit)], rows, machines={"cpu": machine}, verdicts=Verdicts(cannot_tell="fail")
    )
    assert strict.missed is (verdict != "kept")


def test_a_limit_for_another_processor_is_skipped() -> None:
    limits = [
        Limit(metric="speedup", at_least=9, processor="x86-vnni"),
        Limit(metric="speedup", at_least=1, processor="x86-avx2"),
    ]
    rows = [row("final", "speedup", 2.7, low=2.4, high=3.0)]
    same_processor, other_processor = check_limits(limits, rows, machines={"cpu": VNNI}, verdicts=WARN)
    assert same_processor.missed and not same_processor.skipped and same_processor.processor == "x86-vnni"
    assert (other_processor.skipped, other_processor.missed, other_processor.verdict) == (True, False, "skipped")
    assert other_processor.reason == "for x86-avx2; this was measured on x86-vnni"


def outcomes(model: str, right: int, of: int = 2000) -> Measurement:
    raw = (1.0,) * right + (0.0,) * (of - right)
    return row(model, "accuracy", right / of, raw=raw, n=of, low=right / of - 0.015, high=right / of + 0.015)


@pytest.mark.parametrize(("right", "lost", "chance"), [(1733, 7, False), (1739, 1, True)])
def test_quality_limit_inside_its_paired_interval_is_inconclusive(right: int, lost: int, chance: bool) -> None:
    # Rows that are lost and none won: the interval of the ratio is lost/1740 give or take 1.96 roots of lost/1740^2.
    limit = Limit(metric="accuracy", at_least=0.9997, of="baseline")
    rows = [outcomes("baseline", 1740), outcomes("final", right)]
    (result,) = check_limits([limit], rows, verdicts=WARN)
    assert (result.verdict, result.within_chance) == ("cannot tell" if chance else "missed", chance)
    assert result.missed is not chance
    assert (result.rows, result.rows_lost) == (2000, lost)
    assert (1 - (result.ratio_high or 0)) == pytest.approx((lost - 1.96 * lost**0.5) / 1740, abs=1e-5)
    for strict in (Verdicts(cannot_tell="fail"), Verdicts(within_chance="fail")):
        assert check_limits([limit], rows, verdicts=strict)[0].missed


def test_absolute_accuracy_limit_reports_the_missing_rows() -> None:
    (missed,) = check_limits([Limit(metric="accuracy", at_least=0.87)], [outcomes("final", 1733)], verdicts=WARN)
    assert (missed.rows_lost, missed.within_chance, missed.unknown) == (7, True, True)
    # The interval is 86.65% give or take 1.5 points.
    (met,) = check_limits([Limit(metric="accuracy", at_least=0.85)], [outcomes("final", 1733)], verdicts=WARN)
    assert met.verdict == "kept" and met.rows_lost is None


def test_word_error_rates_are_paired_by_utterance() -> None:
    counts = {"baseline": (3.0, 0.0, 1.0, 2.0), "final": (3.0, 1.0, 1.0, 3.0)}
    rows = [row(model, "word_errors", sum(raw), raw=raw) for model, raw in counts.items()]
    rows += [row(model, "word_error_rate", sum(raw) / 40, raw=(0.1,) * 4, n=4) for model, raw in counts.items()]
    (result,) = check_limits([Limit(metric="word_error_rate", at_most=1.2, of="baseline")], rows, verdicts=WARN)
    # R = 8/6; residuals y - R x: -1, 1, -1/3, 1/3; their squares sum to 20/9; mean(x) is 3/2.
    half = 1.959963985 * math.sqrt(20 / 9 / (4 * 3)) / 1.5
    assert (result.ratio_low, result.ratio_high) == pytest.approx((8 / 6 - half, 8 / 6 + half))
    assert result.within_chance and result.rows == 4 and result.rows_lost is None


def test_old_reports_have_no_verdicts() -> None:
    old = LimitResult(metric="accuracy", target="cpu", limit=">= 1", passed=False)
    assert old.missed and not old.unknown
    assert not LimitResult(metric="accuracy", target="cpu", limit=">= 1", passed=True).missed


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (0.9, 1.1, "cannot tell", "cannot tell"),
        (1.1, 1.2, "kept", "missed"),
        (0.8, 0.9, "missed", "kept"),
        (1.0, 1.1, "kept", "cannot tell"),  # a value at the bound meets it
        (0.9, 1.0, "cannot tell", "kept"),
        (1.0, 1.0, "kept", "kept"),
        (math.nan, math.nan, "missed", "missed"),
    ],
)
def test_a_limit_is_kept_by_the_whole_interval_or_missed_by_all_of_it(
    low: float, high: float, at_least: str, at_most: str
) -> None:
    assert interval_verdict(Limit(metric="accuracy", at_least=1.0), low, high) == at_least
    assert interval_verdict(Limit(metric="accuracy", at_most=1.0), low, high) == at_most
