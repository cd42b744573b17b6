"""Markdown, JUnit, console and the headline figures of the made-up report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from generation_reports import generation_report
from narrow import broken_words, shown

from compress.recipe.recipe import Limit
from compress.report.console import closing_line, console_table
from compress.report.headline import headlines, verdict
from compress.report.junit import junit_report
from compress.report.markdown import escape_markdown, markdown_report
from compress.report.schema import LimitResult, Report


def tables(markdown: str) -> dict[str, list[list[str]]]:
    """Heading -> the rows of the table below it."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in markdown.splitlines():
        if line.startswith(("## ", "### ")):
            heading = line.split(" ", 1)[1]
        elif line.startswith("| "):
            found.setdefault(heading, []).append([cell.strip() for cell in line[1:-1].split(" | ")])
    return found


def test_headlines_are_ratios_to_the_baseline(report: Report) -> None:
    kept, smaller, faster, agreement = headlines(report, "cpu")
    assert (kept.label, kept.figure, kept.status) == ("Accuracy kept", "99.5%", "passed")  # 1737 / 1746
    assert (smaller.label, smaller.figure) == ("Smaller on disk", "17.8x")  # 91.3 / 5.12
    assert (faster.figure, faster.status, faster.limit) == ("11.7x", "missed", "<= 0.2 ms")
    assert agreement.figure == "96.15%"


def test_the_verdict_counts_what_was_judged(build: Callable[..., Report]) -> None:
    assert verdict(build()) == ("missed", "1 of 4 limits missed (1 not judged: target skipped)")
    assert verdict(build(limits=())) == ("none", "The recipe sets no limits")
    assert verdict(build(limits=[Limit(metric="accuracy", at_least=0.5)])) == ("passed", "The limit is kept")
    gpu = Limit(metric="accuracy", target="gpu", at_least=0.5)
    assert verdict(build(limits=[gpu]))[0] == "none"


def test_markdown_holds_every_model_with_its_figures(report: Report) -> None:
    found = tables(markdown_report(report))
    heads, _, *rows = found["Measured on cpu"]
    assert [row[0] for row in rows] == list(report.models)
    final = dict(zip(heads, rows[-1], strict=True))
    assert final["Accuracy"] == "86.85% (85.37\u201388.33%)"  # 1737 / 2000, 1.7% of it either way
    assert final["Size on disk"] == "5.12 MB"
    assert final["Speed-up"] == "11.7x (11.4\u201312.1x)"
    ratios = dict(zip(found["Against the baseline on cpu"][0], found["Against the baseline on cpu"][-1], strict=True))
    assert ratios["Size on disk"] == "17.8x smaller"
    assert ratios["Latency"] == "11.7x faster"


def test_markdown_holds_limits_stages_environment_and_skipped_targets(report: Report) -> None:
    text = markdown_report(report)
    found = tables(text)
    assert [row[-1] for row in found["Limits"][2:]] == ["passed", "passed", "passed", "missed", "skipped"]
    assert found["Limits"][2][2:4] == ["\u2265 98.5% of baseline", "99.48% of baseline (86.85%)"]
    assert found["Stages"][3][:3] == ["prune", "12.5 s", ""]
    assert found["Stages"][3][3] == "cached"
    # Numbers flush right, words flush left.
    assert found["quantize: damage"][1] == ["---", "---:", "---:", "---"]
    assert found["quantize: damage"][2] == ["layer.1", "0.0123", "49,152", "kept in float"]
    assert "- prune: layers \\[0, 5\\] of 6 kept" in text
    assert ["packages.torch", "2.13.0"] in found["Environment"]
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


def test_the_console_shows_models_limits_and_verdict(report: Report) -> None:
    text = shown(console_table(report))
    for words in ("baseline", "trim_vocabulary", "86.85%", "5.12 MB", "17.8x", "Skipped target gpu"):
        assert words in text
    assert "\u2717 latency_ms on cpu \u2264 0.2 ms: 0.231 ms" in text
    assert "1 of 4 limits missed" in text


def test_the_console_takes_names_as_text(build: Callable[..., Report]) -> None:
    assert "[red]x[/red] on cpu" in shown(console_table(build(recipe="[red]x[/red]")))


def test_an_empty_report_has_every_view() -> None:
    empty = Report(recipe="empty")
    assert "The recipe sets no limits" in shown(console_table(empty))
    assert markdown_report(empty) == "# empty\n\n**The recipe sets no limits.**\n"
    assert ElementTree.fromstring(junit_report(empty)).get("tests") == "0"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_word_is_broken_at_any_width(report: Report, width: int) -> None:
    for each in (report, generation_report()):
        assert broken_words(console_table(each), width) == []


def test_a_narrow_terminal_has_the_columns_that_limits_name(build: Callable[..., Report]) -> None:
    whole = build()
    text = shown(console_table(whole), 80)
    heading = next(line for line in text.splitlines() if line.startswith("Model"))
    assert heading.split() == ["Model", "Accuracy", "F1", "Agreement", "Size", "on", "disk", "Latency", "Speed-up"]
    assert "Parameters: in the report" in text
    asked = build(limits=[Limit(metric="startup_ms", at_most=900), Limit(metric="parameters", at_most=5e6)])
    heading = next(line for line in shown(console_table(asked), 50).splitlines() if line.startswith("Model"))
    assert heading.split() == ["Model", "Accuracy", "Parameters", "Start-up"]


def test_the_last_line_says_where_things_are_and_what_comes_next(build: Callable[..., Report]) -> None:
    folder = Path("artifacts/runs/quickstart/2026-11-25T12-00-00")
    kept, missed = build(limits=()), build()
    sizes = tuple(row for row in missed.measurements if row.metric == "size_bytes")
    assert closing_line(kept, folder, "quickstart") == (
        "artifacts/runs/quickstart/2026-11-25T12-00-00 has report.html and model/. Next: compress bundle quickstart "
        "--target desktop --output app, or compress compare OTHER-RUN quickstart"
    )
    assert "Next: compress compare quickstart," in closing_line(missed, folder, "quickstart")
    weighed = closing_line(missed.model_copy(update={"measurements": sizes}), folder, "quickstart")
    assert weighed.startswith("Nothing could be run here (gpu: ONNX Runtime has no CUDAExecutionProvider")
    assert "sizes are measured all the same" in weighed
    assert str(folder) in weighed
