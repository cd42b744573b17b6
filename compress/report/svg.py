"""Chart primitives: scales with nice ticks, and the frame that a chart is drawn in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.report.markup import element, number

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_DECADE_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The multiples of 1, 2, 2.5 or 5 times a power of ten within ``low``..``high``: about ``count``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in _STEPS if nice * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers for a logarithmic axis: powers of ten, finer ones in a range of few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in _DECADE_STEPS:
        ticks = [float(f"{step * 10.0**power:.12g}") for power in decades for step in steps]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / count)]
    return nice_ticks(low, high, 4)


@dataclass(frozen=True)
class Scale:
    """Maps ``low``..``high`` to the coordinates ``start``..``end``, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``; values outside are drawn at the border."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, self._clip(value)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def _clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale."""
        return (log_ticks if self.logarithmic else nice_ticks)(self.low, self.high, count)


def scale_around(
    values: Iterable[float], start: float, end: float, logarithmic: bool = False, margin: float = 0.08
) -> Scale:
    """A scale that holds ``values`` with a ``margin`` (share of their span) on both sides."""
    known = list(values)
    low, high = min(known), max(known)
    if logarithmic:
        factor = max(high / low, 1.2) ** margin
        if high / low < 1.2:
            low, high = low / 1.1, high * 1.1
        return Scale(low / factor, high * factor, start, end, True)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        spread = abs(high) * 0.05 or 1.0
        low, high = low - spread, high + spread
    pad = (high - low) * margin
    return Scale(low - pad, high + pad, start, end)


@dataclass(frozen=True)
class Axis:
    """A scale with its title and how its ticks are written."""

    scale: Scale
    title: str
    write: Callable[[float], str]
    count: int = 5


def text(x: float, y: float, content: str, css_class: str = "", anchor: str = "middle") -> str:
    """A line of text, escaped."""
    position = {"x": x, "y": y, "class": css_class or None, "text-anchor": anchor}
    return element("text", position, content)


def line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
    """A straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css_class})


def polyline(points: Sequence[tuple[float, float]], css_class: str) -> str:
    """A line through ``points``."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("polyline", {"points": path, "class": css_class, "fill": "none"})


def title(content: str) -> str:
    """The tooltip of the element it is put in."""
    return element("title", None, content)


def x_axis(axis: Axis, top: float, bottom: float) -> str:
    """Gridlines from ``top`` to ``bottom``, tick labels and title below."""
    parts = []
    for tick in axis.scale.ticks(axis.count):
        x = axis.scale(tick)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 18, axis.write(tick), "tick")]
    middle = (axis.scale.start + axis.scale.end) / 2
    parts += [line(axis.scale.start, bottom, axis.scale.end, bottom, "axis")]
    return Markup().join([*parts, text(middle, bottom + 38, axis.title, "axis-title")])


def y_axis(axis: Axis, left: float, right: float) -> str:
    """Gridlines from ``left`` to ``right``, tick labels at the left, the title above the axis."""
    parts = []
    for tick in axis.scale.ticks(axis.count):
        y = axis.scale(tick)
        parts += [line(left, y, right, y, "grid"), text(left - 8, y + 4, axis.write(tick), "tick", "end")]
    return Markup().join([*parts, text(4, axis.scale.end - 16, axis.title, "axis-title", "start")])


def chart(width: float, height: float, label: str, *children: str) -> str:
    """An SVG image that scales with its box. ``label`` is what a screen reader says."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}, *children)
