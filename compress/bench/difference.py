"""The record of two files profiled in turns: how much longer each layer of the 8-bit file takes, and why."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from compress.bench.profile import SCHEMA
from compress.frozen import FrozenAliased

_NOTABLE = 0.02


class LayerDifference(FrozenAliased):
    """One layer. ``more_ms`` is what the 8-bit file takes beyond the float one, paired pass by pass, at 95%."""

    layer: str
    float_ms: float = Field(ge=0)
    int8_ms: float = Field(ge=0)
    more_ms: float
    low_ms: float
    high_ms: float
    operators: tuple[str, ...] = Field(description="of the 8-bit file, those that take longest first")
    why: str = Field(description="what adds most to it, or saves most")
    help: str = ""


class CauseDifference(FrozenAliased):
    """One reason over all layers; negative where time is gained."""

    why: str
    help: str = ""
    more_ms: float
    layers: tuple[str, ...]
    operators: tuple[str, ...]


class OperatorDifference(FrozenAliased):
    """Everything that was found. ``faster`` is how many times as fast as the float file the 8-bit file is, at 95%.

    It and the times of a whole call were taken without profiling, those of layers and causes with it.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    float_file: str
    int8_file: str
    target: str
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    calls: int = Field(ge=1)
    lengths: tuple[int, ...] = ()
    passes: int = Field(ge=1)
    float_ms: float = Field(gt=0)
    int8_ms: float = Field(gt=0)
    faster: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    layers: tuple[LayerDifference, ...] = Field(description="those that lose most first")
    causes: tuple[CauseDifference, ...] = Field(description="likewise")
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = {}

    @property
    def verdict(self) -> Literal["faster", "slower", "can't tell"]:
        """Of the 8-bit file."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "can't tell"

    @property
    def responsible(self) -> tuple[CauseDifference, ...]:
        """What costs at least a fiftieth of a call of the float file."""
        return tuple(cause for cause in self.causes if cause.more_ms >= _NOTABLE * self.float_ms)

    @property
    def slower_layers(self) -> tuple[LayerDifference, ...]:
        """Layers that lose time beyond doubt, and as much."""
        return tuple(layer for layer in self.layers if layer.low_ms > 0 and layer.more_ms >= _NOTABLE * self.float_ms)
