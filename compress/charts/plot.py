"""A chart that is drawn part by part, in the values of its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.charts.labels import CHARACTER, LINE, Box, place_labels
from compress.charts.markup import element, joined, line, number, shape, text, told
from compress.charts.scales import Scale

Place = tuple[float, float]
_STEP = 6.0
"""How close boxes lie on a line that labels keep clear of."""


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and the edges of what is drawn within it."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


SMALL = Frame(480.0, 350.0, 56.0, 466.0, 34.0, 298.0)
"""Two of them stand side by side."""


class Plot:
    """Axes, lines, marks and labels between two scales. Marks have tooltips; labels cover neither marks nor lines."""

    def __init__(self, frame: Frame, x: Scale, y: Scale) -> None:
        self.frame, self.x, self.y = frame, x, y
        self._parts: list[str] = []
        self._taken: list[Box] = []

    def at(self, place: Place) -> Place:
        """Where a pair of values lies on the paper."""
        return self.x(place[0]), self.y(place[1])

    def add(self, *parts: str) -> None:
        """Add markup, drawn over what is there."""
        self._parts += parts

    def x_axis(self, title: str, write: Callable[[float], str], count: int = 5) -> None:
        """Gridlines, with tick labels and a title below."""
        frame = self.frame
        for tick in self.x.ticks(count):
            x = self.x(tick)
            self.add(line(x, frame.top, x, frame.bottom, "grid"), text(x, frame.bottom + 18, write(tick), "tick"))
        self.floor()
        self.add(text((frame.left + frame.right) / 2, frame.bottom + 38, title, "axis-title"))

    def floor(self) -> None:
        """The line that the marks stand over."""
        self.add(line(self.frame.left, self.frame.bottom, self.frame.right, self.frame.bottom, "axis"))

    def y_axis(self, title: str, write: Callable[[float], str], count: int = 5) -> None:
        """Gridlines, with tick labels at the left and a title above."""
        frame = self.frame
        for tick in self.y.ticks(count):
            y = self.y(tick)
            self.add(
                line(frame.left, y, frame.right, y, "grid"), text(frame.left - 8, y + 4, write(tick), "tick", "end")
            )
        if title:
            self.add(text(4, frame.top - 16, title, "axis-title", "start"))

    def line(self, points: Sequence[Place], css_class: str) -> str:
        """A line through points, which labels keep clear of."""
        places = [self.at(point) for point in points]
        self._keep_clear(places)
        return element("polyline", {"points": joined(places), "class": css_class, "fill": "none"})

    def straight(self, start: Place, end: Place, css_class: str) -> str:
        """A straight line, which labels keep clear of."""
        places = self.at(start), self.at(end)
        self._keep_clear(places)
        return line(*places[0], *places[1], css_class)

    def _keep_clear(self, places: Sequence[Place]) -> None:
        for (x1, y1), (x2, y2) in pairwise(places):
            steps = max(1, round(math.dist((x1, y1), (x2, y2)) / _STEP))
            middles = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
            self._taken += [Box(x - 2, y - 2, x + 2, y + 2) for x, y in middles]

    def mark(
        self, kind: str, at: Place, tip: str, size: float = 5.5, across: Place | None = None, up: Place | None = None,
        shift: float = 0.0,
    ) -> str:  # fmt: skip
        """A mark of `shape` with its tooltip, over its intervals in x and in y; ``shift`` lowers it on the paper."""
        (x, y), bars = self.at(at), []
        if up is not None:
            low, high = self.y(up[0]), self.y(up[1])
            bars += [line(x, low, x, high, "interval")]
            bars += [line(x - 4, end, x + 4, end, "interval") for end in (low, high)]
            self._taken.append(Box(x - 5, high, x + 5, low))
        if across is not None:
            bars.append(line(self.x(across[0]), y + shift, self.x(across[1]), y + shift, "interval"))
        return told(f"point {kind}", tip, *bars, shape(kind, x, y + shift, size))

    def dot(self, at: Place, radius: float, css_class: str, tip: str, focus: str = "0") -> str:
        """A dot with its tooltip, which labels keep clear of."""
        x, y = self.at(at)
        self._taken.append(Box(x - 4, y - 4, x + 4, y + 4))
        return told(css_class, tip, element("circle", {"cx": x, "cy": y, "r": radius, "class": "mark"}), focus=focus)

    def name(self, x: float, y: float, words: str, css_class: str, anchor: str = "middle") -> None:
        """Words at a place of the paper, which labels keep clear of."""
        width = len(words) * CHARACTER
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        self._taken.append(Box(left, y - LINE, left + width, y + 5))
        self.add(text(x, y, words, css_class, anchor))

    def labels(self, named: Sequence[tuple[Place, str, str]]) -> None:
        """A label (place, words, class) beside each place, the important ones first; a line leads to one far off."""
        points, frame = [self.at(place) for place, _, _ in named], self.frame
        bounds = Box(frame.left, frame.top - 2, frame.right + 10, frame.bottom)
        placed = place_labels(points, [words for _, words, _ in named], bounds, self._taken)
        for (_, words, css_class), (x, y), (box, led) in zip(named, points, placed, strict=True):
            if led:
                near = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
                self.add(line(x, y, *near, "leader"))
            self.add(text((box.left + box.right) / 2, box.bottom - 4, words, css_class))

    def svg(self, label: str) -> str:
        """The image, which scales with its box. ``label`` is what a screen reader says."""
        box = f"0 0 {number(self.frame.width)} {number(self.frame.height)}"
        return element("svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}, *self._parts)
