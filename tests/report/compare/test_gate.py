"""Tests of gates: verdicts from comparisons, and the files of baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparisons import MACHINE, accuracy, outcomes, report, row, time_row

from compress.recipe.policy import CannotTell, Policy, Rule
from compress.report.compare.baseline import (
    BaselineOrigin,
    load_baseline,
    lowered_metrics,
    parse_baseline,
    write_baseline,
)
from compress.report.compare.change import Comparison
from compress.report.compare.gate import GateResult, Status, judge_comparison
from compress.report.compare.reports import compare_reports
from compress.results.report import Report, SliceRecord
from compress.utils.errors import InputError

BEFORE = report(accuracy(outcomes(1740)), row("size_bytes", 1000, "bytes"), time_row("latency_ms", 2.0))
ORIGIN = BaselineOrigin(who="a tester", when="2026-11-25T12:00:00+00:00", why="a test")


def gate_result(after: Report, policy: Policy | None = None, baseline: Report = BEFORE) -> GateResult:
    rules = policy or Policy(session_spread=0.0)
    return judge_comparison(compare_reports(baseline, after, rules), rules)


def statuses(result: GateResult) -> dict[str, Status]:
    return {judgement.metric: judgement.status for judgement in result.judgements}


def test_repeated_run_passes() -> None:
    result = gate_result(
        report(accuracy(outcomes(1740)), row("size_bytes", 1000, "bytes"), time_row("latency_ms", 2.001))
    )
    assert statuses(result) == {"accuracy": "passed", "size_bytes": "passed", "latency_ms": "passed"}
    assert not result.failed


def test_each_regression_fails_only_its_metric() -> None:
    bad = {
        "accuracy": accuracy(outcomes(1740, lost=60, gained=30)),
        "size_bytes": row("size_bytes", 1001, "bytes"),
        "latency_ms": time_row("latency_ms", 2.2),
    }
    for metric, measurement in bad.items():
        rows = [measurement if original.metric == metric else original for original in BEFORE.measurements]
        result = gate_result(report(*rows, seconds=1.0))
        assert result.failed
        assert [judgement.metric for judgement in result.having("failed")] == [metric]
        assert result.judgements[0].metric == metric  # failures come first


@pytest.mark.parametrize(("cannot_tell", "status"), [("pass", "passed"), ("warn", "warned"), ("fail", "failed")])
def test_inconclusive_metrics_follow_the_policy(cannot_tell: CannotTell, status: Status) -> None:
    after = report(time_row("latency_ms", 2.1, 0.2))
    baseline = report(time_row("latency_ms", 2.0, 0.2))
    policy = Policy(rules=(Rule(metric="latency_ms", worse_by="5%"),), cannot_tell=cannot_tell)
    result = gate_result(after, policy, baseline)
    assert (statuses(result), result.failed) == ({"latency_ms": status}, cannot_tell == "fail")
    strict = Rule(metric="latency_ms", worse_by="5%", cannot_tell="fail")
    assert gate_result(after, Policy(rules=(strict,), cannot_tell=cannot_tell), baseline).failed


def test_metric_missing_in_candidate_fails_and_in_baseline_warns() -> None:
    without = report(*BEFORE.measurements[1:])
    result = gate_result(without)
    assert [(j.metric, j.reason) for j in result.having("failed")] == [
        ("accuracy", "the candidate was not measured for it")
    ]
    assert statuses(gate_result(BEFORE, baseline=without))["accuracy"] == "warned"


def test_nan_fails() -> None:
    rows = [r.model_copy(update={"value": float("nan")}) if r.metric == "accuracy" else r for r in BEFORE.measurements]
    result = gate_result(report(*rows))
    assert [judgement.metric for judgement in result.having("failed")] == ["accuracy"]


def test_rule_without_matching_metric_warns() -> None:
    policy = Policy(rules=(Rule(metric="acuracy", worse_by="1 point"), Rule(metric="size_bytes", worse_by="0%")))
    result = gate_result(report(*BEFORE.measurements, seconds=1.0), policy)
    assert statuses(result) == {"acuracy": "warned", "size_bytes": "passed"}
    assert statuses(gate_result(report(*BEFORE.measurements, seconds=1.0)))  # the defaults may find nothing
    assert "perplexity" not in statuses(gate_result(report(*BEFORE.measurements, seconds=1.0)))


def sliced(lost_in_first: int, lost_in_second: int) -> Report:
    first = [1.0] * 1000
    values = [0.0] * lost_in_first + first[lost_in_first:] + [0.0] * lost_in_second + first[lost_in_second:]
    members = [i < 1000 for i in range(2000)]
    slices = {"first": SliceRecord.of(members), "second": SliceRecord.of([not member for member in members])}
    return report(accuracy(values), slices=slices)


def test_worst_slice_is_judged() -> None:
    rules = (Rule(metric="accuracy", worse_by="5 points"), Rule(metric="accuracy", worse_by="2 points", slices="worst"))
    result = gate_result(sliced(0, 40), Policy(rules=rules), sliced(0, 0))
    assert [(j.metric, j.slice, j.status) for j in result.judgements] == [
        ("accuracy", "second", "failed"), ("accuracy", None, "passed"),
    ]  # fmt: skip
    assert not gate_result(sliced(5, 5), Policy(rules=rules), sliced(0, 0)).failed
    without = gate_result(
        report(accuracy([1.0] * 2000), seconds=1.0), Policy(rules=rules), report(accuracy([1.0] * 2000))
    )
    assert [(j.slice, j.reason) for j in without.having("warned")] == [("worst", "no slices were compared")]


def test_significantly_worse_slice_precedes_inconclusive_one() -> None:
    few = SliceRecord.of([i < 20 for i in range(2000)])
    many = SliceRecord.of([i >= 20 for i in range(2000)])
    baseline = report(accuracy([1.0] * 2000), slices={"few": few, "many": many})
    lost = {0, 1, *range(100, 180)}  # 10 points of 20 rows, 4 of 1,980
    after = report(accuracy([float(i not in lost) for i in range(2000)]), slices={"few": few, "many": many})
    result = gate_result(after, Policy(rules=(Rule(metric="accuracy", worse_by="3 points", slices="worst"),)), baseline)
    assert {part.name: part.change.verdict for part in result.comparison.slices} == {
        "few": "can't tell", "many": "worse",
    }  # fmt: skip
    assert [(j.slice, j.status) for j in result.judgements] == [("many", "failed")]


def test_gate_json_has_verdict_and_all_results() -> None:
    result = gate_result(report(*BEFORE.measurements[1:]))
    content = json.loads(result.to_json())
    assert content.pop("failed") is True
    assert GateResult.model_validate(content) == result


def long_report() -> Report:
    """Return a report with 2,000 outcomes, 500 latencies, further models and slices."""
    members = [i % 3 == 0 for i in range(2000)]
    latency = time_row("latency_ms", 2.0).model_copy(update={"raw": tuple(2.0 + i / 1e6 for i in range(500)), "n": 500})
    other = [measurement.model_copy(update={"model": "distill"}) for measurement in BEFORE.measurements]
    kernel = time_row("reference_matmul_ms", 1.0).model_copy(update={"model": "machine"})
    environment = {**MACHINE, "rounds": list(range(5000)), "noise": {"verdict": "quiet", "reasons": [], "figures": {}}}
    return report(
        accuracy(outcomes(1741, lost=13, gained=5)), latency, *other, kernel,
        environment=environment, slices={"third": SliceRecord.of(members)},
    )  # fmt: skip


def test_baseline_file_is_small_and_sufficient_for_a_gate(tmp_path: Path) -> None:
    whole, path = long_report(), tmp_path / "new folder" / "baseline.json"
    write_baseline(whole, path, ORIGIN)
    assert path.stat().st_size < 6_000
    assert parse_baseline(json.loads(path.read_text()), path).origin == ORIGIN
    loaded = load_baseline(path)
    assert loaded.find("final", "accuracy", "cpu") == whole.find("final", "accuracy", "cpu")
    assert loaded.slices == whole.slices
    assert loaded.data == whole.data
    latency = loaded.find("final", "latency_ms", "cpu")
    assert latency is not None
    assert (latency.raw, latency.n, latency.value) == (None, 500, 2.0)
    assert {measurement.model for measurement in loaded.measurements} == {"machine", "final"}
    assert loaded.environment["noise"] == {"verdict": "quiet", "reasons": []}
    assert "rounds" not in loaded.environment


def test_gate_on_baseline_file_equals_gate_on_run(tmp_path: Path) -> None:
    whole, path = long_report(), tmp_path / "baseline.json"
    write_baseline(whole, path, ORIGIN)
    after = report(accuracy(outcomes(1741, lost=60, gained=5)), time_row("latency_ms", 2.3))
    policy = Policy()
    compared: list[Comparison] = [compare_reports(baseline, after, policy) for baseline in (whole, load_baseline(path))]
    assert compared[0].changes == compared[1].changes
    assert [flip.row for flip in compared[0].flips] == [flip.row for flip in compared[1].flips]


def test_packed_outcomes_have_the_documented_format(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(report(accuracy([1, 0, 0, 0, 0, 0, 0, 1, 1])), path, ORIGIN)
    (packed,) = json.loads(path.read_text())["outcomes"]
    assert packed["count"] == 9
    assert packed["bits"] == "gYA="  # 10000001 10000000 in Base64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2; this compress reads 1"),
        ({"schema": 0}, "schema 0; this compress reads 1"),
        ({"kind": "something"}, "names no kind"),
        ({"origin": {"who": "x"}}, r"origin\.when: Field required"),
        ({"outcomes": [{"metric": "accuracy", "model": "final", "target": "cpu", "count": 9, "bits": "gQ=="}]},
         "take 2 bytes"),
        ({"outcomes": [{"metric": "accuracy", "model": "final", "target": "cpu", "count": 9, "bits": "\u00e4"}]},
         "bytes in Base64"),
        ({"report": {"schema": 7, "recipe": "x"}}, "schema 7"),
    ],
)  # fmt: skip
def test_invalid_baseline_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(BEFORE, path, ORIGIN)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words) as caught:
        load_baseline(path)
    assert caught.value.where is not None
    assert str(path) in caught.value.where


def test_baseline_of_unknown_model_or_at_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model 'prune'"):
        write_baseline(BEFORE, tmp_path / "baseline.json", ORIGIN, "prune")
    with pytest.raises(InputError, match="is a folder"):
        write_baseline(BEFORE, tmp_path, ORIGIN)


def test_lowered_metrics_are_named() -> None:
    policy = Policy()

    def of(*rows: object) -> list[str]:
        comparison = compare_reports(BEFORE, report(*rows, seconds=1.0), policy)  # type: ignore[arg-type]
        return [change.metric for change in lowered_metrics(comparison, policy)]

    quality, size, latency = BEFORE.measurements
    assert of(quality, size, latency) == []
    assert of(accuracy(outcomes(1741)), row("size_bytes", 999, "bytes"), time_row("latency_ms", 1.0)) == []
    assert of(accuracy(outcomes(1739)), size, time_row("latency_ms", 2.02)) == ["accuracy"]
    assert of(quality, row("size_bytes", 1001, "bytes"), time_row("latency_ms", 4.0)) == ["size_bytes", "latency_ms"]
