"""In a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.compare.change import Change, Comparison, SliceChange
from compress.compare.gate import GateResult
from compress.compare.slices import largest_change
from compress.compare.words import (
    SIGNS,
    comparison_sentence,
    confidence_text,
    effect_text,
    evidence,
    gate_sentence,
    interval_text,
    judged_name,
    judgement_text,
    margin_text,
    ordered,
    side_text,
    value_text,
    verdict_text,
)

_STYLES = {
    "worse": "bold red", "better": "green", "same": "dim", "can't tell": "yellow",
    "failed": "bold red", "warned": "yellow", "passed": "green",
}  # fmt: skip
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")
_NUMBERS = ("before", "now", "change", "interval")
_MARKS = {"failed": "\u2717", "warned": "?", "passed": "\u2713"}


def _text(words: str, style: str = "") -> Text:
    """Without control characters, with which a name in a report could write over the terminal."""
    return Text(_CONTROL.sub("\ufffd", words), style=style)


def console_comparison(comparison: Comparison) -> RenderableType:
    """A line for each metric, the worst slice, notes, and the verdict."""
    parts: list[RenderableType] = [*_sides(comparison), _table(comparison), *_below(comparison)]
    return Group(*parts, _text(f"{comparison_sentence(comparison)}."))


def console_gate(result: GateResult) -> RenderableType:
    """A line for each judgement, then notes and the verdict."""
    table = Table(title="Gate", title_justify="left", title_style="bold")
    for head in ("", "metric", "on", *_NUMBERS, "allowed", "verdict"):
        table.add_column(head, justify="right" if head in (*_NUMBERS, "allowed") else "left")
    for judgement in result.judgements:
        change = judgement.change
        cells = [_MARKS[judgement.status], judged_name(judgement), judgement.target]
        cells += _figures(change) if change else [""] * 4
        cells += [judgement.margin, verdict_text(change) if change else judgement.reason]
        table.add_row(*map(_text, cells), style=_STYLES[judgement.status])
    status = "failed" if result.failed else "warned" if result.having("warned") else "passed"
    open_questions = (*result.having("failed"), *result.having("warned"))
    why = [_text(f"{_MARKS[judgement.status]} {judgement_text(judgement)}", style=_STYLES[judgement.status])
           for judgement in open_questions]  # fmt: skip
    return Group(
        *_sides(result.comparison), table, *_below(result.comparison), *why,
        _text(f"{gate_sentence(result)}.", style=_STYLES[status]),
    )  # fmt: skip


def _sides(comparison: Comparison) -> Iterator[Text]:
    yield _text(f"baseline:  {side_text(comparison.baseline)}", style="dim")
    yield _text(f"candidate: {side_text(comparison.candidate)}", style="dim")


def _table(comparison: Comparison) -> Table:
    table = Table(title="Comparison", title_justify="left", title_style="bold")
    for head in ("", "metric", "on", *_NUMBERS, "matters from", "verdict"):
        table.add_column(head, justify="right" if head in (*_NUMBERS, "matters from") else "left")
    for change in ordered(comparison):
        cells = [SIGNS[change.verdict], change.metric, change.target, *_figures(change)]
        table.add_row(*map(_text, [*cells, margin_text(change), verdict_text(change)]), style=_STYLES[change.verdict])
    return table


def _figures(change: Change) -> list[str]:
    interval = interval_text(change)
    known = f"{interval} ({confidence_text(change)})" if interval else ""
    return [value_text(change, change.baseline), value_text(change, change.candidate), effect_text(change), known]


def _below(comparison: Comparison) -> Iterator[Text]:
    worst = comparison.worst_slice
    if worst:
        yield _slice("worst slice", worst)
        largest = largest_change(comparison.slices)
        if largest and largest.name != worst.name:
            yield _slice("largest change of a slice", largest)
    lost = sum(flip.now == "wrong" for flip in comparison.flips)
    if comparison.flips:
        yield _text(f"flips listed: {lost} now wrong, {len(comparison.flips) - lost} now right (--json, --format html)")
    yield from (_text(line, style="yellow") for line in evidence(comparison))


def _slice(what: str, part: SliceChange) -> Text:
    change = part.change
    interval = interval_text(change)
    text = f"{what}: {part.name} ({part.rows:,} rows), {effect_text(change)}"
    known = f", {interval} at {confidence_text(change)}" if interval else ""
    return _text(f"{text}{known}: {change.verdict}", style=_STYLES[change.verdict])
