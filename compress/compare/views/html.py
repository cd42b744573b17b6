"""A comparison or a gate as one self-contained page, in the manner of the report's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files

from compress.compare.change import Change, Comparison, Flip, Side
from compress.compare.gate import GateResult, Judgement
from compress.compare.views.forest import Axis, axis_head, axis_of, forest_row, matters
from compress.compare.words import (
    comparison_sentence,
    confidence_text,
    effect_text,
    evidence,
    gate_sentence,
    interval_text,
    judged_name,
    ordered,
    title,
    value_text,
)
from compress.report.html import whole_page
from compress.report.markup import element, escape, tag
from compress.report.sections import cell, section, table

_CHIPS = {
    "worse": "missed", "can't tell": "warned", "better": "passed", "same": "none",
    "failed": "missed", "warned": "warned", "passed": "passed",
}  # fmt: skip
_MARKS = {"failed": "\u2717 failed", "warned": "? can't tell", "passed": "\u2713 passed"}
_GROUPS = (("absolute", "in points of the share"), ("relative", "as a part of the baseline's value"))


def html_comparison(comparison: Comparison) -> str:
    """Every change against its margin, slices, flips, and where the figures come from."""
    worse = any(change.verdict == "worse" for change in comparison.changes)
    chip = tag("span", f"chip big {'missed' if worse else 'none'}", escape(comparison_sentence(comparison)))
    parts = [_header("compress compare", comparison, chip), *_changes(comparison, ordered(comparison), "What changed")]
    return _page("comparison", comparison, [*parts, *_details(comparison)], comparison.model_dump_json())


def html_gate(result: GateResult) -> str:
    """Every judgement against its margin, then what no rule judges."""
    status = "missed" if result.failed else "warned" if result.having("warned") else "passed"
    chip = tag("span", f"chip big {status}", escape(gate_sentence(result)))
    comparison = result.comparison
    judged = [judgement.change for judgement in result.judgements]
    others = [change for change in ordered(comparison) if change not in judged]
    parts = [
        _header("compress gate", comparison, chip),
        *_judgements(result),
        *_changes(comparison, others, "What no rule judges"),
        *_details(comparison),
    ]
    return _page("gate", comparison, parts, result.to_json())


def _page(kind: str, comparison: Comparison, parts: Sequence[str], json: str) -> str:
    style = (files("compress.compare.views") / "compare.css").read_text(encoding="utf-8")
    name = f"{comparison.candidate.name} \u00b7 compress {kind}"
    return whole_page(name, "\n".join(part for part in parts if part), json, more_style=style)


def _header(eyebrow: str, comparison: Comparison, chip: str) -> str:
    names = f"{_short(comparison.candidate)} against {_short(comparison.baseline)}"
    lines = [
        tag("p", "quiet", escape(f"{what}: {side.name} ({side.model})"), escape(_when(side)))
        for what, side in (("Baseline", comparison.baseline), ("Candidate", comparison.candidate))
    ]
    words = tag("div", "", tag("p", "eyebrow", eyebrow), tag("h1", "", escape(names)), tag("div", "sides", *lines))
    return tag("header", "head", words, chip)


def _short(side: Side) -> str:
    name = side.name.rstrip("/").removesuffix("/report.json").rpartition("/")[2]
    return name if side.model == "final" else f"{name} ({side.model})"


def _when(side: Side) -> str:
    when = f", measured {side.started}" if side.started else ""
    return when + (f" on {side.host}" if side.host else "")


def _judgements(result: GateResult) -> Iterator[str]:
    for scale, words in _GROUPS:
        rows = [judgement for judgement in result.judgements if judgement.change and judgement.change.scale == scale]
        if rows:
            axis = axis_of([judgement.change for judgement in rows if judgement.change])
            written = [_row(judgement.change, axis, _verdict(judgement),
                            judged_name(judgement), f"allowed {judgement.margin} worse")
                       for judgement in rows if judgement.change]  # fmt: skip
            yield section(f"Judged, {words}", _table(axis_head(axis), written))
    lacking = [judgement for judgement in result.judgements if judgement.change is None]
    rows_ = [
        tag("tr", "", element("th", {"scope": "row"}, escape(judged_name(judgement))),
            element("td", {"class": "left"}, escape(judgement.target)),
            element("td", {"class": "left wrap"}, escape(judgement.reason)),
            cell(_chip(judgement.status, _MARKS[judgement.status])))
        for judgement in lacking
    ]  # fmt: skip
    yield section("Without figures", table(("Metric", "On", "Why", ""), rows_, "stack", left=(1, 2))) if rows_ else ""


def _verdict(judgement: Judgement) -> str:
    return _chip(judgement.status, _MARKS[judgement.status])


def _changes(comparison: Comparison, changes: Sequence[Change], heading: str) -> Iterator[str]:
    for scale, words in _GROUPS:
        mine = [change for change in changes if change.scale == scale]
        if mine:
            axis = axis_of(mine)
            rows = [_row(change, axis, _chip(change.verdict, change.verdict), title(change)) for change in mine]
            yield section(f"{heading}, {words}", _table(axis_head(axis), rows))


def _why(change: Change) -> str:
    """What an open question needs, as small lines."""
    if change.verdict != "can't tell":
        return ""
    lines = (change.note, f"about {change.more:,} more pairs would settle it" if change.more else None)
    return "".join(tag("small", "", escape(line)) for line in lines if line)


def _row(change: Change, axis: Axis, verdict: str, name: str, allowed: str = "") -> str:
    interval = interval_text(change)
    known = tag("small", "", escape(f"{interval} ({confidence_text(change)})")) if interval else ""
    heads = tag("small", "", escape(f"on {change.target}, {allowed or matters(change)}"))
    return tag(
        "tr",
        "",
        element("th", {"scope": "row"}, escape(name), heads),
        element("td", {"data-head": "before"}, escape(value_text(change, change.baseline))),
        element("td", {"data-head": "now"}, escape(value_text(change, change.candidate))),
        element("td", {"data-head": "change"}, escape(effect_text(change)), known),
        element("td", {"class": "plot"}, forest_row(change, axis), _why(change)),
        element("td", None, verdict),
    )


def _table(axis: str, rows: Sequence[str]) -> str:
    """As `sections.table`, with a drawing as the head of a column."""
    heads = [element("th", {"scope": "col"}, escape(head)) for head in ("Metric", "Before", "Now", "Change")]
    heads += [element("th", {"scope": "col", "class": "plot"}, axis), element("th", {"scope": "col"}, "Verdict")]
    body = tag("table", "changes stack", tag("thead", "", tag("tr", "", *heads)), tag("tbody", "", *rows))
    return tag("div", "card scroll", body)


def _chip(css_class: str, words: str) -> str:
    return tag("span", f"chip {_CHIPS[css_class]}", escape(words))


def _details(comparison: Comparison) -> Iterator[str]:
    yield _slices(comparison)
    yield _flips(comparison.flips)
    lines = [tag("li", "", escape(line)) for line in evidence(comparison)]
    yield section("Mind", tag("ul", "card notes", *lines)) if lines else ""
    yield _methods(comparison.changes)


def _slices(comparison: Comparison) -> str:
    parts = sorted(comparison.slices, key=lambda part: part.change.effect)
    if not parts:
        return ""
    axis = axis_of([part.change for part in parts])
    rows = [
        _row(part.change, axis, _chip(part.change.verdict, part.change.verdict), part.name, f"{part.rows:,} rows")
        for part in parts
    ]
    return section("Accuracy by slice, the largest fall first", _table(axis_head(axis), rows))


def _flips(flips: Sequence[Flip]) -> str:
    tables = []
    for now, words in (("wrong", "Right before, wrong now"), ("right", "Wrong before, right now")):
        mine = [flip for flip in flips if flip.now == now]
        rows = [
            tag("tr", "", element("th", {"scope": "row"}, str(flip.row)), *_cells(flip), element(
                "td", {"class": "example"}, escape(flip.example)))
            for flip in mine
        ]  # fmt: skip
        if rows:
            summary = tag("summary", "", escape(f"{words}: {len(rows)} listed"))
            heads = ("Row", "Label", "Before", "Now", "Example")
            tables.append(tag("details", "", summary, table(heads, rows, "flips", left=(1, 2, 3, 4))))
    return section("Flips", *tables)


def _cells(flip: Flip) -> Iterable[str]:
    texts = (flip.label, flip.baseline_answer, flip.candidate_answer)
    return [element("td", {"class": "left"}, escape(text)) for text in texts]


def _methods(changes: Sequence[Change]) -> str:
    rows = [
        tag("tr", "", element("th", {"scope": "row"}, escape(change.metric)), cell(f"{change.n:,}", change.n),
            element("td", {"class": "left wrap"}, escape(change.method)),
            element("td", {"class": "left wrap"}, escape(change.note or "")))
        for change in changes
    ]  # fmt: skip
    summary = tag("summary", "", "How each interval was made")
    heads = ("Metric", "Pairs", "Method", "Note")
    return tag("details", "card", summary, table(heads, rows, "", left=(2, 3))) if rows else ""
