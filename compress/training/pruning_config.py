"""The parameters of pruning: what goes, how much of it, and what ranks it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.numerics.sparse_pattern import Pattern
from compress.training.config import Training


class Pruning(Training):
    """Parts that are cut out, or weights that become zero; the training parameters serve the cubic schedule alone."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="unstructured: share of zeros in each layer's weights")
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}[:x][1-9]\d{0,3}$",
        description="unstructured: `2:4` keeps 2 of every 4 inputs; `4x1` zeroes blocks of outputs x inputs",
    )
    schedule: Literal["one-shot", "cubic"] = Field("one-shot", description="unstructured: at once or while training")
    scope: Literal["layer", "global"] = Field("layer", description="unstructured: where magnitudes are ranked")
    heads: float = Field(0.0, ge=0, lt=1, description="structured: share of attention heads to remove in each layer")
    feed_forward: float = Field(0.0, ge=0, lt=1, description="structured: share of feed-forward neurons to remove")
    layers: int = Field(0, ge=0, description="structured: number of whole layers to remove")
    channels: float = Field(0.0, ge=0, lt=1, description="structured: share of channels to remove in each layer")
    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="structured: share of all FLOPs to remove, by the channels that matter least for it",
    )
    parameters: float | None = Field(
        None, gt=0, lt=1, description="structured: share of all parameters to remove, by channels likewise"
    )
    channel_multiple: int = Field(
        8, ge=1, le=512, description="structured: a layer that loses channels keeps a multiple of this"
    )
    importance: Literal["taylor", "magnitude"] = Field("taylor", description="structured: what ranks the parts")
    importance_examples: int = Field(512, ge=1, description="structured: training examples that importance sees")

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        structured = bool(self.heads or self.feed_forward or self.layers or self.cuts_channels)
        if structured == (self.sparsity is not None or self.pattern is not None):
            raise ValueError(
                "either sparsity or a pattern, or some of heads, feed_forward, layers, and one of channels, flops, "
                "parameters"
            )
        if sum((bool(self.channels), self.flops is not None, self.parameters is not None)) > 1:
            raise ValueError("one of channels, flops and parameters")
        if self.augment is not None and (self.zeros is None or self.schedule != "cubic"):
            raise ValueError("schedule: cubic, since augment varies the images of training, and nothing else trains")
        self._check_pattern()
        return self

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        pattern = Pattern.read(self.pattern)
        if pattern.blocks:
            if self.sparsity is None:
                raise ValueError("sparsity, the share of blocks that become zero")
            return
        if pattern.first >= pattern.second:
            raise ValueError(f"a pattern N:M that keeps N of M, N below M; {self.pattern} removes nothing")
        if self.sparsity is not None:
            raise ValueError(f"no sparsity: {self.pattern} says it, {pattern.sparsity:.0%}")
        if self.scope == "global":
            raise ValueError(f"scope: layer; {self.pattern} leaves no layer more than another")

    @property
    def cuts_channels(self) -> bool:
        """Whether channels go."""
        return bool(self.channels) or self.flops is not None or self.parameters is not None

    @property
    def zeros(self) -> float | None:
        """The share of weights that become zero; ``None`` where parts are cut."""
        if self.sparsity is None and self.pattern is not None:
            return Pattern.read(self.pattern).sparsity
        return self.sparsity

    @property
    def retrains(self) -> bool:
        """Whether the other weights are trained while some become zero."""
        return self.zeros is not None and self.schedule == "cubic"

    @property
    def reads_examples(self) -> bool:
        """Whether training examples have a say, rather than magnitudes alone."""
        measures = self.zeros is None and self.importance == "taylor"
        return bool(self.retrains or measures or self.layers or self.cuts_channels)
