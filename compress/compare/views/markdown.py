"""As Markdown for the comment of a pull request: the verdict first, details folded."""

from __future__ import annotations

from collections.abc import Sequence

from compress.compare import words
from compress.compare.change import Change, Comparison
from compress.compare.gate import GateResult, Judgement
from compress.report.markdown import render_markdown

_MARKS = {"failed": "\u274c", "warned": "\u26a0\ufe0f", "passed": "\u2705"}
_SIGNS = {"worse": "\u274c", "can't tell": "\u2754", "better": "\u2705", "same": "\u2796"}
MOST_FLIPS = 20


def markdown_comparison(comparison: Comparison) -> str:
    """Verdict, table, and folded: slices, flips, evidence."""
    cells = [[_SIGNS[change.verdict], *words.change_cells(change)] for change in words.ordered(comparison)]
    return _page(comparison, words.comparison_sentence(comparison), "Matters from", cells)


def markdown_gate(result: GateResult) -> str:
    """Verdict, what failed and why, the table, and folded: every other metric, slices, flips, evidence."""
    judged = [judgement.change for judgement in result.judgements]
    return _page(
        result.comparison,
        f"{_MARKS[result.status]} {words.gate_sentence(result)}",
        "Allowed",
        [[_MARKS[judgement.status], *words.judgement_cells(judgement)] for judgement in result.judgements],
        result.having("failed"),
        result.having("warned"),
        [change for change in words.ordered(result.comparison) if change not in judged],
    )


def _page(
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
    sides = [f"baseline: {words.side_text(comparison.baseline)}", f"candidate: {words.side_text(comparison.candidate)}"]
    methods = [f"{change.metric}: {change.method}" for change in comparison.changes]
    return render_markdown(
        "compare/templates/comparison.md",
        comparison=comparison,
        sentence=sentence,
        margin=margin,
        cells=cells,
        failed=failed,
        warned=[words.judgement_text(one) for one in warned],
        others=[(one.metric, one.target, *words.figures(one), words.verdict_text(one)) for one in others],
        slices=[(name, rows, *words.figures(one), words.verdict_text(one)) for name, rows, one in slices],
        flips=flips,
        evidence=[*sides, *words.evidence(comparison), *methods],
        words=words,
    )
