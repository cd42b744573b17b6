"""Settings of unstructured pruning. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.numerics.sparsity_pattern import Pattern
from compress.stages.training.settings import PRECISION, Precision, Training
from compress.utils.pydantic_models import Frozen, changed_fields


class Sparsity(Frozen):
    """Settings that say which share of the weights becomes zero, and in which pattern."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="share of zeros in each layer's weights")
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d{0,3}:[1-9]\d{0,3}$",
        description="`2:4` keeps 2 of every 4 inputs",
    )

    @model_validator(mode="after")
    def _sparsity_or_pattern(self) -> Self:
        if self.pattern is None:
            if self.sparsity is None:
                raise ValueError("sparsity or a pattern")
            return self
        pattern = Pattern.read(self.pattern)
        if pattern.first >= pattern.second:
            raise ValueError(f"a pattern N:M that keeps N of M, N below M; {self.pattern} removes nothing")
        if self.sparsity is not None:
            raise ValueError(f"no sparsity: the pattern {self.pattern} means {pattern.sparsity:.0%}")
        return self

    @property
    def zeros(self) -> float:
        """Share of the weights that become zero."""
        share = self.sparsity if self.pattern is None else Pattern.read(self.pattern).sparsity
        assert share is not None, "validated"
        return share


class GradualSparsity(Sparsity, Training):
    """Settings of pruning by magnitude while training (Zhu and Gupta 2017, section 3)."""


class DecoderSparsity(Sparsity):
    """Settings of unstructured pruning of language models."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "magnitude",
        description="`magnitude`; `wanda`: magnitude times the norm of the inputs; `sparsegpt`: with an update of the "
        "other weights",
    )
    samples: int = Field(16, ge=1, le=100_000, description="sequences of calibration text from the train split")
    sequence_length: int = Field(512, ge=8, le=131_072, description="tokens of a sequence")
    damp_percent: float = Field(
        0.01, gt=0, lt=1, description="sparsegpt: damping of the Hessian's diagonal, relative to its mean"
    )
    precision: Precision = PRECISION

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        unused = changed_fields(self, ["samples", "sequence_length", "damp_percent", "precision"])
        if self.method == "magnitude" and unused:
            raise ValueError(f"method: wanda or sparsegpt; magnitude reads no text, which {unused[0]} concerns")
        if self.method == "wanda" and changed_fields(self, ["damp_percent"]):
            raise ValueError("method: sparsegpt, since wanda solves no system that damp_percent concerns")
        return self
