"""Profile in the terminal, and as one self-contained page.

The terminal and the page show the same rows, whose texts come from `profile_formatting`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.benchmark.profile import MachineLimits, OperatorProfile, ProfileRow
from compress.report import profile_formatting as words
from compress.report import rows
from compress.report.limits import unusable_machine
from compress.report.pages import render
from compress.report.plot import CHARACTER, Frame, Plot, Scale, element, shape, with_tooltip
from compress.report.profile_formatting import bottleneck_text, rate_text, share_text, time_text
from compress.results.formatting import format_number
from compress.utils.responsive_table import ResponsiveTable, TableColumn, bar

_BAR = 5
_STYLES = {"arithmetic": "green", "memory": "cyan", "overhead": "yellow", "not counted": "red"}


def console_profile(profile: OperatorProfile) -> RenderableType:
    """Return tables with bars, without the notes."""
    whole = profile.whole
    phase = "" if profile.phase == "batch" else f", {words.call_text(profile)}"
    title = Text(f"{profile.artifact} on {profile.target}{phase}", overflow="fold")
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    uncounted = f" (without {words.time_text(whole.uncounted_ms)} not counted)" if whole.uncounted_ms else ""
    facts = [
        ("A call takes", f"{words.time_text(whole.time_ms)} ({words.interval_text(profile)})"),
        ("The machine would need", words.time_text(whole.limit_ms)),
        ("Share of the limit", words.share_text(whole.share_of_roof) + uncounted),
        ("Binds", words.bottleneck_text(whole)),
        (
            "Operations",
            f"{words.count_text(whole.operations)} ({words.count_text(whole.int8_operations)} on 8-bit integers)",
        ),
        ("Reached", f"{words.rate_text(whole.operations_per_s, 'OP')}, {words.rate_text(whole.bytes_per_s, 'B')}"),
        *((f"Limit: {name[:1].lower()}{name[1:]}", value) for name, value in words.limit_facts(profile.limits)),
    ]
    for name, value in facts:
        table.add_row(name, Text(value))
    return Group(
        Group(table, Text(words.verdict_text(profile)), Text(words.working_set_text(profile.limits)), Text("")),
        _rows("By operator type", "Operator", profile.by_operator()),
        _rows("By layer", "Layer", profile.by_layer()),
    )


def _rows(title: str, head: str, rows: Sequence[ProfileRow]) -> ResponsiveTable:
    columns = [TableColumn(head), TableColumn("Time", right=True), TableColumn("Share", right=True)]
    columns += [TableColumn(name, right=True, rank=rank) for name, rank in (("GOP/s", 2), ("GB/s", 3), ("Limit", 1))]
    table = ResponsiveTable(
        title, [*columns, TableColumn("Binds")], "hidden at this width; see --json and --format html"
    )
    total_ms = sum(row.time_ms for row in rows) or 1.0
    for row in rows:
        share = row.time_ms / total_ms
        bound = words.bottleneck_text(row)
        table.add(
            row.name,
            words.time_text(row.time_ms),
            f"{bar(share, _BAR)} {share:5.1%}",
            words.giga_text(row.operations_per_s) if row.counted else "",
            words.giga_text(row.bytes_per_s) if row.counted else "",
            words.share_text(row.share_of_roof),
            (bound, _STYLES[bound]),
        )
    return table


def profile_page(profile: OperatorProfile) -> str:
    """Return the HTML page. Every text of the profile is escaped."""
    name = artifact_name(profile)
    return render(
        "report/templates/profile.html",
        f"{name} \u00b7 compress profile",
        json.dumps(profile.to_json()),
        name=name,
        profile=profile,
        drawing=roofline_chart(profile),
        words=words,
        noise=unusable_machine(profile.environment),
        rows=rows,
    )


def artifact_name(profile: OperatorProfile) -> str:
    """Return `quickstart/2026-11-25T15-03-48` for the model folder of a run, else the last part of the path."""
    parts = [part for part in PurePath(profile.artifact).parts if part != "/"]
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1] == "model" else (parts or ["artifact"])[-1]


_FRAME = Frame(640.0, 430.0, 60.0, 620.0, 40.0, 376.0)
_LABELLED = 6
_LARGEST_RADIUS, _SMALLEST_RADIUS = 11.0, 2.5
_ROOM = 2.0


class Roofline(NamedTuple):
    """Line of the roof, from (intensity, operations/s) to the next corner."""

    kind: str
    label: str
    start: tuple[float, float]
    end: tuple[float, float]


def roofline_chart(profile: OperatorProfile) -> str | None:
    """Return an SVG chart on logarithmic axes, or None if no operator does arithmetic."""
    rows = [row for row in profile.rows if _drawn(row)]
    if not rows:
        return None
    whole, limits = profile.whole if _drawn(profile.whole) else None, profile.limits
    places = [_place(row) for row in rows] + ([_place(whole)] if whole else [])
    (least, lowest), (most, highest) = map(min, zip(*places, strict=True)), map(max, zip(*places, strict=True))
    top = max(limits.int8_per_s, limits.fp32_per_s)
    ridge = top / limits.memory_bytes_per_s
    x = Scale(least / _ROOM, max(most, ridge) * _ROOM * 2, _FRAME.left, _FRAME.right, True)
    plot = Plot(_FRAME, x, Scale(lowest / _ROOM, max(top, highest) * _ROOM, _FRAME.bottom, _FRAME.top, True))
    plot.x_axis("Operations for each byte moved (log scale)", lambda value: format_number(value, 2), 7)
    plot.y_axis("Operations per second (log scale)", _rate_tick, 6)
    roofs = roof_lines(limits, plot.x.low, plot.x.high, plot.y.low)
    for roof in roofs:
        plot.add(plot.straight(roof.start, roof.end, f"roof {roof.kind}"))
    longest, total_ms = max(row.time_ms for row in rows), sum(row.time_ms for row in profile.rows)
    # Small dots last, so that none is hidden under a large one.
    for row in sorted(rows, key=lambda row: -row.time_ms):
        radius = max(_SMALLEST_RADIUS, _LARGEST_RADIUS * math.sqrt(row.time_ms / longest))
        arithmetic = "int8" if row.int8_operations > row.fp32_operations else "fp32"
        plot.add(plot.dot(_place(row), radius, f"point {arithmetic}", _told(row, total_ms)))
    # Each of the operator types that take longest is named at its longest node.
    labels = []
    for group in profile.by_operator()[:_LABELLED]:
        members = [row for row in rows if row.operators == group.operators]
        if members:
            labels.append((_place(max(members, key=lambda row: row.time_ms)), group.name, "label"))
    if whole:
        words = f"The whole model\n{time_text(whole.time_ms)}, {share_text(whole.share_of_roof)} of the limit"
        plot.add(with_tooltip("point whole", words, shape("final", *plot.at(_place(whole)), 9.0 / 1.4)))
        labels.insert(0, (_place(whole), "whole model", "label"))
    for roof in roofs:
        _name(plot, roof)
    plot.labels(labels)
    return plot.svg(f"{len(rows)} operators under the roofline of this machine")


def roof_lines(limits: MachineLimits, low: float, high: float, floor: float) -> list[Roofline]:
    """Return the flat roofs of both arithmetics, and a slope for each bandwidth.

    Args:
        limits: Limits of the machine.
        low: Lowest intensity of the chart.
        high: Highest intensity of the chart.
        floor: Lowest rate of the chart.
    """
    lines = []
    top = max(limits.int8_per_s, limits.fp32_per_s)
    bandwidths = (
        ("memory", "memory", limits.memory_bytes_per_s),
        ("working", "working set", limits.working_set_bytes_per_s),
    )
    for kind, name, rate in bandwidths:
        start, end = max(low, floor / rate), min(high, top / rate)
        if start < end:
            lines.append(Roofline(kind, f"{name} {rate_text(rate, 'B')}", (start, start * rate), (end, end * rate)))
    fastest = max(rate for _, _, rate in bandwidths)
    flat = (("int8", "8-bit", limits.int8_per_s, "OP"), ("fp32", "float", limits.fp32_per_s, "FLOP"))
    for kind, name, rate, unit in flat:
        start = max(low, rate / fastest)
        if start < high:
            lines.append(Roofline(kind, f"{name} {rate_text(rate, unit)}", (start, rate), (high, rate)))
    return lines


def _drawn(row: ProfileRow) -> bool:
    return row.counted and row.operations_per_s > 0 and (row.intensity or 0.0) > 0


def _place(row: ProfileRow) -> tuple[float, float]:
    return row.intensity or 0.0, row.operations_per_s


def _rate_tick(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value / 1e3:g} k"


def _told(row: ProfileRow, together_ms: float) -> str:
    words = [
        f"{row.operators[0]} ({row.name})",
        row.layer or "",
        f"{time_text(row.time_ms)}, {row.time_ms / together_ms:.1%} of the operators' time",
        f"{rate_text(row.operations_per_s, 'OP')}, {rate_text(row.bytes_per_s, 'B')}",
        f"{share_text(row.share_of_roof)} of the limit; binds: {bottleneck_text(row)}",
    ]
    return "\n".join(filter(None, words))


def _name(plot: Plot, roof: Roofline) -> None:
    """Add the name of a roof: at the right end of a flat one, along a slope."""
    (x1, y1), (x2, y2) = plot.at(roof.start), plot.at(roof.end)
    if y1 == y2:
        plot.name(x2, y2 - 6, roof.label, f"roof-name {roof.kind}", "end")
        return
    angle = math.atan2(y2 - y1, x2 - x1)
    # A third of the way along it, but right of the axis.
    half = len(roof.label) * CHARACTER / 2 * math.cos(angle)
    along = max(0.32, (_FRAME.left + half - x1) / (x2 - x1))
    # The slopes lie close together: one is named above, the other below.
    offset = -7 if roof.kind == "working" else 15
    middle = f"{x1 + along * (x2 - x1):.1f} {y1 + along * (y2 - y1):.1f}"
    attributes = {
        "class": f"roof-name {roof.kind}",
        "text-anchor": "middle",
        "transform": f"translate({middle}) rotate({math.degrees(angle):.1f}) translate(0 {offset})",
    }
    plot.add(element("text", attributes, roof.label))
