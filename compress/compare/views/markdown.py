"""As Markdown for the comment of a pull request: the verdict first, details folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.compare.change import Comparison
from compress.compare.gate import GateResult
from compress.compare.words import (
    comparison_sentence,
    evidence,
    figures,
    gate_sentence,
    judged_name,
    judgement_text,
    margin_text,
    ordered,
    side_text,
    verdict_text,
)
from compress.report.markdown import escape_markdown, markdown_table

_MARKS = {"failed": "\u274c", "warned": "\u26a0\ufe0f", "passed": "\u2705"}
_SIGNS = {"worse": "\u274c", "can't tell": "\u2754", "better": "\u2705", "same": "\u2796"}
_HEADS = ("", "Metric", "On", "Before", "Now", "Change", "Interval")
MOST_FLIPS = 20


def markdown_comparison(comparison: Comparison) -> str:
    """Verdict, table, and folded: slices, flips, evidence."""
    rows = []
    for change in ordered(comparison):
        cells = [_SIGNS[change.verdict], change.metric, change.target, *figures(change)]
        rows.append([*cells, margin_text(change), verdict_text(change)])
    lines = [f"**{escape_markdown(comparison_sentence(comparison))}.**", ""]
    lines += markdown_table((*_HEADS, "Matters from", "Verdict"), rows, left=(0, 1, 2, 8))
    return _whole([*lines, *_details(comparison)])


def markdown_gate(result: GateResult) -> str:
    """Verdict, what failed and why, the table, and folded: every other metric, slices, flips, evidence."""
    status = "failed" if result.failed else "warned" if result.having("warned") else "passed"
    lines = [f"**{_MARKS[status]} {escape_markdown(gate_sentence(result))}.**", ""]
    lines += [f"- {escape_markdown(judgement_text(judgement))}" for judgement in result.having("failed")]
    lines += [""] if result.failed else []
    rows = []
    for judgement in result.judgements:
        change = judgement.change
        cells = [_MARKS[judgement.status], judged_name(judgement), judgement.target]
        cells += figures(change) if change else [""] * 4
        rows.append([*cells, judgement.margin, verdict_text(change) if change else judgement.reason])
    lines += markdown_table((*_HEADS, "Allowed", "Verdict"), rows, left=(0, 1, 2, 8))
    judged = [judgement.change for judgement in result.judgements]
    others = [change for change in ordered(result.comparison) if change not in judged]
    rest = [[change.metric, change.target, *figures(change), verdict_text(change)] for change in others]
    if rest:
        table = markdown_table((*_HEADS[1:], "Verdict"), rest, left=(0, 1, 6))
        lines += _folded(f"{len(rest)} metrics that no rule judges", table)
    unknown = [f"- {escape_markdown(judgement_text(judgement))}" for judgement in result.having("warned")]
    lines += _folded("What could not be told, and why", unknown)
    return _whole([*lines, *_details(result.comparison)])


def _details(comparison: Comparison) -> Iterator[str]:
    rows = [
        [part.name, f"{part.rows:,}", *figures(part.change), verdict_text(part.change)] for part in comparison.slices
    ]
    heads = ("Slice", "Rows", "Before", "Now", "Change", "Interval", "Verdict")
    yield from _folded(f"Accuracy in {len(rows)} slices", markdown_table(heads, rows, left=(0, 6)) if rows else [])
    flipped = [
        [f"now {flip.now}", str(flip.row), flip.label, flip.baseline_answer, flip.candidate_answer, flip.example]
        for flip in comparison.flips[:MOST_FLIPS]
    ]
    flip_heads = ("Flip", "Row", "Label", "Before", "Now", "Example")
    what = f"{len(flipped)} of {len(comparison.flips)} listed flips"
    yield from _folded(what, markdown_table(flip_heads, flipped, left=(0, 2, 3, 4, 5)) if flipped else [])
    facts = [f"baseline: {side_text(comparison.baseline)}", f"candidate: {side_text(comparison.candidate)}"]
    methods = [f"{change.metric}: {change.method}" for change in comparison.changes]
    lines = [f"- {escape_markdown(line)}" for line in (*facts, *evidence(comparison), *methods)]
    yield from _folded("Where the figures come from", lines)


def _folded(summary: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", f"<details><summary>{escape_markdown(summary)}</summary>", "", *lines, "", "</details>")


def _whole(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"
