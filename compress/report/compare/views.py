"""Views of a comparison and of a gate, for readers and for build servers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.console import Group, RenderableType
from rich.text import Text

from compress.report.compare import formatting
from compress.report.compare.change import Comparison, MetricChange, SliceChange
from compress.report.compare.effects import largest_change
from compress.report.compare.formatting import gate_sentence, judged_name, judgement_text, side_text
from compress.report.compare.gate import GateResult, Judgement
from compress.report.compare.pages import html_comparison, html_gate, markdown_comparison, markdown_gate
from compress.report.junit import JunitCase, JunitSuite, junit_xml
from compress.utils.progress import is_shown
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_STYLES = {
    "worse": "bold red", "better": "green", "same": "dim", "can't tell": "yellow",
    "failed": "bold red", "warned": "yellow", "passed": "green",
}  # fmt: skip
_LIMIT_STYLES = {"kept": "green", "missed": "bold red", "cannot tell": "yellow"}
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")
_FIGURES = (TableColumn("before", right=True), TableColumn("now", right=True), TableColumn("change", right=True))
_DETAILS = "intervals, margins and the number of samples needed"
_SOURCES = ": -v, --json or --format html."
_MARKS = {"failed": "\u2717", "warned": "?", "passed": "\u2713"}


def _plain(text: str) -> str:
    """Return text without control characters, with which a name in a report could overwrite the terminal."""
    return _CONTROL.sub("\ufffd", text)


def _text(text: str, style: str = "") -> Text:
    return Text(_plain(text), style=style)


def console_comparison(comparison: Comparison, verbose: bool = False) -> RenderableType:
    """Return a line for each main metric, the limits, the worst slice, notes, and the verdict.

    Args:
        comparison: Comparison that is shown.
        verbose: Whether all metrics, intervals, margins and numbers of samples are shown too.
    """
    changes = formatting.distinct(formatting.by_importance(comparison))
    shown = changes if verbose else formatting.main_changes(changes, comparison)
    rows = [
        ([formatting.SIGNS[change.verdict], *formatting.change_cells(change)], _STYLES[change.verdict], change)
        for change in shown
    ]
    hidden = len(changes) - len(shown)
    details = [_text(formatting.detailed_sentence(change)) for change in shown] if verbose else []
    limits = [_text(formatting.limit_line(limit), style=_LIMIT_STYLES[limit.verdict]) for limit in comparison.limits]
    parts: list[RenderableType] = [
        *_sides(comparison), _table("Comparison", rows), *details, *limits,
        *_below(comparison, verbose, hidden),
    ]  # fmt: skip
    return Group(*parts, _text(f"{formatting.comparison_sentence(comparison)}."))


def console_gate(result: GateResult, verbose: bool = False) -> RenderableType:
    """Return a line for each judgement, then notes and the verdict.

    Args:
        result: Gate that is shown.
        verbose: Whether intervals, margins and numbers of samples are shown too.
    """
    shown = {id(change) for change in formatting.distinct(item.change for item in result.judgements if item.change)}
    rows = [
        ([_MARKS[item.status], *formatting.judgement_cells(item)], _STYLES[item.status], item.change)
        for item in result.judgements
        if not item.limit and (item.slice or item.change is None or id(item.change) in shown)
    ]
    details = [_text(formatting.detailed_sentence(change)) for _, _, change in rows if change] if verbose else []
    limits = [item for item in result.judgements if item.limit]
    # `_below` has the reasons of changes that more samples would not settle.
    warned = [item for item in result.having("warned") if item.change is None or item.change.more is not None]
    open_questions = [item for item in (*result.having("failed"), *warned) if item not in limits]
    reasons = [_text(f"{_MARKS[item.status]} {formatting.judgement_text(item)}", style=_STYLES[item.status])
           for item in (*limits, *open_questions)]  # fmt: skip
    return Group(
        *_sides(result.comparison), _table("Gate", rows), *details, *_below(result.comparison, verbose),
        *reasons, _text(f"{formatting.gate_sentence(result)}.", style=_STYLES[result.status]),
    )  # fmt: skip


def _sides(comparison: Comparison) -> Iterator[Text]:
    yield _text(f"baseline:  {formatting.side_text(comparison.baseline)}", style="dim")
    yield _text(f"candidate: {formatting.side_text(comparison.candidate)}", style="dim")


def _table(title: str, rows: Sequence[tuple[list[str], str, MetricChange | None]]) -> ResponsiveTable:
    """Return a table of rows with their styles and changes.

    Args:
        title: Title of the table.
        rows: Cells of `change_cells` or `judgement_cells` behind a sign, the style, and the change.
    """
    targets = dict.fromkeys(cells[2] for cells, _, _ in rows)
    on = [TableColumn("on")] if len(targets) > 1 else []
    title = title if on or not targets else f"{title} on {next(iter(targets))}"
    columns = [TableColumn(""), TableColumn("metric"), *on, *_FIGURES, TableColumn("verdict")]
    table = ResponsiveTable(title, columns)
    for (sign, metric, target, *figures, _interval, _margin, last), style, change in rows:
        verdict = last if change is None else formatting.short_verdict(change)
        # The whole unit would only widen the table.
        figures = [figure.replace(" examples/s", "/s") for figure in figures]
        table.add(*map(_plain, (sign, metric, *([target] if on else []), *figures, verdict)), style=style)
    return table


def _below(comparison: Comparison, verbose: bool, hidden: int = 0) -> Iterator[Text]:
    more = f"{hidden} more metrics, none of them worse" if hidden > 1 else "1 more metric, not worse" if hidden else ""
    details = _DETAILS if any(change.confidence for change in comparison.changes) else ""
    if not verbose and (more or details):
        text = "; ".join(filter(None, (more, details))) + _SOURCES
        yield _text(text[:1].upper() + text[1:], style="dim")
    worst = comparison.worst_slice
    if worst:
        yield _slice("worst slice", worst)
        largest = largest_change(comparison.slices)
        if largest and largest.name != worst.name:
            yield _slice("largest change of a slice", largest)
    now_wrong = sum(flip.now == "wrong" for flip in comparison.flips)
    if comparison.flips:
        yield _text(
            f"flips: {now_wrong} now wrong, {len(comparison.flips) - now_wrong} now right (--json, --format html)"
        )
    if comparison.continuations:
        yield _text(f"{formatting.equal_texts(comparison)} (--json, --format html)")
    yield from (_text(line, style="yellow") for line in formatting.evidence_lines(comparison))


def _slice(title: str, slice_change: SliceChange) -> Text:
    change = slice_change.change
    interval = formatting.interval_text(change)
    text = f"{title}: {slice_change.name} ({slice_change.rows:,} rows), {formatting.effect_text(change)}"
    interval_phrase = f", interval {interval}" if interval else ""
    return _text(f"{text}{interval_phrase}: {formatting.VERDICT_TEXTS[change.verdict]}", style=_STYLES[change.verdict])


def comparison_view(comparison: Comparison, name: str) -> RenderableType:
    """Return text, or an object that the console renders."""
    views: dict[str, Callable[[Comparison], RenderableType]] = {
        "console": partial(console_comparison, verbose=is_shown(logging.DEBUG)),
        "markdown": markdown_comparison, "html": html_comparison,
    }  # fmt: skip
    return comparison.model_dump_json(indent=2) if name == "json" else views[name](comparison)


def gate_view(result: GateResult, name: str) -> RenderableType:
    """Return a view of a gate as text, or an object that the console renders."""
    views: dict[str, Callable[[GateResult], RenderableType]] = {
        "console": partial(console_gate, verbose=is_shown(logging.DEBUG)), "markdown": markdown_gate, "html": html_gate,
        "junit": junit_gate, "github": github_gate,
    }  # fmt: skip
    return result.to_json() if name == "json" else views[name](result)


_LEVELS = {"failed": "error", "warned": "warning"}


def github_gate(result: GateResult) -> str:
    """Return `::error` for each failure, `::warning` for each inconclusive metric, and one `::notice`."""
    lines = [
        _command(_LEVELS[judgement.status], f"compress gate: {judged_name(judgement)}", judgement_text(judgement))
        for judgement in result.judgements
        if judgement.status in _LEVELS
    ]
    return "\n".join([*lines, _command("notice", "compress gate", gate_sentence(result))]) + "\n"


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={escape_property(title)}::{escape_data(message)}"


def escape_data(text: str) -> str:
    """Escape a message like `escapeData` of the workflow toolkit."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Escape a property like `escapeProperty` of the workflow toolkit."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def junit_gate(result: GateResult) -> str:
    """Return JUnit XML, in which inconclusive metrics are skipped cases with a reason."""
    sides = {name: side_text(getattr(result.comparison, name)) for name in ("baseline", "candidate")}
    suite = JunitSuite("compress gate", [_case(judgement) for judgement in result.judgements], properties=sides)
    return junit_xml("compress gate", [suite])


def _case(judgement: Judgement) -> JunitCase:
    name = f"{judged_name(judgement)} no more than {judgement.margin} worse"
    if judgement.limit:
        name = f"{judgement.metric} {judgement.margin}"
    names, text = (f"gate.{judgement.target}", name), judgement_text(judgement)
    match judgement.status:
        case "failed":
            return JunitCase(*names, "failure", text, text, "regression")
        case "warned":
            return JunitCase(*names, "skipped", message=text)
        case _:
            return JunitCase(*names, "passed", text)
