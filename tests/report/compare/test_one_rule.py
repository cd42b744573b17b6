"""Tests that report, compare and gate give one verdict on each limit of a run."""

from __future__ import annotations

import random

import pytest
from rich.console import Console, RenderableType

from compress.recipe.policy import Policy, Rule
from compress.recipe.recipe import Limit, Verdicts
from compress.report.compare.gate import judge_comparison
from compress.report.compare.reports import compare_reports
from compress.report.compare.views import console_comparison, console_gate
from compress.report.console import console_table
from compress.report.junit import junit_report
from compress.report.limits import check_limits
from compress.results.report import Measurement, Report

POLICY = Policy(rules=(Rule(metric="speedup", worse_by="1%"),))
WORDS = {"kept": "kept", "missed": "missed", "cannot tell": "inconclusive"}


def report_of(low: float, high: float, bound: float, action: str) -> Report:
    """Return the report of a run whose speed-up has the interval low..high and at least ``bound`` as limit."""
    fields = {"target": "cpu", "metric": "speedup", "unit": "x"}
    rows = [
        Measurement.model_validate({"model": "baseline", "value": 1.0, "low": 1.0, "high": 1.0, **fields}),
        Measurement.model_validate({"model": "final", "value": (low + high) / 2, "low": low, "high": high, **fields}),
    ]
    verdicts = Verdicts.model_validate({"cannot_tell": action})
    limits = check_limits([Limit(metric="speedup", at_least=bound)], rows, verdicts=verdicts)
    return Report(recipe="made", environment={}, measurements=tuple(rows), limits=tuple(limits))


def shown(view: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


@pytest.mark.parametrize("action", ["warn", "fail"])
def test_report_compare_and_gate_agree_on_every_interval(action: str) -> None:
    random_numbers = random.Random(0)
    seen = set()
    for _ in range(40):
        low, high = sorted(random_numbers.uniform(0.5, 4) for _ in range(2))
        bound = random_numbers.uniform(0.5, 4)
        report = report_of(low, high, bound, action)
        # The closed form of the rule.
        verdict = "kept" if low >= bound else "missed" if high < bound else "cannot tell"
        fails = verdict == "missed" or (verdict == "cannot tell" and action == "fail")
        comparison = compare_reports(report, report)
        gate = judge_comparison(comparison, POLICY)
        assert [limit.verdict for limit in report.limits] == [verdict]
        assert [limit.verdict for limit in comparison.limits] == [verdict]
        assert [judgement.limit for judgement in gate.judgements if judgement.limit] == [verdict]
        assert (bool(report.missed), gate.failed, "<failure" in junit_report(report)) == (fails, fails, fails)
        assert f": {WORDS[verdict]}, " in shown(console_comparison(comparison))
        assert f": {WORDS[verdict]}, " in shown(console_gate(gate))
        count = {"kept": "The limit is kept", "missed": "1 of 1 limit missed", "cannot tell": "0 of 1 limit kept"}
        assert count[verdict] in shown(console_table(report))
        seen.add(verdict)
    assert seen == set(WORDS)


def test_a_run_compared_with_itself_is_identical() -> None:
    report = report_of(1.5, 2.5, 1.2, "warn")
    text = shown(console_gate(judge_comparison(compare_reports(report, report), POLICY)))
    assert "identical" in text and "inconclusive" not in text
    assert "Identical." in shown(console_comparison(compare_reports(report, report)))


def test_terminal_of_80_columns_shows_before_now_change_and_verdict_and_no_size_twice() -> None:
    def row(model: str, target: str, metric: str, value: float) -> Measurement:
        fields = {"model": model, "target": target, "metric": metric, "value": value, "unit": "bytes"}
        return Measurement.model_validate(fields)

    rows = [
        row(model, target, metric, value)
        for target in ("cpu", "gpu")
        for model, value in (("baseline", 9e7), ("final", 1e7))
        for metric in ("size_bytes", "peak_memory_bytes")
    ]
    report = Report(recipe="made", environment={}, measurements=tuple(rows))
    lines = shown(console_comparison(compare_reports(report, report, baseline_model="baseline")), 80).splitlines()
    heading = next(line for line in lines if "metric" in line)
    assert heading.split() == ["metric", "on", "before", "now", "change", "verdict"]
    assert len([line for line in lines if line[3:].startswith("size_bytes")]) == 1
    assert len([line for line in lines if line[3:].startswith("peak_memory_bytes")]) == 2
    assert all(len(line) <= 80 for line in lines)


def test_short_table_has_main_metrics_metrics_with_a_limit_and_all_that_got_worse() -> None:
    def row(model: str, metric: str, value: float) -> Measurement:
        return Measurement(model=model, target="cpu", metric=metric, value=value, unit="bytes")

    values = {"size_bytes": (9e7, 1e7), "runtime_memory_bytes": (5e7, 6e7), "peak_memory_bytes_batch_32": (9e7, 8e7)}
    rows = [
        row(model, name, value)
        for name, pair in values.items()
        for model, value in zip(("baseline", "final"), pair, strict=True)
    ]
    comparison = compare_reports(*[Report(recipe="made", environment={}, measurements=tuple(rows))] * 2,
                                 baseline_model="baseline")  # fmt: skip
    short, long = (shown(console_comparison(comparison, verbose=verbose), 80) for verbose in (False, True))
    assert "runtime_memory_bytes" in short
    assert "size_bytes" in short
    assert "peak_memory_bytes_batch_32" not in short.partition("1 more metric")[0]
    assert "1 more metric, not worse" in short
    assert "peak_memory_bytes_batch_32" in long
