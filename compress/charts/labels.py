"""Placing the labels of a scatter chart so that none covers a point or another label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

CHARACTER = 7.8
"""Width of a character in a chart's coordinates, ample enough for the larger letters on a phone."""
LINE = 15.0


@dataclass(frozen=True)
class Box:
    """A rectangle, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, bounds: Box) -> float:
        """How far it sticks out of ``bounds``, summed over the four sides."""
        left, top = max(0.0, bounds.left - self.left), max(0.0, bounds.top - self.top)
        return left + top + max(0.0, self.right - bounds.right) + max(0.0, self.bottom - bounds.bottom)


class Placed(NamedTuple):
    """A label's box, and whether it lies so far off that a line should lead to its point."""

    box: Box
    led: bool


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], bounds: Box, obstacles: Sequence[Box] = ()
) -> list[Placed]:
    """A place for each point's text, greedily in the given order, so the important ones come first."""
    taken = [*obstacles, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y in points)]
    placed = []
    for (x, y), content in zip(points, texts, strict=True):
        best = min(_candidates(x, y, len(content) * CHARACTER), key=lambda option: _cost(option, bounds, taken))
        placed.append(Placed(best[0], best[1] > 9))
        taken.append(best[0])
    return placed


def _candidates(x: float, y: float, width: float) -> list[tuple[Box, float]]:
    """Boxes around a point with their distance from it: right, left, above, below, then the corners."""
    directions = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
    boxes = []
    for gap, (dx, dy) in product((9.0, 20.0, 34.0, 52.0, 74.0), directions):
        shift = gap if dx == 0 or dy == 0 else gap * 0.7
        middle_x, middle_y = x + dx * (shift + width / 2), y + dy * (shift + LINE / 2)
        box = Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2)
        boxes.append((box, gap))
    return boxes


def _cost(option: tuple[Box, float], bounds: Box, taken: Sequence[Box]) -> float:
    box, gap = option
    return sum(box.overlap(other) for other in taken) * 4 + box.outside(bounds) * 200 + gap
