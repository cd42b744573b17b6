"""By templates: a self-contained page in the manner of the report, and Markdown for the comment of a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compress.report.compare import forest_plot, formatting
from compress.report.compare.change import Change, Comparison, Side, SliceChange
from compress.report.compare.gate import GateResult, Judgement
from compress.report.pages import render, render_markdown

_FAILED, _WARNED, _PASSED = ("missed", "\u2717 failed"), ("warned", "? can't tell"), ("passed", "\u2713 passed")
_CHIPS = {"failed": _FAILED, "warned": _WARNED, "passed": _PASSED}
_COLOURS = {"worse": "missed", "can't tell": "warned", "better": "passed", "same": "none"}


class Row(NamedTuple):
    """A change under the name it is shown by, with which changes matter, and its verdict (colour, words)."""

    name: str
    change: Change
    allowed: str
    chip: tuple[str, str]


def html_comparison(comparison: Comparison) -> str:
    """Every change against its margin, slices, flips, and where the figures come from."""
    worse = any(change.verdict == "worse" for change in comparison.changes)
    verdict = "missed" if worse else "none", formatting.comparison_sentence(comparison)
    others = formatting.ordered(comparison)
    return _page("compare", "comparison", comparison, verdict, comparison.model_dump_json(), others)


def html_gate(result: GateResult) -> str:
    """Every judgement against its margin, then what no rule judges."""
    known = [judgement.change for judgement in result.judgements]
    others = [change for change in formatting.ordered(result.comparison) if change not in known]
    judged = [
        Row(formatting.judged_name(one), one.change, f"allowed {one.margin} worse", _CHIPS[one.status])
        for one in result.judgements
        if one.change
    ]
    verdict = _CHIPS[result.status][0], formatting.gate_sentence(result)
    lacking = [(one, _CHIPS[one.status]) for one in result.judgements if one.change is None]
    return _page("gate", "gate", result.comparison, verdict, result.to_json(), others, judged, lacking)


def _page(
    kind: str,
    title: str,
    comparison: Comparison,
    verdict: tuple[str, str],
    json: str,
    others: Sequence[Change],
    judged: Sequence[Row] = (),
    lacking: Sequence[tuple[Judgement, tuple[str, str]]] = (),
) -> str:
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
        forest=forest_plot,
    )


def change_rows(changes: Iterable[Change | SliceChange]) -> list[Row]:
    """Changes, of all rows or of slices, as the page draws them."""
    return [
        _row(one.name, one.change, f"{one.rows:,} rows")
        if isinstance(one, SliceChange)
        else _row(formatting.title(one), one, forest_plot.matters(one))
        for one in changes
    ]


def _row(name: str, change: Change, allowed: str) -> Row:
    return Row(name, change, allowed, (_COLOURS[change.verdict], change.verdict))


def _short(side: Side) -> str:
    name = side.name.rstrip("/").removesuffix("/report.json").rpartition("/")[2]
    return name if side.model == "final" else f"{name} ({side.model})"


_MARKS = {"failed": "\u274c", "warned": "\u26a0\ufe0f", "passed": "\u2705"}
_SIGNS = {"worse": "\u274c", "can't tell": "\u2754", "better": "\u2705", "same": "\u2796"}
MOST_FLIPS = 20


def markdown_comparison(comparison: Comparison) -> str:
    """Verdict, table, and folded: slices, flips, evidence."""
    cells = [[_SIGNS[change.verdict], *formatting.change_cells(change)] for change in formatting.ordered(comparison)]
    return _markdown(comparison, formatting.comparison_sentence(comparison), "Matters from", cells)


def markdown_gate(result: GateResult) -> str:
    """Verdict, what failed and why, the table, and folded: every other metric, slices, flips, evidence."""
    judged = [judgement.change for judgement in result.judgements]
    return _markdown(
        result.comparison,
        f"{_MARKS[result.status]} {formatting.gate_sentence(result)}",
        "Allowed",
        [[_MARKS[judgement.status], *formatting.judgement_cells(judgement)] for judgement in result.judgements],
        result.having("failed"),
        result.having("warned"),
        [change for change in formatting.ordered(result.comparison) if change not in judged],
    )


def _markdown(
    comparison: Comparison,
    sentence: str,
    margin: str,
    cells: Sequence[Sequence[str]],
    failed: Sequence[Judgement] = (),
    warned: Sequence[Judgement] = (),
    others: Sequence[Change] = (),
) -> str:
    flips = [
        (f"now {flip.now}", str(flip.row), flip.label, flip.baseline_answer, flip.candidate_answer, flip.example)
        for flip in comparison.flips[:MOST_FLIPS]
    ]
    slices = [(part.name, f"{part.rows:,}", part.change) for part in comparison.slices]
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
        warned=[formatting.judgement_text(one) for one in warned],
        others=[(one.metric, one.target, *formatting.figures(one), formatting.verdict_text(one)) for one in others],
        slices=[(name, rows, *formatting.figures(one), formatting.verdict_text(one)) for name, rows, one in slices],
        flips=flips,
        written=[(one.prompt, one.baseline, one.candidate, one.parting) for one in comparison.continuations],
        evidence=[*sides, *formatting.evidence(comparison), *methods],
        words=formatting,
    )
