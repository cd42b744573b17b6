"""Tests of the report page's markup, without a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable

from parsed_pages import parse_page

from compress.report.pages import html_page
from compress.results.report import Report, SkippedTarget, StageRecord, StageTable, parse_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'"
HOSTILE_TABLE = StageTable(title=HOSTILE, columns=(HOSTILE, "n"), rows=((HOSTILE, 1),))


def hostile(report: Report) -> Report:
    rows = tuple(
        row.model_copy(update={"model": HOSTILE}) if row.model == "prune" else row for row in report.measurements
    )
    layers = tuple(
        layer.model_copy(update={"name": HOSTILE, "dtype": HOSTILE}) for layer in report.bytes_by_layer["final"]
    )
    limits = tuple(limit.model_copy(update={"reason": HOSTILE, "limit": HOSTILE}) for limit in report.limits)
    changes = {
        "recipe": HOSTILE,
        "description": HOSTILE,
        "started": HOSTILE,
        "notes": (HOSTILE,),
        "measurements": rows,
        "environment": {HOSTILE: HOSTILE},
        "skipped": (SkippedTarget(target=HOSTILE, reason=HOSTILE),),
        "stages": (StageRecord(name=HOSTILE, key=HOSTILE, cached=False, seconds=1, tables=(HOSTILE_TABLE,)),),
        "bytes_by_layer": {"final": layers},
        "limits": limits,
    }
    return report.model_copy(update=changes)


def test_page_is_well_formed_without_external_links(report: Report) -> None:
    page = parse_page(html_page(report))
    for _, attributes in page.tags:
        assert attributes.get("src") is None
        assert attributes.get("href") in (None, "data:,", "model/")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html_page(report))


def test_hostile_names_are_escaped(report: Report) -> None:
    plain, page = parse_page(html_page(report)), parse_page(html_page(hostile(report)))
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [attributes for tag, attributes in plain.tags if tag == "script"]
    assert len(scripts) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert HOSTILE in page.texts


def test_embedded_json_equals_the_report(report: Report) -> None:
    for original in (report, hostile(report)):
        embedded = re.search(
            r'<script type="application/json" id="report-json">(.*?)</script>', html_page(original), re.S
        )
        assert embedded is not None
        assert parse_report(embedded[1], "page") == original


def test_content_security_policy_allows_only_own_style_and_script(report: Report) -> None:
    content = html_page(report)
    policy = next(
        attributes["content"] or ""
        for _, attributes in parse_page(content).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    for name, pattern in (("style-src", r"<style>(.*?)</style>"), ("script-src", r"<script>(.*?)</script>")):
        inline = re.search(pattern, content, re.S)
        assert inline is not None
        digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_the_page_shows_every_section(report: Report) -> None:
    texts = parse_page(html_page(report)).texts
    sections = ("Limits", "What each stage cost and saved", "Latency", "Every model", "Further measurements",
                "Where the bytes are", "Stages", "Environment")  # fmt: skip
    assert [text for text in texts if text in sections and text != "Latency"] == [s for s in sections if s != "Latency"]
    assert "prune: layers [0, 5] of 6 kept" in texts
    assert {"quantize: damage", "layer.1", "0.0123", "49,152", "kept in float"} <= set(texts)
    assert texts.count("\u2713 kept") == 3
    assert texts.count("\u2717 missed") == 1
    assert texts.count("not judged") == 1


def test_sort_keys_are_numbers(report: Report) -> None:
    values = re.findall(r'data-value="([^"]*)">5\.12 MB', html_page(report))
    assert [float(value) for value in values] == [5_120_000]


def test_an_empty_report_is_a_page() -> None:
    page = parse_page(html_page(Report(recipe="empty")))
    assert "The recipe sets no limits" in page.texts
    assert not any(tag in ("svg", "table", "section") for tag, _ in page.tags)


def test_each_target_has_its_own_sections(build: Callable[..., Report]) -> None:
    report = build()
    gpu = tuple(row.model_copy(update={"target": "gpu"}) for row in report.measurements)
    both = report.model_copy(update={"measurements": report.measurements + gpu, "skipped": ()})
    assert {"On cpu", "On gpu", "Every model on cpu", "Every model on gpu"} <= set(parse_page(html_page(both)).texts)


def test_skipped_target_has_no_tiles_and_one_reason(build: Callable[..., Report]) -> None:
    report = build()
    (skip,) = report.skipped
    row = report.measurements[0].model_copy(update={"target": skip.target})
    page = parse_page(html_page(report.model_copy(update={"measurements": (*report.measurements, row)})))
    assert not {"On cpu", f"On {skip.target}"} & set(page.texts)
    assert sum(skip.reason in text for text in page.texts if not text.lstrip().startswith("{")) == 1


def test_target_with_sizes_only_is_not_listed_as_measured(report: Report) -> None:
    (size,) = (row for row in report.measurements if (row.model, row.metric) == ("final", "size_bytes"))
    weighed = report.model_copy(
        update={"measurements": (*report.measurements, size.model_copy(update={"target": "gpu"}))}
    )
    assert weighed.targets == ("cpu", "gpu")
    assert "measured on cpu<" in html_page(weighed)


def test_notes_have_headings_by_severity(report: Report) -> None:
    notes = ("cpu: energy: skipped, no counter", "cpu: noise: unusable (the rounds vary by 43%)", "data: few rows")
    failed = SkippedTarget(target="gpu", reason="out of memory", failed=True)
    skipped = SkippedTarget(target="node", reason="not installed")
    page = parse_page(html_page(report.model_copy(update={"notes": notes, "skipped": (skipped, failed)})))
    texts = [text.strip() for text in page.texts]
    order = [
        "Failed",
        "Target gpu was skipped: out of memory",
        "Warnings",
        notes[1],
        notes[2],
        "Target node was skipped: not installed",
        "Notes",
        notes[0],
    ]
    positions = [texts.index(text) for text in order]
    assert positions == sorted(positions)


def test_target_without_measurements_has_no_tables(report: Report) -> None:
    sizes = [row for row in report.measurements if row.metric == "size_bytes" and row.target == "cpu"]
    rows = (*report.measurements, *(row.model_copy(update={"target": "gpu"}) for row in sizes))
    skipped = report.model_copy(
        update={"measurements": rows, "skipped": (SkippedTarget(target="gpu", reason="no device"),)}
    )
    texts = parse_page(html_page(skipped)).texts
    assert any(text.strip() == "Every model" for text in texts)
    assert not any("on gpu" in text for text in texts)


def test_agreement_says_whether_changed_answers_are_worse(report: Report) -> None:
    def page_with(final: tuple[float, ...]) -> str:
        raw = {"baseline": (1.0,) * 12 + (0.0,) * 8, "final": final}
        rows = tuple(
            row.model_copy(update={"raw": raw[row.model], "value": sum(raw[row.model]) / 20, "n": 20})
            if row.metric == "accuracy" and row.target == "cpu" and row.model in raw
            else row
            for row in report.measurements
        )
        return " ".join(parse_page(html_page(report.model_copy(update={"measurements": rows}))).texts)

    # 10 against 0 of 10 changed answers: the mid-p of McNemar's test is 2 ** -10. 2 against 2 is as likely as can be.
    assert "10 became wrong, 0 right (worse)" in page_with((0.0,) * 10 + (1.0,) * 2 + (0.0,) * 8)
    assert "2 became wrong, 2 right (no loss beyond chance)" in page_with((0.0,) * 2 + (1.0,) * 12 + (0.0,) * 6)
    assert "0 became wrong, 8 right (better)" in page_with((1.0,) * 20)
