"""SVG charts: scales, axes, marks with tooltips, and labels that cover neither marks nor lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

from markupsafe import Markup, escape

Attribute = str | float | None


def format_coordinate(value: float) -> str:
    """Return a coordinate as text, to a hundredth, without trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def element(tag: str, attributes: Mapping[str, Attribute] | None = None, *children: str) -> str:
    """Return an element as markup, without attributes that are None. Children that are not markup are escaped."""
    parts = [
        f' {name}="{escape(value if isinstance(value, str) else format_coordinate(value))}"'
        for name, value in (attributes or {}).items()
        if value is not None
    ]
    return Markup(f"<{tag}{''.join(parts)}>{Markup().join(children)}</{tag}>")


def text(x: float, y: float, words: str, css_class: str = "", anchor: str = "middle") -> str:
    """Return a line of text.

    Args:
        x: Position of the anchor.
        y: Position of the baseline.
        words: Content.
        css_class: Class of the style sheet.
        anchor: `start`, `middle` or `end`.
    """
    return element("text", {"x": x, "y": y, "class": css_class or None, "text-anchor": anchor}, words)


def line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
    """Return a straight line.

    Args:
        x1: Start.
        y1: Start.
        x2: End.
        y2: End.
        css_class: Class of the style sheet.
    """
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css_class})


def polyline_points(points: Iterable[tuple[float, float]]) -> str:
    """Return the `points` attribute of a polyline or a polygon."""
    return " ".join(f"{format_coordinate(x)},{format_coordinate(y)}" for x, y in points)


def shape(kind: str, x: float, y: float, size: float = 5.5) -> str:
    """Return a square for `baseline`, a diamond for `final`, and a dot for any other kind of mark.

    Args:
        kind: Kind of mark.
        x: Centre.
        y: Centre.
        size: Half the width of a square.
    """
    if kind == "baseline":
        corner = {"x": x - size, "y": y - size, "width": 2 * size, "height": 2 * size, "rx": 1.5}
        return element("rect", {**corner, "class": "mark"})
    if kind == "final":
        d = size * 1.4
        path = f"M{x:.2f} {y - d:.2f}l{d:.2f} {d:.2f}l{-d:.2f} {d:.2f}l{-d:.2f} {-d:.2f}z"
        return element("path", {"d": path, "class": "mark"})
    return element("circle", {"cx": x, "cy": y, "r": size - 1, "class": "mark"})


def with_tooltip(css_class: str, tip: str, *parts: str, focus: str = "0") -> str:
    """Return a group of parts with a tooltip, which also a screen reader reads.

    Args:
        css_class: Class of the style sheet.
        tip: Text of the tooltip.
        *parts: Markup of the parts.
        focus: `0` if the keyboard can reach the group, `-1` if not.
    """
    return element("g", {"class": css_class, "tabindex": focus}, *parts, element("title", None, tip))


DataPoint = tuple[float, float]
_STEP = 6.0
"""Distance between the boxes along a line that labels must not cover."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart, and the edges of its plotting area."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


SMALL = Frame(480.0, 350.0, 56.0, 466.0, 34.0, 298.0)
"""Frame of a chart of which two fit side by side."""


class Plot:
    """Chart with axes, lines, marks and labels. Marks have tooltips, and labels cover neither marks nor lines."""

    def __init__(self, frame: Frame, x: Scale, y: Scale) -> None:
        self.frame, self.x, self.y = frame, x, y
        self._parts: list[str] = []
        self._taken: list[Box] = []

    def at(self, values: DataPoint) -> DataPoint:
        """Return the coordinates of a pair of values."""
        return self.x(values[0]), self.y(values[1])

    def add(self, *parts: str) -> None:
        """Add markup on top of what the chart already has."""
        self._parts += parts

    def x_axis(self, title: str, write: Callable[[float], str], count: int = 5) -> None:
        """Add vertical gridlines, tick labels, and a title below."""
        frame = self.frame
        for tick in self.x.ticks(count):
            x = self.x(tick)
            self.add(line(x, frame.top, x, frame.bottom, "grid"), text(x, frame.bottom + 18, write(tick), "tick"))
        self.x_axis_line()
        self.add(text((frame.left + frame.right) / 2, frame.bottom + 38, title, "axis-title"))

    def x_axis_line(self) -> None:
        """Add the horizontal line at the bottom of the plotting area."""
        self.add(line(self.frame.left, self.frame.bottom, self.frame.right, self.frame.bottom, "axis"))

    def y_axis(self, title: str, write: Callable[[float], str], count: int = 5) -> None:
        """Add horizontal gridlines, tick labels at the left, and a title above."""
        frame = self.frame
        for tick in self.y.ticks(count):
            y = self.y(tick)
            self.add(
                line(frame.left, y, frame.right, y, "grid"), text(frame.left - 8, y + 4, write(tick), "tick", "end")
            )
        if title:
            self.add(text(4, frame.top - 16, title, "axis-title", "start"))

    def line(self, points: Sequence[DataPoint], css_class: str) -> str:
        """Return a line through points, which labels do not cover."""
        coordinates = [self.at(point) for point in points]
        self._keep_clear(coordinates)
        return element("polyline", {"points": polyline_points(coordinates), "class": css_class, "fill": "none"})

    def straight(self, start: DataPoint, end: DataPoint, css_class: str) -> str:
        """Return a straight line, which labels do not cover."""
        coordinates = self.at(start), self.at(end)
        self._keep_clear(coordinates)
        return line(*coordinates[0], *coordinates[1], css_class)

    def _keep_clear(self, coordinates: Sequence[DataPoint]) -> None:
        for (x1, y1), (x2, y2) in pairwise(coordinates):
            steps = max(1, round(math.dist((x1, y1), (x2, y2)) / _STEP))
            middles = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
            self._taken += [Box(x - 2, y - 2, x + 2, y + 2) for x, y in middles]

    def mark(
        self,
        kind: str,
        at: DataPoint,
        tip: str,
        size: float = 5.5,
        across: DataPoint | None = None,
        up: DataPoint | None = None,
        shift: float = 0.0,
    ) -> str:
        """Return a mark of `shape` with its tooltip and its intervals.

        Args:
            kind: Kind of mark.
            at: Values that the mark stands for.
            tip: Text of the tooltip.
            size: Half the width of a square.
            across: Interval of the first value.
            up: Interval of the second value.
            shift: Distance by which the mark is lowered.
        """
        (x, y), bars = self.at(at), []
        if up is not None:
            low, high = self.y(up[0]), self.y(up[1])
            bars += [line(x, low, x, high, "interval")]
            bars += [line(x - 4, end, x + 4, end, "interval") for end in (low, high)]
            self._taken.append(Box(x - 5, high, x + 5, low))
        if across is not None:
            bars.append(line(self.x(across[0]), y + shift, self.x(across[1]), y + shift, "interval"))
        return with_tooltip(f"point {kind}", tip, *bars, shape(kind, x, y + shift, size))

    def dot(self, at: DataPoint, radius: float, css_class: str, tip: str, focus: str = "0") -> str:
        """Return a dot with its tooltip, which labels do not cover.

        Args:
            at: Values that the dot stands for.
            radius: Radius.
            css_class: Class of the style sheet.
            tip: Text of the tooltip.
            focus: `0` if the keyboard can reach the dot, `-1` if not.
        """
        x, y = self.at(at)
        self._taken.append(Box(x - 4, y - 4, x + 4, y + 4))
        return with_tooltip(
            css_class, tip, element("circle", {"cx": x, "cy": y, "r": radius, "class": "mark"}), focus=focus
        )

    def name(self, x: float, y: float, words: str, css_class: str, anchor: str = "middle") -> None:
        """Add text at coordinates, which labels do not cover.

        Args:
            x: Position of the anchor.
            y: Position of the baseline.
            words: Content.
            css_class: Class of the style sheet.
            anchor: `start`, `middle` or `end`.
        """
        width = len(words) * CHARACTER
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        self._taken.append(Box(left, y - LINE, left + width, y + 5))
        self.add(text(x, y, words, css_class, anchor))

    def labels(self, named: Sequence[tuple[DataPoint, str, str]]) -> None:
        """Add a label beside each point, the important ones first. A line connects a distant label with its point.

        Args:
            named: Values, text and class of each label.
        """
        points, frame = [self.at(values) for values, _, _ in named], self.frame
        bounds = Box(frame.left, frame.top - 2, frame.right + 10, frame.bottom)
        placed = place_labels(points, [words for _, words, _ in named], bounds, self._taken)
        for (_, words, css_class), (x, y), (box, has_leader) in zip(named, points, placed, strict=True):
            if has_leader:
                nearest = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
                self.add(line(x, y, *nearest, "leader"))
            self.add(text((box.left + box.right) / 2, box.bottom - 4, words, css_class))

    def svg(self, label: str) -> str:
        """Return the image, which scales with its container. ``label`` is its text for screen readers."""
        box = f"0 0 {format_coordinate(self.frame.width)} {format_coordinate(self.frame.height)}"
        return element("svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}, *self._parts)


_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_DECADE_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` multiples of 1, 2, 2.5 or 5 times a power of ten within ``low``..``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in _STEPS if nice * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{multiple * step:.12g}") for multiple in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers for a logarithmic axis: powers of ten, and finer steps in a range of few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _DECADE_STEPS:
        ticks = [float(f"{step * 10.0**power:.12g}") for power in decades for step in steps]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / count)]
    return nice_ticks(low, high, 4)


@dataclass(frozen=True)
class Scale:
    """Linear or logarithmic mapping of ``low``..``high`` to the coordinates ``start``..``end``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of ``value``. Values outside are drawn at the border."""
        inside = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, inside))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values within the scale."""
        return (log_ticks if self.logarithmic else nice_ticks)(self.low, self.high, count)


def scale_around(
    values: Iterable[float], start: float, end: float, logarithmic: bool = False, margin: float = 0.08
) -> Scale:
    """Return a scale that contains ``values`` with a margin on both sides.

    Args:
        values: Values that the scale must contain.
        start: Coordinate of the lower end.
        end: Coordinate of the upper end.
        logarithmic: Whether the scale is logarithmic.
        margin: Margin as a share of the values' range.
    """
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    # A report may hold times of 0, which have no logarithm.
    if logarithmic and low > 0:
        factor = max(high / low, 1.2) ** margin
        if high / low < 1.2:
            low, high = low / 1.1, high * 1.1
        return Scale(low / factor, high * factor, start, end, True)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        spread = abs(high) * 0.05 or 1.0
        low, high = low - spread, high + spread
    pad = (high - low) * margin
    return Scale(low - pad, high + pad, start, end)


CHARACTER = 7.8
"""Width of a character in a chart's coordinates, wide enough for the larger letters on a phone."""
LINE = 15.0


@dataclass(frozen=True)
class Box:
    """Rectangle whose y axis points downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Return the area that both rectangles cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, bounds: Box) -> float:
        """Return the length by which it exceeds ``bounds``, summed over the four sides."""
        left, top = max(0.0, bounds.left - self.left), max(0.0, bounds.top - self.top)
        return left + top + max(0.0, self.right - bounds.right) + max(0.0, self.bottom - bounds.bottom)


class PlacedLabel(NamedTuple):
    """Box of a label, and whether it is so far off that a line should connect it with its point."""

    box: Box
    has_leader: bool


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], bounds: Box, obstacles: Sequence[Box] = ()
) -> list[PlacedLabel]:
    """Return a box for each point's text, greedily in the given order, so that important labels come first.

    Args:
        points: Coordinates of the points.
        texts: Text of each point.
        bounds: Area that labels should lie in.
        obstacles: Areas that labels must not cover.
    """
    occupied = [*obstacles, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y in points)]
    placed = []
    for (x, y), content in zip(points, texts, strict=True):
        # Boxes around a point with their distance from it: right, left, above, below, then the corners.
        width = len(content) * CHARACTER
        directions = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
        options = []
        for gap, (dx, dy) in product((9.0, 20.0, 34.0, 52.0, 74.0), directions):
            shift = gap if dx == 0 or dy == 0 else gap * 0.7
            middle_x, middle_y = x + dx * (shift + width / 2), y + dy * (shift + LINE / 2)
            box = Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2)
            options.append((box, gap))
        # Leaving the plotting area is worst, then covering something, then the distance from the point.
        costs = [
            sum(box.overlap(other) for other in occupied) * 4 + box.outside(bounds) * 200 + gap for box, gap in options
        ]
        best = options[costs.index(min(costs))]
        placed.append(PlacedLabel(best[0], best[1] > 9))
        occupied.append(best[0])
    return placed
