"""Tests of Markdown, JUnit and console views, and of the headlines of the invented report."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from narrow import shown

from compress.recipe.recipe import Limit
from compress.report.console import console_table
from compress.report.headline import headlines, verdict
from compress.report.junit import junit_report
from compress.report.pages import escape_markdown, html_page, markdown_report
from compress.report.rows import notes_by_severity, speedup_notes
from compress.results.formatting import format_value
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, LimitResult, Report


def tables(markdown: str) -> dict[str, list[list[str]]]:
    """Return the table rows below each heading."""
    rows_by_heading: dict[str, list[list[str]]] = {}
    heading = ""
    for line in markdown.splitlines():
        if line.startswith(("## ", "### ")):
            heading = line.split(" ", 1)[1]
        elif line.startswith("| "):
            rows_by_heading.setdefault(heading, []).append([cell.strip() for cell in line[1:-1].split(" | ")])
    return rows_by_heading


def test_headlines_are_ratios_to_the_baseline(report: Report) -> None:
    quality, smaller, faster, agreement = headlines(report, "cpu")
    assert (quality.label, quality.figure, quality.status) == ("Accuracy kept", "99.5%", "passed")  # 1737 / 1746
    assert (smaller.label, smaller.figure) == ("Smaller on disk", "17.8x")  # 91.3 / 5.12
    assert (faster.figure, faster.status, faster.limit) == ("11.7x", "missed", "<= 0.2 ms")
    assert agreement.figure == "96.15%"


def test_verdict_counts_the_judged_limits(build: Callable[..., Report]) -> None:
    assert verdict(build()) == ("missed", "1 of 4 limits missed (1 not judged: target skipped)")
    assert verdict(build(limits=())) == ("none", "The recipe sets no limits")
    assert verdict(build(limits=[Limit(metric="accuracy", at_least=0.5)])) == ("passed", "The limit is kept")
    gpu = Limit(metric="accuracy", target="gpu", at_least=0.5)
    assert verdict(build(limits=[gpu]))[0] == "none"


def with_limits(report: Report, *limits: LimitResult) -> Report:
    return report.model_copy(update={"limits": limits})


UNTOLD = LimitResult(
    metric="speedup",
    target="cpu",
    limit=">= 12x",
    value=11.7,
    low=11.4,
    high=12.1,
    passed=False,
    verdict="cannot tell",
    reason="noise could explain the miss",
    fails=False,
    processor="x86-vnni",
)
CHANCE = LimitResult(
    metric="accuracy",
    target="cpu",
    limit=">= 99.7% of baseline",
    value=0.866,
    passed=False,
    of="baseline",
    ratio=0.996,
    ratio_low=0.994,
    ratio_high=0.998,
    verdict="missed",
    within_chance=True,
    rows=2000,
    rows_lost=7,
    fails=True,
)
KEPT = LimitResult(metric="size_bytes", target="cpu", limit="<= 10%", value=1, passed=True, verdict="kept", fails=False)
ELSEWHERE = LimitResult(
    metric="speedup", target="cpu", limit=">= 2x", passed=False, skipped=True, verdict="skipped", fails=False,
    reason="for x86-avx2; this was measured on x86-vnni",
)  # fmt: skip


def test_inconclusive_limit_is_neither_kept_nor_missed(report: Report) -> None:
    assert verdict(with_limits(report, UNTOLD, KEPT)) == ("unknown", "1 of 2 limits kept, 1 inconclusive")
    both = with_limits(report, UNTOLD, CHANCE, KEPT)
    assert verdict(both) == ("missed", "1 of 3 limits missed, 1 inconclusive")
    mild = CHANCE.model_copy(update={"fails": False})
    assert verdict(with_limits(report, mild, KEPT)) == ("unknown", "1 of 2 limits kept, 1 inconclusive")
    other = with_limits(report, KEPT, ELSEWHERE)
    assert verdict(other) == ("passed", "The limit is kept (1 not judged: for another processor)")
    text = shown(console_table(both))
    assert "? speedup on cpu \u2265 12x (x86-vnni): 11.7x (11.4\u201312.1x); noise could explain the miss" in text
    missed_text = "99.60% of baseline (86.60%); 7 fewer right of 2,000 rows, within chance (99.4\u201399.8%)"
    assert f"\u2717 accuracy on cpu \u2265 99.7% of baseline: {missed_text}" in " ".join(text.split())
    suite = ElementTree.fromstring(junit_report(both))
    assert (suite.get("failures"), suite.get("skipped")) == ("1", "1")
    skipped, failure = suite.find(".//skipped"), suite.find(".//failure")
    assert skipped is not None and (skipped.get("message") or "").startswith("inconclusive: 11.7x")
    assert failure is not None and "7 fewer right of 2,000 rows, within chance" in (failure.text or "")
    assert "? inconclusive" in html_page(both)


def test_run_without_measurements_says_so(report: Report) -> None:
    weighed = tuple(row for row in report.measurements if row.metric == "size_bytes")
    gpu = LimitResult(metric="speedup", target="gpu", limit=">= 2x", passed=False, skipped=True, verdict="skipped")
    alone = report.model_copy(update={"measurements": weighed, "limits": (gpu,)})
    assert alone.unmeasured and not report.unmeasured
    sentence = "Nothing could be run: only sizes are known, and no limit was evaluated (1 not judged: target skipped)"
    assert verdict(alone) == ("none", sentence)
    assert "5.12 MB" in shown(console_table(alone))
    judged = alone.model_copy(update={"limits": (gpu, KEPT)})
    assert verdict(judged)[1] == "Nothing could be run: only sizes are known; of what files weigh, the limit is kept"


def test_markdown_has_every_model_with_its_figures(report: Report) -> None:
    parsed = tables(markdown_report(report))
    heads, _, *rows = parsed["Measured on cpu"]
    # The last stage gave the final model, and has no row of its own.
    *earlier, last, final = report.models
    assert [row[0] for row in rows] == [*earlier, f"{final} ({last})"]
    final = dict(zip(heads, rows[-1], strict=True))
    assert final["Accuracy"] == "86.85% (85.37\u201388.33%)"  # 1737 / 2000, 1.7% of it either way
    assert final["Size on disk"] == "5.12 MB"
    assert final["Speed-up"] == "11.7x (11.4\u201312.1x)"
    ratios = dict(zip(parsed["Against the baseline on cpu"][0], parsed["Against the baseline on cpu"][-1], strict=True))
    assert ratios["Size on disk"] == "17.8x smaller"
    assert ratios["Latency"] == "11.7x faster"


def test_markdown_has_limits_stages_environment_and_skipped_targets(report: Report) -> None:
    text = markdown_report(report)
    parsed = tables(text)
    assert [row[-1] for row in parsed["Limits"][2:]] == ["kept", "kept", "kept", "missed", "not judged"]
    assert (parsed["Stages"][3][0], parsed["Stages"][3][3]) == ("prune", "cached")
    assert parsed["quantize: damage"][2] == ["layer.1", "0.0123", "49,152", "kept in float"]
    assert "- prune: layers \\[0, 5\\] of 6 kept" in text
    assert ["packages.torch", "2.13.0"] in parsed["Environment"]
    assert "- gpu: ONNX Runtime has no CUDAExecutionProvider here" in text


def test_markdown_shows_hostile_names_as_text(report: Report) -> None:
    hostile = report.model_copy(update={"recipe": "<script>x</script> | [a](http://b)\n# c"})
    text = markdown_report(hostile)
    assert "<script>" not in text
    assert text.splitlines()[0] == r"# &lt;script>x&lt;/script> \| \[a\](http://b) # c"
    assert escape_markdown("> quote") == r"\> quote"


def test_junit_counts_match_its_cases(report: Report) -> None:
    root = ElementTree.fromstring(junit_report(report))
    suite = root.find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    counted = (len(cases), len(suite.findall(".//failure")), len(suite.findall(".//skipped")))
    assert counted == (5, 1, 1)
    assert tuple(int(suite.get(name, "")) for name in ("tests", "failures", "skipped")) == counted
    failure = suite.find(".//failure")
    assert failure is not None
    assert failure.text == "latency_ms on cpu: wanted <= 0.2 ms, found 0.231 ms (0.228\u20130.234 ms)"


def test_junit_survives_characters_that_xml_cannot_hold(report: Report) -> None:
    limit = LimitResult(metric="a\x00<b>&", target="cpu", limit=">= 1", passed=False, reason="\x1b[31m")
    root = ElementTree.fromstring(junit_report(report.model_copy(update={"limits": (limit,)})))
    case = root.find(".//testcase")
    assert case is not None
    assert case.get("name") == "a\ufffd<b>& >= 1"


def test_console_does_not_interpret_names_as_markup(build: Callable[..., Report]) -> None:
    assert "[red]x[/red] on cpu" in shown(console_table(build(recipe="[red]x[/red]")))


def test_an_empty_report_has_every_view() -> None:
    empty = Report(recipe="empty")
    assert "The recipe sets no limits" in shown(console_table(empty))
    assert markdown_report(empty) == "# empty\n\n**The recipe sets no limits.**\n"
    assert ElementTree.fromstring(junit_report(empty)).get("tests") == "0"


def test_narrow_terminal_prefers_columns_named_by_limits(build: Callable[..., Report]) -> None:
    whole = build()
    text = shown(console_table(whole), 80)
    heading = next(line for line in text.splitlines() if line.startswith("Model"))
    assert heading.split() == ["Model", "Accuracy", "F1", "Agreement", "Size", "on", "disk", "Latency", "Speed-up"]
    assert "Parameters: not shown at this width, see report.html" in text
    # The line below the final model's numbers names what they are compared with, as its limits do.
    ratios = [line for line in text.splitlines() if line.startswith("  of baseline")][-1].split()[2:]
    accuracy, size = (
        whole.find(FINAL, name, "cpu").value / whole.find(BASELINE, name, "cpu").value
        for name in ("accuracy", "size_bytes")
    )
    assert (ratios[0], ratios[2]) == (f"{accuracy:.2%}", f"{size:.2%}")
    limited = build(limits=[Limit(metric="startup_ms", at_most=900), Limit(metric="parameters", at_most=5e6)])
    heading = next(line for line in shown(console_table(limited), 50).splitlines() if line.startswith("Model"))
    assert heading.split() == ["Model", "Accuracy", "Parameters", "Start-up"]


def test_stage_that_gave_the_final_model_has_no_row_of_its_own(build: Callable[..., Report]) -> None:
    report = build()
    last = report.models[-2]
    final = [row for row in report.measurements if row.model == FINAL]
    kept = [row for row in report.measurements if row.model != last]
    # The same file, whose latency was measured a second time.
    times = {"latency_ms": 1.01}
    copies = [row.model_copy(update={"model": last, "value": row.value * times.get(row.metric, 1)}) for row in final]
    repeated = report.model_copy(update={"measurements": (*kept, *copies)})
    lines = shown(console_table(repeated), 120).splitlines()
    assert [line for line in lines if line.startswith(f"{FINAL} ({last})")]
    assert not [line for line in lines if line.startswith(last)]
    other = [row.model_copy(update={"value": row.value + 1}) if row.metric == "size_bytes" else row for row in copies]
    lines = shown(console_table(report.model_copy(update={"measurements": (*kept, *other)})), 120).splitlines()
    assert [line for line in lines if line.startswith(last)]


def test_times_of_a_noisy_machine_are_marked_as_approximate(build: Callable[..., Report]) -> None:
    report = build()
    noise = {"verdict": "unusable", "reasons": ["the rounds vary by 40%"]}
    noisy = report.model_copy(update={"environment": {**report.environment, "noise": noise}})
    quiet_text, noisy_text = shown(console_table(report), 160), shown(console_table(noisy), 160)
    assert "~" not in quiet_text
    latency = format_value(describe_metric("latency_ms", "ms"), report.find(FINAL, "latency_ms", "cpu").value)
    assert latency in quiet_text and f"~{latency}" in noisy_text
    assert f"~{latency}" in markdown_report(noisy) and f"~{latency}" not in markdown_report(report)


def test_speedup_that_differs_from_the_latencies_is_explained(build: Callable[..., Report]) -> None:
    report = build()
    before, now = (report.find(model, "latency_ms", "cpu").value for model in (BASELINE, FINAL))

    def with_speedup(value: float) -> Report:
        rows = [
            row.model_copy(update={"value": value}) if (row.model, row.metric, row.target) == (FINAL, "speedup", "cpu")
            else row
            for row in report.measurements
        ]  # fmt: skip
        return report.model_copy(update={"measurements": tuple(rows)})

    assert speedup_notes(with_speedup(before / now * 1.05)) == ()
    (note,) = speedup_notes(with_speedup(before / now / 2))
    assert f"quotient of the two median latencies is {before / now:.3g}x" in note
    assert note in " ".join(shown(console_table(with_speedup(before / now / 2)), 400).split())


@pytest.mark.parametrize(
    ("note", "heading"),
    [
        ("data: 7,541 train, 2,000 test rows; 0 rows repeat another", "Notes"),
        ("data: 7,541 train, 2,000 test rows; 1 row repeats another", "Notes"),
        ("data: a class with fewer than 10 test rows, too few to judge it: a 3", "Warnings"),
        ("cpu: noise: quiet (rounds vary by 7.8% at most)", "Notes"),
        ("cpu: noise: noisy (other processes took 35% of the processor)", "Warnings"),
    ],
)
def test_notes_that_question_a_number_are_warnings(note: str, heading: str) -> None:
    assert notes_by_severity(Report(recipe="r", notes=(note,)))[heading] == [note]


def test_notes_that_the_run_has_shown_are_left_out(build: Callable[..., Report]) -> None:
    report = build().model_copy(update={"notes": ("data: 3 rows", "cpu: noise")})
    assert "data: 3 rows" in shown(console_table(report), 80)
    text = shown(console_table(report, ("data: 3 rows",)), 80)
    assert "data: 3 rows" not in text and "cpu: noise" in text
