"""The parameters of training a draft head, which the stage inherits."""

from __future__ import annotations

from pydantic import Field

from compress.training.config import Precision, WindowTraining


class HeadTraining(WindowTraining):
    """How a draft head learns to foretell what its model says."""

    steps: int = Field(600, ge=1, le=1_000_000, description="steps of training; more is better and takes longer")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    ahead: int = Field(
        3, ge=1, le=16, description="tokens that it learns to write one behind the other, by its own states"
    )
    draft_vocab_size: int = Field(
        16384, ge=1, description="tokens that it knows, those that are most frequent in what it learns from"
    )
    precision: Precision = Field(
        "fastest",
        description="of its products and the model's: bf16 where these are measured to be faster than in fp32",
    )
