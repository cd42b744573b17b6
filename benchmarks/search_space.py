"""What spaces share whose recipes are never run: a table of outcomes, or a world that is told from some."""

from __future__ import annotations

import json
from collections.abc import Sequence

from compress.plugins.search.parameters import Knob
from compress.plugins.search.space import Point
from compress.recipe.recipe import Recipe


class Unrun:
    """Points that are their own recipes, all of which train."""

    knobs: tuple[Knob, ...]

    @property
    def origin(self) -> Point:
        return (0,) * len(self.knobs)

    def canonical(self, point: Sequence[int]) -> Point:
        return tuple(point)

    def identity(self, point: Point) -> str:
        return json.dumps(point)

    def recipe(self, point: Point) -> Recipe:
        return None  # type: ignore[return-value]

    def trains(self, point: Point) -> bool:
        return True
