"""The roofline: every operator by its operations per byte and per second, under what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from compress.bench.profile import MachineLimits, Profile, Row
from compress.metrics import significant
from compress.report.labels import CHARACTER, LINE, Box, place_labels
from compress.report.markup import element
from compress.report.profile_words import binds_text, rate_text, share_text, time_text
from compress.report.svg import Axis, Scale, chart, line, text, title, x_axis, y_axis

WIDTH, HEIGHT = 640.0, 430.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 620.0, 40.0, 376.0
_LABELLED = 6
_LARGEST_RADIUS, _SMALLEST_RADIUS = 11.0, 2.5
_ROOM = 2.0
_STEP = 6.0


class Roofline(NamedTuple):
    """One line of the roof, from (intensity, operations/s) to the next corner."""

    kind: str
    label: str
    start: tuple[float, float]
    end: tuple[float, float]


def roofline_chart(profile: Profile) -> str | None:
    """An SVG chart on logarithmic axes; None where no operator does arithmetic."""
    rows = [row for row in profile.rows if _drawn(row)]
    if not rows:
        return None
    x, y = _scales([*rows, *([profile.whole] if _drawn(profile.whole) else [])], profile.limits)
    across = Axis(x, "Operations for each byte moved (log scale)", lambda value: significant(value, 2), 7)
    up = Axis(y, "Operations per second (log scale)", _rate_tick, 6)
    parts = [x_axis(across, TOP, BOTTOM), y_axis(up, LEFT, RIGHT)]
    lines = roof_lines(profile.limits, x.low, x.high, y.low)
    for roof in lines:
        parts.append(line(x(roof.start[0]), y(roof.start[1]), x(roof.end[0]), y(roof.end[1]), f"roof {roof.kind}"))
    longest, together = max(row.time_ms for row in rows), sum(row.time_ms for row in profile.rows)
    # Small dots last, so that none is hidden under a large one.
    for row in sorted(rows, key=lambda row: -row.time_ms):
        parts.append(_dot(row, x, y, _radius(row.time_ms / longest), together))
    if _drawn(profile.whole):
        parts.append(_whole(profile.whole, x, y))
    label = f"{len(rows)} operators under the roofline of this machine"
    return chart(WIDTH, HEIGHT, label, *parts, *_roof_names(lines, x, y), *_labels(profile, rows, lines, x, y))


def roof_lines(limits: MachineLimits, low: float, high: float, floor: float) -> list[Roofline]:
    """The flat roofs of both arithmetics from where bandwidth reaches them, and a slope for each bandwidth.

    ``low`` and ``high`` bound the intensity, ``floor`` is the least rate that is drawn.
    """
    lines = []
    top = max(limits.int8_per_s, limits.fp32_per_s)
    bandwidths = (
        ("memory", "memory", limits.memory_bytes_per_s),
        ("working", "working set", limits.working_set_bytes_per_s),
    )
    fastest = max(rate for _, _, rate in bandwidths)
    for kind, name, rate in bandwidths:
        start, end = max(low, floor / rate), min(high, top / rate)
        if start < end:
            label = f"{name} {rate_text(rate, 'B')}"
            lines.append(Roofline(kind, label, (start, start * rate), (end, end * rate)))
    flat = (("int8", "8-bit", limits.int8_per_s, "OP"), ("fp32", "float", limits.fp32_per_s, "FLOP"))
    for kind, name, rate, unit in flat:
        start = max(low, rate / fastest)
        if start < high:
            lines.append(Roofline(kind, f"{name} {rate_text(rate, unit)}", (start, rate), (high, rate)))
    return lines


def _drawn(row: Row) -> bool:
    return row.counted and row.operations_per_s > 0 and (row.intensity or 0.0) > 0


def _scales(rows: Sequence[Row], limits: MachineLimits) -> tuple[Scale, Scale]:
    top = max(limits.int8_per_s, limits.fp32_per_s)
    intensities = [row.intensity or 1.0 for row in rows]
    ridge = top / limits.memory_bytes_per_s
    x = Scale(min(intensities) / _ROOM, max(*intensities, ridge) * _ROOM * 2, LEFT, RIGHT, True)
    rates = [row.operations_per_s for row in rows]
    return x, Scale(min(rates) / _ROOM, max(top, *rates) * _ROOM, BOTTOM, TOP, True)


def _rate_tick(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value / 1e3:g} k"


def _radius(share: float) -> float:
    return max(_SMALLEST_RADIUS, _LARGEST_RADIUS * math.sqrt(share))


def _arithmetic(row: Row) -> str:
    return "int8" if row.int8_operations > row.fp32_operations else "fp32"


def _dot(row: Row, x: Scale, y: Scale, radius: float, together_ms: float) -> str:
    cx, cy = x(row.intensity or x.low), y(row.operations_per_s)
    words = [
        f"{row.operators[0]} ({row.name})",
        row.layer or "",
        f"{time_text(row.time_ms)}, {row.time_ms / together_ms:.1%} of the operators' time",
        f"{rate_text(row.operations_per_s, 'OP')}, {rate_text(row.bytes_per_s, 'B')}",
        f"{share_text(row.share_of_roof)} of the limit; binds: {binds_text(row)}",
    ]
    mark = element("circle", {"cx": cx, "cy": cy, "r": radius, "class": "mark"})
    attributes = {"class": f"point {_arithmetic(row)}", "tabindex": "0"}
    return element("g", attributes, mark, title("\n".join(filter(None, words))))


def _whole(row: Row, x: Scale, y: Scale) -> str:
    cx, cy, d = x(row.intensity or x.low), y(row.operations_per_s), 9.0
    path = f"M{cx:.2f} {cy - d:.2f}l{d:.2f} {d:.2f}l{-d:.2f} {d:.2f}l{-d:.2f} {-d:.2f}z"
    words = f"The whole model\n{time_text(row.time_ms)}, {share_text(row.share_of_roof)} of the limit"
    return element(
        "g", {"class": "point whole", "tabindex": "0"}, element("path", {"d": path, "class": "mark"}), title(words)
    )


def _roof_names(lines: Sequence[Roofline], x: Scale, y: Scale) -> list[str]:
    """Flat roofs get their name at the right end, slopes along the line."""
    names = []
    for roof in lines:
        (x1, y1), (x2, y2) = (x(roof.start[0]), y(roof.start[1])), (x(roof.end[0]), y(roof.end[1]))
        if roof.start[1] == roof.end[1]:
            names.append(text(x2, y2 - 6, roof.label, f"roof-name {roof.kind}", "end"))
            continue
        angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
        # The slopes lie close together: one is named above, the other below.
        away = -7 if roof.kind == "working" else 15
        place = 0.32
        mx, my = x1 + place * (x2 - x1), y1 + place * (y2 - y1)
        attributes = {
            "class": f"roof-name {roof.kind}",
            "text-anchor": "middle",
            "transform": f"translate({mx:.1f} {my:.1f}) rotate({angle:.1f}) translate(0 {away})",
        }
        names.append(element("text", attributes, roof.label))
    return names


def _along(lines: Sequence[Roofline], x: Scale, y: Scale) -> list[Box]:
    """Small boxes on the roof and larger ones under its flat parts' names, for labels to keep clear of."""
    boxes = []
    for roof in lines:
        (x1, y1), (x2, y2) = (x(roof.start[0]), y(roof.start[1])), (x(roof.end[0]), y(roof.end[1]))
        steps = max(1, round(math.dist((x1, y1), (x2, y2)) / _STEP))
        places = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
        boxes += [Box(px - 2, py - 2, px + 2, py + 2) for px, py in places]
        if y1 == y2:
            boxes.append(Box(x2 - len(roof.label) * CHARACTER, y2 - LINE - 6, x2, y2))
    return boxes


def _labels(profile: Profile, rows: Sequence[Row], lines: Sequence[Roofline], x: Scale, y: Scale) -> list[str]:
    """The operator types that take longest, each beside its longest node, and the whole model."""
    chosen: list[tuple[str, Row]] = [("whole model", profile.whole)] if _drawn(profile.whole) else []
    for group in profile.by_operator()[:_LABELLED]:
        members = [row for row in rows if row.operators == group.operators]
        if members:
            chosen.append((group.name, max(members, key=lambda row: row.time_ms)))
    points = [(x(row.intensity or x.low), y(row.operations_per_s)) for _, row in chosen]
    dots = [(x(row.intensity or x.low), y(row.operations_per_s)) for row in rows]
    obstacles = [*_along(lines, x, y), *(Box(cx - 4, cy - 4, cx + 4, cy + 4) for cx, cy in dots)]
    placed = place_labels(points, [name for name, _ in chosen], Box(LEFT, TOP - 2, RIGHT, BOTTOM), obstacles)
    parts = []
    for (name, _), (cx, cy), spot in zip(chosen, points, placed, strict=True):
        box = spot.box
        if spot.led:
            near = (min(max(cx, box.left), box.right), min(max(cy, box.top), box.bottom))
            parts.append(line(cx, cy, near[0], near[1], "leader"))
        parts.append(text((box.left + box.right) / 2, box.bottom - 4, name, "label"))
    return parts
