"""A diff for the console, and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.diff.heatmap import heat_map
from compress.plugins.diff.models import field_words, percent, weights_words
from compress.plugins.diff.record import Diff, LimitFound, TensorChange
from compress.report.compare import forest_plot
from compress.report.compare import formatting as compare_words
from compress.report.compare.pages import change_rows
from compress.report.pages import render
from compress.results.formatting import format_measurement, format_number
from compress.results.metrics import describe_metric
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_STYLES = {"identical": "green", "same": "green", "changed": "yellow"}
_CHIPS = {"kept": "passed", "missed": "missed", "cannot tell": "unknown", "not measured": "unknown"}
_MOST_FIELDS, _MOST_LAYERS = 12, 12
SENTENCES = {
    "identical": "identical in every weight",
    "same": "the same but for rounding",
    "changed": "not the same",
}


def verdict_words(diff: Diff) -> str:
    """The verdict as a sentence would have it."""
    if diff.weights is None:
        return "settings differ" if diff.fields else "no setting differs"
    return SENTENCES[diff.verdict]


def short(name: str) -> str:
    """The last part of a path."""
    return Path(name).name or name


def console_diff(diff: Diff) -> RenderableType:
    """Verdict and what to look at first, then each depth."""
    parts: list[RenderableType] = [
        Text(f"{diff.before} \u2192 {diff.after}: {verdict_words(diff)}", style=f"bold {_STYLES[diff.verdict]}"),
        Text(f"first: {diff.first}"),
        *(Text(line) for line in diff.summary),
    ]
    if diff.fields:
        table = ResponsiveTable(
            "Files and recipe", [TableColumn("file"), TableColumn("what"), TableColumn("A"), TableColumn("B")]
        )
        for one in diff.fields[:_MOST_FIELDS]:
            table.add(one.file, one.field, one.before or "none", one.after or "none")
        parts += [table, *_more(len(diff.fields), _MOST_FIELDS)]
    if diff.weights is not None and diff.weights.layers:
        columns = [
            TableColumn("layer"),
            TableColumn("change", right=True),
            TableColumn("beyond rounding", right=True, rank=1),
            TableColumn("tensors", right=True, rank=2),
            TableColumn("what", rank=3),
        ]
        table = ResponsiveTable("Layers, the one that changed most first", columns)
        for layer in diff.weights.layers[:_MOST_LAYERS]:
            counted = f"{layer.changed} of {layer.tensors}"
            figures = percent(layer.relative), percent(layer.unexplained)
            table.add(layer.name, *figures, counted, "; ".join(layer.causes) or layer.worst)
        parts += [table, *_more(len(diff.weights.layers), _MOST_LAYERS)]
    parts += [Text(f"{found.name}: {limit_words(found)}", style="red" if found.state == "missed" else "")
              for found in diff.limits]  # fmt: skip
    parts += [Text(f"not compared: {line}", style="yellow") for line in diff.not_compared]
    return Group(*parts)


def _more(count: int, shown: int) -> Iterator[Text]:
    if count > shown:
        yield Text(f"and {count - shown} more: --format html or --json has all")


def limit_words(found: LimitFound) -> str:
    """`0.031, at most 0.02: missed`."""
    value = "not measured" if found.value is None else format_number(found.value, 3)
    return f"{value}, at most {format_number(found.bound, 3)}: {found.state}"


def html_diff(diff: Diff) -> str:
    """The page: heat map, layers, fields, answers, and every tensor that isn't identical."""
    comparison = diff.answers.comparison if diff.answers else None
    tensors = diff.weights.tensors if diff.weights else ()
    moved = sorted(
        (one for one in tensors if one.how != "identical"), key=lambda one: (-one.unexplained, -one.relative)
    )
    missed = any(found.state == "missed" for found in diff.limits)
    return render(
        "plugins/diff/templates/diff.html",
        f"{short(diff.before)} and {short(diff.after)} \u00b7 compress diff",
        diff.model_dump_json(by_alias=True),
        styled="report/compare/templates/comparison.html",
        diff=diff,
        name=f"{short(diff.before)} \u2192 {short(diff.after)}",
        state="missed" if missed else "passed" if diff.verdict != "changed" else "unknown",
        sentence=verdict_words(diff),
        heat=heat_map(tensors) if tensors else "",
        moved=moved,
        comparison=comparison,
        slices=sorted(comparison.slices, key=lambda part: part.change.effect) if comparison else (),
        chips=_CHIPS,
        describe=lambda row: describe_metric(row.metric, row.unit).title,
        measured=format_measurement,
        figures=_figures,
        percent=percent,
        field_words=field_words,
        limit_words=limit_words,
        weights_words=weights_words,
        change_rows=change_rows,
        words=compare_words,
        forest=forest_plot,
    )


def _figures(one: TensorChange) -> tuple[str, ...]:
    """Shape, bits, change, beyond rounding, cosine, factor, range, zeros, head of the spectrum."""
    ranges = [format_number(value, 3) for value in one.ranges]
    head = "" if one.spectrum is None else " \u2192 ".join(
        ", ".join(format_number(value, 3) for value in side[:2]) for side in one.spectrum
    )  # fmt: skip
    bits = f"{one.bits[0]:g}" if one.bits[0] == one.bits[1] else f"{one.bits[0]:.3g} \u2192 {one.bits[1]:.3g}"
    zeros = percent(one.sparsity[0])
    zeros = zeros if one.sparsity[0] == one.sparsity[1] else f"{zeros} \u2192 {percent(one.sparsity[1])}"
    return (
        "\u00d7".join(map(str, one.shape)),
        bits,
        percent(one.relative),
        percent(one.unexplained),
        f"{one.cosine:.5f}",
        f"{one.factor:.4f}",
        f"{ranges[0]}\u2026{ranges[1]} \u2192 {ranges[2]}\u2026{ranges[3]}",
        zeros,
        head,
    )
