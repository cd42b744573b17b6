"""Tests of comparing stored reports: effects, intervals and verdicts, and reasons why metrics are not compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparisons import MACHINE, accuracy, outcomes, report, row, time_row
from scipy.stats import binom, norm

from compress.recipe.policy import Policy, Rule
from compress.report.compare.change import MetricChange
from compress.report.compare.reports import compare_reports
from compress.results.report import DataRecord, Measurement, Report, SkippedTarget, SliceRecord
from compress.utils.errors import InputError

NO_SPREAD = Policy(session_spread=0.0)


def only(baseline: Report, candidate: Report, policy: Policy = NO_SPREAD, **more: object) -> MetricChange:
    """Return the only change of a comparison."""
    (change,) = compare_reports(baseline, candidate, policy, **more).changes  # type: ignore[arg-type]
    return change


def test_accuracy_is_paired_on_the_same_rows() -> None:
    change = only(report(accuracy(outcomes(1740))), report(accuracy(outcomes(1740, lost=60, gained=38))))
    n, b, c = 2002, 60.5, 38.5
    half = norm.ppf(0.95) * math.sqrt(b + c - (c - b) ** 2 / n) / n
    assert change.effect == pytest.approx(-22 / 2000)
    assert (change.low, change.high) == pytest.approx(((c - b) / n - half, (c - b) / n + half))
    assert (change.scale, change.confidence, change.margin, change.n) == ("absolute", 0.9, 0.005, 2000)
    assert (change.verdict, change.more) == ("worse", 0)
    mid_p = 2 * (binom.cdf(38, 98, 0.5) - binom.pmf(38, 98, 0.5) / 2)
    assert change.note == f"60 right before and wrong now, 38 wrong before and right now; McNemar's mid-p {mid_p:.2g}"


def test_inconclusive_comparison_says_how_many_rows_it_needs() -> None:
    # One point down on 200 rows, 5 against 3: the half-width shrinks with the root of the rows to the 1 point.
    change = only(report(accuracy(outcomes(170, 200))), report(accuracy(outcomes(170, 200, lost=5, gained=3))))
    assert change.verdict == "can't tell"
    half = max(change.high - change.effect, change.effect - change.low)
    assert change.more == math.ceil(200 * (half / 0.01) ** 2) - 200


def test_different_test_data_is_noted_and_not_paired() -> None:
    other = DataRecord(digest="cd" * 32, rows=2000)
    baseline, candidate = report(accuracy(outcomes(1740))), report(accuracy(outcomes(1700)), data=other)
    comparison = compare_reports(baseline, candidate, NO_SPREAD)
    change = comparison.changes[0]
    # Newcombe's interval of two independent shares is far wider than the paired one of 40 rows of 2,000.
    assert change.high - change.low == pytest.approx(2 * 1.645 * math.sqrt(0.87 * 0.13 / 1000), rel=0.05)
    assert "not paired: of different test data" in (change.note or "")
    assert any("different test data" in note for note in comparison.notes)


def test_missing_data_digest_is_assumed_equal_with_a_note() -> None:
    baseline = report(accuracy(outcomes(1740)), data=None)
    comparison = compare_reports(baseline, report(accuracy(outcomes(1739))), NO_SPREAD)
    assert comparison.changes[0].method.startswith("paired on 2,000")
    assert any("does not identify its test data" in note for note in comparison.notes)
    shorter = compare_reports(baseline, report(accuracy(outcomes(1739, 1999))), NO_SPREAD)
    assert "paired on" not in shorter.changes[0].method


def test_values_per_example_use_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(0)
    hard = generator.gamma(2.0, 1.0, 400)
    losses = [tuple((hard + shift + generator.normal(0, 0.02, 400)).tolist()) for shift in (1.0, 1.1)]
    rows = [row("loss", float(np.mean(values)), "nats", raw=values, n=400) for values in losses]
    change = only(report(rows[0]), report(rows[1]))
    assert change.scale == "relative"
    assert change.effect == pytest.approx(0.1 / (hard.mean() + 1), abs=0.002)
    assert change.high - change.low < 0.005  # unpaired it would be ten times that
    assert change.verdict == "worse"


def test_byte_counts_are_compared_exactly() -> None:
    baseline, candidate = report(row("size_bytes", 1_000_000, "bytes")), report(row("size_bytes", 1_000_001, "bytes"))
    worse = only(baseline, candidate)
    assert worse.effect == worse.low == worse.high == pytest.approx(1e-6)
    assert (worse.verdict, worse.confidence, worse.more) == ("worse", None, 0)
    assert only(candidate, baseline).verdict == "better"
    assert only(baseline, baseline.model_copy(update={"seconds": 1.0})).verdict == "same"


def test_interval_of_times_of_two_sessions() -> None:
    policy = Policy(session_spread=0.02)
    change = only(report(time_row("latency_ms", 2.0, 0.01)), report(time_row("latency_ms", 2.2, 0.02)), policy)
    z99 = norm.ppf(0.995)
    rows = math.hypot(math.log(1.01), math.log(1.02)) * z99 / norm.ppf(0.975)
    half = math.hypot(rows, z99 * math.sqrt(2) * 0.02)
    assert change.effect == pytest.approx(0.1)
    expected = (math.exp(math.log(1.1) - half) - 1, math.exp(math.log(1.1) + half) - 1)
    assert (change.low, change.high) == pytest.approx(expected, rel=1e-6)
    assert (change.verdict, change.confidence, change.margin) == ("worse", 0.99, 0.05)


def machine(matmul_ms: float, copy_ms: float, copy_spread: float = 0.001) -> list[Measurement]:
    """Return measurements of the reference kernels."""
    rows = (time_row("reference_matmul_ms", matmul_ms, 0.001), time_row("reference_copy_ms", copy_ms, copy_spread))
    return [kernel.model_copy(update={"model": "machine"}) for kernel in rows]


def test_slower_machine_is_corrected_for() -> None:
    baseline = report(time_row("latency_ms", 2.0), *machine(1.0, 1.0))
    slower = report(time_row("latency_ms", 2.6), *machine(1.3, 1.3))
    change = only(baseline, slower)
    assert change.effect == pytest.approx(0.0, abs=1e-9)
    assert change.verdict == "same" or change.high < 0.05
    assert "reference_matmul_ms and reference_copy_ms" in change.method
    assert only(baseline, report(time_row("latency_ms", 2.6), *machine(1.0, 1.0))).effect == pytest.approx(0.3)


def test_disagreeing_reference_kernels_make_times_inconclusive() -> None:
    baseline = report(time_row("latency_ms", 2.0, 0.001), *machine(1.0, 1.0))
    change = only(baseline, report(time_row("latency_ms", 2.4, 0.001), *machine(1.0, 1.3, 0.05)))
    # By the product 20% slower, by the copy 8% faster, which is known within 5% at 95%, so within 6.6% at 99%.
    scale = norm.ppf(0.995) / norm.ppf(0.975)
    narrow, wide = 2 * math.log(1.001) * scale, math.hypot(math.log(1.05), math.sqrt(3) * math.log(1.001)) * scale
    assert change.low == pytest.approx(2.4 / 2.0 / 1.3 * math.exp(-wide) - 1, abs=1e-9)
    assert change.high == pytest.approx(2.4 / 2.0 * math.exp(narrow) - 1, abs=1e-9)
    assert change.effect == pytest.approx(2.4 / 2.0 / math.sqrt(1.3) - 1)
    assert change.verdict == "can't tell"


def test_throughput_is_corrected_for_a_faster_machine() -> None:
    rates = [row("throughput", value, "examples/s", low=value * 0.99, high=value * 1.01, n=20) for value in (100, 125)]
    change = only(report(rates[0], *machine(1.0, 1.0)), report(rates[1], *machine(0.8, 0.8)))
    assert change.effect == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("metric", ["latency_ms", "startup_ms", "peak_memory_bytes"])
def test_different_hosts_get_no_verdict_by_default(metric: str) -> None:
    other = {**MACHINE, "processor": "another processor", "threads": 8}
    memory = metric == "peak_memory_bytes"
    rows = [row(metric, value, "bytes") if memory else time_row(metric, value, 0.001) for value in (2.0, 4.0)]
    baseline, candidate = report(rows[0]), report(rows[1], environment=other)
    comparison = compare_reports(baseline, candidate, NO_SPREAD)
    assert comparison.changes[0].verdict == "can't tell"
    assert "an invented processor and another processor" in (comparison.changes[0].note or "")
    assert comparison.host_differences == (
        "processor: an invented processor and another processor", "threads of the runtime: 2 and 8",
    )  # fmt: skip
    across_hosts = compare_reports(baseline, candidate, NO_SPREAD, across_hosts=True)
    assert across_hosts.changes[0].verdict == "worse"
    assert any("across machines, as requested" in note for note in across_hosts.notes)


def test_noisy_session_gives_no_verdict_on_times() -> None:
    noisy = {**MACHINE, "noise": {"verdict": "unusable", "reasons": ["the rounds vary by 80%"]}}
    change = only(report(time_row("latency_ms", 2.0)), report(time_row("latency_ms", 4.0), environment=noisy))
    assert (change.verdict, change.more) == ("can't tell", None)
    assert "the candidate's machine was too noisy (the rounds vary by 80%)" in (change.note or "")


def test_memory_depends_on_the_machine_but_not_on_session_spread() -> None:
    rows = [row("peak_memory_bytes", size, "bytes", low=size * 0.99, high=size * 1.01, n=6) for size in (1e8, 1.1e8)]
    change = only(report(rows[0]), report(rows[1]), Policy(session_spread=0.5))
    assert change.verdict == "worse"
    assert change.confidence == 0.9
    other = report(rows[1], environment={**MACHINE, "processor": "another"})
    assert only(report(rows[0]), other).verdict == "can't tell"


def test_comparison_of_a_run_with_itself_is_noted() -> None:
    run = report(time_row("latency_ms", 2.0))
    comparison = compare_reports(run, run)
    assert comparison.notes == ("both sides are the same run",)
    assert comparison.changes[0].effect == 0.0


def test_reused_timing_is_noted_as_same() -> None:
    latency = time_row("latency_ms", 2.0)
    comparison = compare_reports(report(latency), report(latency, started="2026-11-26T12:00:00+00:00"))
    assert (comparison.changes[0].verdict, comparison.changes[0].effect) == ("same", 0.0)
    assert any("--remeasure" in note for note in comparison.notes)


@pytest.mark.parametrize("broken", ["value", "raw"])
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_nan_is_not_compared(broken: str, side: str) -> None:
    good = accuracy(outcomes(1740))
    changes = {"value": math.nan} if broken == "value" else {"raw": (math.nan, *good.raw[1:])}  # type: ignore[index]
    bad = report(good.model_copy(update=changes), row("size_bytes", 5, "bytes"))
    fine = report(good, row("size_bytes", 5, "bytes"))
    comparison = compare_reports(bad, fine) if side == "baseline" else compare_reports(fine, bad)
    (missing,) = comparison.uncompared
    assert (missing.metric, missing.candidate_lacks) == ("accuracy", side == "candidate")
    assert f"the {side}'s accuracy" in missing.reason
    assert [change.metric for change in comparison.changes] == ["size_bytes"]


def test_metric_of_one_side_is_listed_as_uncompared() -> None:
    size = row("size_bytes", 5, "bytes")
    comparison = compare_reports(report(size, time_row("latency_ms", 1)), report(size, accuracy([1, 0])))
    assert {(m.metric, m.candidate_lacks) for m in comparison.uncompared} == {("latency_ms", True), ("accuracy", False)}
    skipped = report(size, skipped=(SkippedTarget(target="gpu", reason="no driver"),))
    gpu = time_row("latency_ms", 1).model_copy(update={"target": "gpu"})
    (missing,) = compare_reports(report(size, gpu), skipped).uncompared
    assert (missing.reason, missing.candidate_lacks) == ("the target was skipped: no driver", False)


def test_reports_without_common_metrics_are_an_error() -> None:
    with pytest.raises(InputError, match="no measurement in common"):
        compare_reports(report(row("size_bytes", 5, "bytes")), report(time_row("latency_ms", 1)))
    with pytest.raises(InputError, match="no model 'quantize'"):
        compare_reports(report(time_row("latency_ms", 1)), report(time_row("latency_ms", 1)), Policy(model="quantize"))


def test_value_without_interval_gets_no_verdict() -> None:
    change = only(report(row("f1", 0.87, "ratio", n=2000)), report(row("f1", 0.80, "ratio", n=2000)))
    assert (change.verdict, change.effect) == ("can't tell", pytest.approx(-0.07))
    assert "no interval" in (change.note or "")


def test_agreement_of_different_recipes_is_not_compared() -> None:
    rows = (row("agreement", 0.9, "ratio", low=0.88, high=0.92, n=2000), row("size_bytes", 5, "bytes"))
    same = compare_reports(report(*rows), report(*rows, seconds=1.0))
    assert [change.metric for change in same.changes] == ["agreement", "size_bytes"]
    other = compare_reports(report(*rows), report(*rows, recipe="another"))
    assert [change.metric for change in other.changes] == ["size_bytes"]
    assert "from different recipes: made-up and another; `compress diff` shows the fields that differ" in other.notes


def test_two_models_of_one_run_share_a_session() -> None:
    ratios = (2.0, 2.1, 1.9, 2.05, 1.95, 2.0)
    rows = [
        time_row("latency_ms", 2.0).model_copy(update={"model": "baseline"}),
        time_row("latency_ms", 1.0),
        row("speedup", 2.0, "x", raw=ratios, n=6),
        accuracy(outcomes(1740)).model_copy(update={"model": "baseline"}),
        accuracy(outcomes(1740, lost=300)),
    ]
    run = report(*rows)
    comparison = compare_reports(run, run, baseline_model="baseline")
    assert [change.metric for change in comparison.changes] == ["latency_ms", "accuracy"]
    latency, quality = comparison.changes
    logs = np.log(1 / np.array(ratios))
    assert latency.effect == pytest.approx(math.exp(logs.mean()) - 1)
    assert latency.n == 6
    assert (latency.verdict, quality.verdict) == ("better", "worse")
    assert comparison.notes == ()


def test_margins_are_converted_to_the_scale_of_the_effect() -> None:
    rules = (Rule(metric="accuracy", worse_by="1%"), Rule(metric="latency_ms", worse_by=0.5))
    rows = (accuracy(outcomes(1000)), time_row("latency_ms", 10.0))
    comparison = compare_reports(report(*rows), report(*rows, seconds=1.0), Policy(rules=rules))
    assert [change.margin for change in comparison.changes] == pytest.approx([0.005, 0.05])


def test_slices_are_compared_with_their_own_margin() -> None:
    half = [i < 1000 for i in range(2000)]
    slices = {"first": SliceRecord.of(half), "second": SliceRecord.of([not member for member in half])}
    baseline = report(accuracy([1.0] * 2000), slices=slices)
    after = report(accuracy([0.0] * 50 + [1.0] * 1950), slices=slices)
    rules = (Rule(metric="accuracy", worse_by="3 points", slices="worst"),)
    comparison = compare_reports(baseline, after, Policy(rules=rules))
    worst = comparison.worst_slice
    assert worst is not None
    assert (worst.name, worst.change.effect, worst.change.margin) == ("first", -0.05, pytest.approx(0.03))
    assert [flip.row for flip in comparison.flips] == list(range(50))
    assert all(flip.now == "wrong" for flip in comparison.flips)


def test_equal_outcomes_on_every_row_are_the_same(report: Report) -> None:
    def with_outcomes(started: str, *outcomes: float) -> Report:
        value = sum(outcomes) / len(outcomes)
        row = Measurement(model="final", metric="accuracy", target="cpu", value=value, unit="ratio", low=0.1, high=0.9,
                          n=len(outcomes), raw=outcomes)  # fmt: skip
        return report.model_copy(update={"measurements": (row,), "started": started})

    (same,) = compare_reports(with_outcomes("a", 1.0, 0.0, 1.0), with_outcomes("b", 1.0, 0.0, 1.0)).changes
    (other,) = compare_reports(with_outcomes("a", 1.0, 0.0, 1.0), with_outcomes("b", 1.0, 1.0, 0.0)).changes
    assert (same.verdict, same.n, other.verdict) == ("same", 3, "can't tell")
