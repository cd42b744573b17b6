"""Settings of structured pruning. Importing this imports no torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH, AppliesTo
from compress.tasks.capability import TAKES_IMAGES
from compress.utils.pydantic_models import Frozen, changed_fields

_IMAGES_ONLY = AppliesTo(frozenset({TAKES_IMAGES}))


class Pruning(Frozen):
    """Settings that say which heads, neurons, layers and channels are removed."""

    heads: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of attention heads to remove in each layer",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75]},
    )
    feed_forward: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of feed-forward neurons to remove in each layer",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75, 0.875]},
    )
    layers: int = Field(0, ge=0, description="number of whole layers to remove")
    channels: Annotated[float, _IMAGES_ONLY] = Field(
        0.0, ge=0, lt=1, description="share of channels to remove in each layer"
    )
    flops: Annotated[float | None, _IMAGES_ONLY] = Field(
        None,
        gt=0,
        lt=1,
        description="share of all FLOPs to remove, as channels of the lowest importance",
        json_schema_extra={SEARCH: [0.3, 0.5, 0.7]},
    )
    parameters: Annotated[float | None, _IMAGES_ONLY] = Field(
        None, gt=0, lt=1, description="share of all parameters to remove, as channels of the lowest importance"
    )
    channel_multiple: int = Field(
        8, ge=1, le=512, description="number that the remaining channels of a pruned layer are a multiple of"
    )
    importance_examples: int = Field(512, ge=1, description="number of training examples for importance scores")

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if not (self.heads or self.feed_forward or self.layers or self.removes_channels):
            raise ValueError("some of heads, feed_forward, layers, and one of channels, flops, parameters")
        if sum((bool(self.channels), self.flops is not None, self.parameters is not None)) > 1:
            raise ValueError("one of channels, flops and parameters")
        if not self.removes_channels and changed_fields(self, ["channel_multiple"]):
            raise ValueError("channels, flops or parameters, since channel_multiple concerns channels")
        return self

    @property
    def removes_channels(self) -> bool:
        """Return whether channels are removed."""
        return bool(self.channels) or self.flops is not None or self.parameters is not None
