"""Console output and HTML page of a diff."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.diff.models import percent
from compress.plugins.diff.record import Diff, LimitFound, TensorChange
from compress.report.compare import formatting as compare_words
from compress.report.compare.pages import change_rows
from compress.report.pages import render
from compress.results.formatting import format_measurement, format_number
from compress.results.metrics import describe_metric
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_STYLES = {"identical": "green", "same": "green", "changed": "yellow"}
_CHIPS = {"kept": "passed", "missed": "missed", "cannot tell": "unknown", "not measured": "unknown"}
_MOST_FIELDS, _MOST_LAYERS = 12, 12
_SENTENCES = {
    "identical": "identical in every weight",
    "same": "the same but for rounding",
    "changed": "not the same",
}


def describe_verdict(diff: Diff) -> str:
    """Return the verdict as a phrase."""
    if diff.weights is None:
        return "settings differ" if diff.fields else "no setting differs"
    return _SENTENCES[diff.verdict]


def base_name(name: str) -> str:
    """Return the last component of a path."""
    return Path(name).name or name


def console_diff(diff: Diff) -> RenderableType:
    """Return the verdict, the first thing to examine, and a table for each depth."""
    parts: list[RenderableType] = [
        Text(f"{diff.before} \u2192 {diff.after}: {describe_verdict(diff)}", style=f"bold {_STYLES[diff.verdict]}"),
        Text(f"first: {diff.first}"),
        *(Text(line) for line in diff.summary),
    ]
    if diff.fields:
        table = ResponsiveTable("Files and recipe", [TableColumn(name) for name in ("file", "what", "A", "B")])
        for change in diff.fields[:_MOST_FIELDS]:
            table.add(change.file, change.field, change.before or "none", change.after or "none")
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
            changed_tensors = f"{layer.changed} of {layer.tensors}"
            shares = percent(layer.relative), percent(layer.unexplained)
            table.add(layer.name, *shares, changed_tensors, "; ".join(layer.causes) or layer.worst)
        parts += [table, *_more(len(diff.weights.layers), _MOST_LAYERS)]
    parts += [Text(f"{limit.name}: {describe_limits(limit)}", style="red" if limit.state == "missed" else "")
              for limit in diff.limits]  # fmt: skip
    parts += [Text(f"not compared: {line}", style="yellow") for line in diff.not_compared]
    return Group(*parts)


def _more(count: int, shown: int) -> Iterator[Text]:
    if count > shown:
        yield Text(f"and {count - shown} more: --format html or --json has all")


def describe_limits(found: LimitFound) -> str:
    """Return a limit's value, bound and state, such as `0.031, at most 0.02: missed`."""
    value = "not measured" if found.value is None else format_number(found.value, 3)
    return f"{value}, at most {format_number(found.bound, 3)}: {found.state}"


def html_diff(diff: Diff) -> str:
    """Return the HTML page with layers, fields, answers, and all tensors that are not identical."""
    comparison = diff.answers.comparison if diff.answers else None
    tensors = diff.weights.tensors if diff.weights else ()
    moved = [tensor for tensor in tensors if tensor.how != "identical"]
    moved.sort(key=lambda tensor: (-tensor.unexplained, -tensor.relative))
    missed = any(limit.state == "missed" for limit in diff.limits)
    return render(
        "plugins/diff/templates/diff.html",
        f"{base_name(diff.before)} and {base_name(diff.after)} \u00b7 compress diff",
        diff.model_dump_json(by_alias=True),
        styled="report/compare/templates/comparison.html",
        diff=diff,
        name=f"{base_name(diff.before)} \u2192 {base_name(diff.after)}",
        state="missed" if missed else "passed" if diff.verdict != "changed" else "unknown",
        sentence=describe_verdict(diff),
        moved=moved,
        comparison=comparison,
        slices=sorted(comparison.slices, key=lambda part: part.change.effect) if comparison else (),
        chips=_CHIPS,
        describe=lambda row: describe_metric(row.metric, row.unit).title,
        measured=format_measurement,
        figures=_figures,
        percent=percent,
        describe_limits=describe_limits,
        change_rows=change_rows,
        words=compare_words,
        forest=compare_words,
    )


def _figures(one: TensorChange) -> tuple[str, ...]:
    """Return the table cells of a tensor: shape, bits, change, cosine, factor, range, zeros and singular values."""
    ranges = [format_number(value, 3) for value in one.ranges]
    singular = [", ".join(format_number(value, 3) for value in side[:2]) for side in one.spectrum or ()]
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
        " \u2192 ".join(singular),
    )
