"""The parameters of a recovery after quantization, shared by the stages that learn from the model before it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.frozen import Frozen


class Recovery(Frozen):
    """AdamW with linear warm-up and decay on windows of the ``train`` split, each step on other windows."""

    teacher: str = Field("start", description="label of the stage whose output is imitated, or `start`")
    steps: int = Field(100, ge=1, le=1_000_000, description="steps of training; more is better and takes longer")
    batch_size: int = Field(2, ge=1, description="windows a step")
    sequence_length: int = Field(512, ge=16, description="tokens of a window")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout while training, in the model's layers and adapters")
    validation_windows: int = Field(
        8, ge=1, description="held-out windows (of the validation split, where there is one) that judge the result"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="`auto` takes bf16 autocast where the processor has bf16 arithmetic"
    )
