"""Comparison and gate as a self-contained HTML page, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compress.report.compare import formatting
from compress.report.compare.change import ComparedModel, Comparison, MetricChange, SliceChange
from compress.report.compare.gate import GateResult, Judgement
from compress.report.pages import render, render_markdown

_FAILED, _WARNED, _PASSED = ("missed", "\u2717 failed"), ("warned", "? inconclusive"), ("passed", "\u2713 passed")
_CHIPS = {"failed": _FAILED, "warned": _WARNED, "passed": _PASSED}
_COLOURS = {"worse": "missed", "can't tell": "warned", "better": "passed", "same": "none"}


class ChangeRow(NamedTuple):
    """Change with its displayed name, the changes that matter, and its verdict (colour, text)."""

    name: str
    change: MetricChange
    allowed: str
    chip: tuple[str, str]


def html_comparison(comparison: Comparison) -> str:
    """Return a page with every change against its margin, slices, flips, and the evidence."""
    worse = any(change.verdict == "worse" for change in comparison.changes)
    verdict = "missed" if worse else "none", formatting.comparison_sentence(comparison)
    others = formatting.by_importance(comparison)
    return _page("compare", "comparison", comparison, verdict, comparison.model_dump_json(), others)


def html_gate(result: GateResult) -> str:
    """Return a page with every judgement against its margin, then the changes that no rule judges."""
    judged_changes = [judgement.change for judgement in result.judgements]
    others = [change for change in formatting.by_importance(result.comparison) if change not in judged_changes]
    judged = [
        ChangeRow(
            formatting.judged_name(judged_by_rule),
            judged_by_rule.change,
            f"allowed {judged_by_rule.margin} worse",
            _CHIPS[judged_by_rule.status],
        )
        for judged_by_rule in result.judgements
        if judged_by_rule.change
    ]
    verdict = _CHIPS[result.status][0], formatting.gate_sentence(result)
    lacking = [
        (judged_by_rule, _CHIPS[judged_by_rule.status])
        for judged_by_rule in result.judgements
        if judged_by_rule.change is None
    ]
    return _page("gate", "gate", result.comparison, verdict, result.to_json(), others, judged, lacking)


def _page(
    kind: str,
    title: str,
    comparison: Comparison,
    verdict: tuple[str, str],
    json: str,
    others: Sequence[MetricChange],
    judged: Sequence[ChangeRow] = (),
    lacking: Sequence[tuple[Judgement, tuple[str, str]]] = (),
) -> str:
    """Return the page of a comparison or a gate.

    Args:
        kind: `compare` or `gate`.
        title: Title of the page.
        comparison: Comparison that is shown.
        verdict: Colour and sentence of the verdict.
        json: JSON that the page contains.
        others: Changes that no rule judges.
        judged: Changes that rules judge.
        lacking: Judgements without a change.
    """
    slices = sorted(comparison.slices, key=lambda part: part.change.effect)
    return render(
        "report/compare/templates/comparison.html",
        f"{comparison.candidate.name} \u00b7 compress {title}",
        json,
        kind=kind,
        name=f"{_short(comparison.candidate)} against {_short(comparison.baseline)}",
        state=verdict[0],
        sentence=verdict[1],
        comparison=comparison,
        judged=judged,
        lacking=lacking,
        others=change_rows(others),
        slices=change_rows(slices),
        words=formatting,
        forest=formatting,
    )


def change_rows(changes: Iterable[MetricChange | SliceChange]) -> list[ChangeRow]:
    """Return changes, of all rows or of slices, as rows of the page."""
    return [
        _row(change.name, change.change, f"{change.rows:,} rows")
        if isinstance(change, SliceChange)
        else _row(formatting.metric_title(change), change, formatting.margin_phrase(change))
        for change in changes
    ]


def _row(name: str, change: MetricChange, allowed: str) -> ChangeRow:
    return ChangeRow(name, change, allowed, (_COLOURS[change.verdict], formatting.VERDICT_TEXTS[change.verdict]))


def _short(side: ComparedModel) -> str:
    name = side.name.rstrip("/").removesuffix("/report.json").rpartition("/")[2]
    return name if side.model == "final" else f"{name} ({side.model})"


_MARKS = {"failed": "\u274c", "warned": "\u26a0\ufe0f", "passed": "\u2705"}
_SIGNS = {"worse": "\u274c", "can't tell": "\u2754", "better": "\u2705", "same": "\u2796"}
MOST_FLIPS = 20


def markdown_comparison(comparison: Comparison) -> str:
    """Return verdict, table, and folded: slices, flips, evidence."""
    cells = [
        [_SIGNS[change.verdict], *formatting.change_cells(change)] for change in formatting.by_importance(comparison)
    ]
    return _markdown(comparison, formatting.comparison_sentence(comparison), "Matters from", cells)


def markdown_gate(result: GateResult) -> str:
    """Return verdict, failures with reasons, the table, and folded: every other metric, slices, flips, evidence."""
    judged = [judgement.change for judgement in result.judgements]
    return _markdown(
        result.comparison,
        f"{_MARKS[result.status]} {formatting.gate_sentence(result)}",
        "Allowed",
        [[_MARKS[judgement.status], *formatting.judgement_cells(judgement)] for judgement in result.judgements],
        result.having("failed"),
        result.having("warned"),
        [change for change in formatting.by_importance(result.comparison) if change not in judged],
    )


def _markdown(
    comparison: Comparison,
    sentence: str,
    margin: str,
    cells: Sequence[Sequence[str]],
    failed: Sequence[Judgement] = (),
    warned: Sequence[Judgement] = (),
    others: Sequence[MetricChange] = (),
) -> str:
    """Return the Markdown of a comparison or a gate.

    Args:
        comparison: Comparison that is shown.
        sentence: Sentence of the verdict.
        margin: Heading of the column of margins.
        cells: Rows of the table.
        failed: Failed judgements.
        warned: Inconclusive judgements.
        others: Changes that no rule judges.
    """
    flips = [
        (f"now {flip.now}", str(flip.row), flip.label, flip.baseline_answer, flip.candidate_answer, flip.example)
        for flip in comparison.flips[:MOST_FLIPS]
    ]
    slices = [(slice_change.name, f"{slice_change.rows:,}", slice_change.change) for slice_change in comparison.slices]
    sides = [
        f"baseline: {formatting.side_text(comparison.baseline)}",
        f"candidate: {formatting.side_text(comparison.candidate)}",
    ]
    methods = [f"{change.metric}: {change.method}" for change in comparison.changes]
    return render_markdown(
        "report/compare/templates/comparison.md",
        comparison=comparison,
        sentence=sentence,
        margin=margin,
        cells=cells,
        failed=failed,
        warned=[formatting.judgement_text(item) for item in warned],
        others=[
            (item.metric, item.target, *formatting.value_cells(item), formatting.verdict_text(item)) for item in others
        ],
        slices=[
            (name, rows, *formatting.value_cells(item), formatting.verdict_text(item)) for name, rows, item in slices
        ],
        flips=flips,
        written=[(item.prompt, item.baseline, item.candidate, item.parting) for item in comparison.continuations],
        limits=[formatting.limit_line(limit) for limit in comparison.limits],
        evidence=[*sides, *formatting.evidence_lines(comparison), *methods],
        words=formatting,
    )
