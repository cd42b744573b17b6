"""Input or output of a graph."""

from __future__ import annotations

from pydantic import Field

from compress.utils.pydantic_models import Frozen


class GraphValue(Frozen):
    """Input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None = Field(
        description="sizes, or the names of those that each call chooses; null: not stated"
    )
    file: str = Field("", description="file of the graph, relative to the model")

    def __str__(self) -> str:
        axes = "?" if self.shape is None else ", ".join("?" if axis is None else str(axis) for axis in self.shape)
        return f"{self.name} {self.dtype} [{axes}]"
