"""Base class of search spaces whose recipes are never run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from compress.plugins.search.space import Point, SearchParameter
from compress.recipe.recipe import Recipe


class RecordedSpace:
    """Search space without recipes: every point is canonical and trains a model."""

    parameters: tuple[SearchParameter, ...]

    @property
    def origin(self) -> Point:
        return (0,) * len(self.parameters)

    def canonicalize(self, point: Sequence[int]) -> Point:
        return tuple(point)

    def identity(self, point: Point) -> str:
        return json.dumps(point)

    def recipe(self, point: Point) -> Recipe:
        return None  # type: ignore[return-value]

    def trains(self, point: Point) -> bool:
        return True
