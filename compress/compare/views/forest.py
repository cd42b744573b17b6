"""Effects with their intervals against margins, one row a change, worse to the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.compare.change import Change
from compress.compare.words import confidence_text, effect_text, interval_text, margin_text
from compress.metrics import describe_metric, significant
from compress.report.markup import element
from compress.report.svg import nice_ticks

_FACTORS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_FURTHEST = math.log(1000.0)
_ROW = 26.0
_PAD = 0.06
_CLOSEST = 0.13
"""Share of the width that two tick labels keep apart."""


@dataclass(frozen=True)
class Axis:
    """Losses from ``low`` to ``high``: points of a share, or logarithms of ratios where ``relative``."""

    low: float
    high: float
    relative: bool

    def place(self, loss: float) -> str:
        """Where a loss is drawn, in per cent of the width."""
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        return f"{share * 100:.2f}%"

    def ticks(self) -> list[tuple[float, str]]:
        """Losses with their labels, far enough apart to be read; 0 is always one."""
        if self.relative:
            steps = [(math.log(factor), _factor(factor)) for factor in _FACTORS]
        else:
            steps = [(tick, f"{significant(tick * 100, 2)}") for tick in nice_ticks(0.0, max(self.high, -self.low), 4)]
        known = [(0.0, "0")]
        for size, words in reversed(steps):
            for loss in (size, -size):
                inside = self.low <= loss <= self.high and size > 0
                if inside and all(abs(loss - other) >= _CLOSEST * (self.high - self.low) for other, _ in known):
                    known.append((loss, words))
        return sorted(known)


def axis_of(changes: Sequence[Change]) -> Axis:
    """An axis that holds every effect and margin, and as much of the intervals as leaves those to be seen."""
    relative = changes[0].scale == "relative"
    bounds = [_losses(change) for change in changes]
    margins = [_on_axis(change.margin, relative) for change in changes]
    reach = 2.5 * max([*margins, *(abs(value) for value, _, _ in bounds), 1e-4])
    ends = [0.0, *margins, *(-margin for margin in margins)]
    for value, low, high in bounds:
        ends += [value, max(low, -reach), min(high, reach)]
    low, high = min(ends), max(ends)
    pad = (high - low) * _PAD or 1e-4
    return Axis(low - pad, high + pad, relative)


def axis_head(axis: Axis) -> str:
    """The ticks and which way is worse, as the head of the column."""
    parts = [
        element("text", {"x": axis.place(loss), "y": 30.0, "text-anchor": "middle", "class": "tick"}, words)
        for loss, words in axis.ticks()
    ]
    parts += [
        element("text", {"x": "0%", "y": 12.0, "text-anchor": "start", "class": "way"}, "\u2190 better"),
        element("text", {"x": "100%", "y": 12.0, "text-anchor": "end", "class": "way"}, "worse \u2192"),
    ]
    label = "change in points" if not axis.relative else "change as a part of the baseline"
    return element("svg", {"class": "forest head", "role": "img", "aria-label": label}, *parts)


def forest_row(change: Change, axis: Axis) -> str:
    """The change as a dot with its interval, over the band in which it would not matter."""
    value, low, high = _losses(change)
    margin = _on_axis(change.margin, axis.relative)
    middle = _ROW / 2
    left, right = axis.place(-margin), axis.place(margin)
    width = f"{float(right[:-1]) - float(left[:-1]):.2f}%"
    parts = [element("rect", {"x": left, "y": 3.0, "width": width, "height": _ROW - 6, "class": "band"})]
    for loss, _ in axis.ticks():
        css_class = "zero" if loss == 0 else "grid"
        parts.append(_line(axis.place(loss), 0.0, axis.place(loss), _ROW, css_class))
    if low < high:
        parts.append(_line(axis.place(low), middle, axis.place(high), middle, "span"))
        parts += [
            _line(axis.place(end), middle - 4, axis.place(end), middle + 4, "span")
            for end in (low, high)
            if axis.low <= end <= axis.high
        ]
    parts.append(element("circle", {"cx": axis.place(value), "cy": middle, "r": 5.0, "class": "dot"}))
    words = described(change)
    parts.append(element("title", None, words))
    css_class = f"forest {change.verdict.replace(chr(39), '').replace(' ', '-')}"
    return element("svg", {"class": css_class, "role": "img", "aria-label": words}, *parts)


def described(change: Change) -> str:
    """The row in words, for a tooltip and a screen reader."""
    interval = interval_text(change)
    known = f", {confidence_text(change)} interval {interval}" if interval else ""
    return f"{change.metric}: {effect_text(change)}{known}; {matters(change)}: {change.verdict}"


def matters(change: Change) -> str:
    """Which changes matter, in words."""
    return f"matters from {margin_text(change)}" if change.margin else "any change matters"


def _losses(change: Change) -> tuple[float, float, float]:
    """Effect, low and high so that larger is worse."""
    relative = change.scale == "relative"
    value, low, high = (_on_axis(effect, relative) for effect in (change.effect, change.low, change.high))
    if describe_metric(change.metric, change.unit).better == "higher":
        return -value, -high, -low
    return value, low, high


def _on_axis(effect: float, relative: bool) -> float:
    if not relative:
        return effect
    return max(-_FURTHEST, min(_FURTHEST, math.log1p(effect))) if effect > -1 else -_FURTHEST


def _factor(factor: float) -> str:
    return f"{factor:g}x" if factor >= 2 else f"{(factor - 1) * 100:g}%"


def _line(x1: str, y1: float, x2: str, y2: float, css_class: str) -> str:
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css_class})
