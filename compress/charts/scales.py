"""Scales from values to places on the paper, and their round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
