"""Settings of structured pruning of language models. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH
from compress.stages.training.settings import PRECISION, Precision
from compress.utils.pydantic_models import Frozen, changed_fields


class DecoderPruning(Frozen):
    """Settings that say which layers, heads, neurons and experts of a language model are removed."""

    layers: int = Field(0, ge=0, description="number of whole layers to remove")
    heads: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of groups of attention heads to remove in each layer, with their keys and values",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75]},
    )
    feed_forward: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of feed-forward neurons to remove in each layer",
        json_schema_extra={SEARCH: [0.0, 0.25, 0.5, 0.75, 0.875]},
    )
    experts: float = Field(
        0.0, ge=0, lt=1, description="share of each mixture's experts to remove, those least often chosen"
    )
    layer_importance: Literal["neighbours", "block_influence", "greedy"] = Field(
        "neighbours",
        description="neighbours: remove consecutive layers that together change hidden states least; block_influence: "
        "those that do so one by one; greedy: one after the other, each the one without which the loss on text is "
        "least, which takes many times as long",
    )
    compensate: bool = Field(
        True,
        description="solve the layer before removed layers so that its output is what they gave (ReplaceMe)",
    )
    width_importance: Literal["obs", "activation"] = Field(
        "obs",
        description="obs: remove heads and neurons one after the other, each the one that the others can best "
        "compensate, and update these (optimal brain surgeon); activation: those with the smallest activations "
        "(Minitron)",
    )
    multiple: int = Field(
        64,
        ge=1,
        le=1024,
        description="the remaining width of a feed-forward layer, or of an attention's outputs, is a multiple of this, "
        "as groups of few-bit weights need it",
    )
    samples: int = Field(
        16, ge=1, le=100_000, description="sequences of text from the train split that importance is measured on"
    )
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")
    damp_percent: float = Field(
        0.01, gt=0, lt=1, description="obs and compensate: added to the Hessian's diagonal, relative to its mean"
    )
    precision: Precision = PRECISION

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if not (self.layers or self.removes_width):
            raise ValueError("some of layers, heads, feed_forward and experts")
        if not self.layers and (unused := changed_fields(self, ["layer_importance", "compensate"])):
            raise ValueError(f"layers, which {unused[0]} concerns")
        if not (self.heads or self.feed_forward) and (unused := changed_fields(self, ["width_importance", "multiple"])):
            raise ValueError(f"heads or feed_forward, which {unused[0]} concerns")
        return self

    @property
    def removes_width(self) -> bool:
        """Return whether parts of layers are removed."""
        return bool(self.heads or self.feed_forward or self.experts)
