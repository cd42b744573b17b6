"""The parameters of a recovery after quantization, shared by the stages that learn from the model before it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.frozen import Frozen


class Recovery(Frozen):
    """AdamW with linear warm-up and decay on windows of the ``train`` split, each step on other windows."""

    trains: ClassVar[bool] = True
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


class ScaleTuning(Recovery):
    """A recovery that changes scales and norms, and no integer."""

    learning_rate: float = Field(2e-3, gt=0, le=0.5, description="peak change of a scale or norm in a step, relative")
    scales: bool = Field(True, description="tune the scales of linear layers")
    norms: bool = Field(True, description="tune the weights of norms, and biases")
    embeddings: bool = Field(True, description="tune the scales of quantized embedding tables and tied heads")


class AdapterTraining(Recovery):
    """A recovery that trains a low-rank adapter and leaves the base as it is."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    rank: int = Field(16, ge=1, le=4096, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha / rank; default: twice the rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last parts of the names of adapted layers, e.g. q_proj; default: all linear ones",
    )
    objective: Literal["teacher", "text"] = Field(
        "teacher", description="imitate the teacher's predictions, or predict the next token of the text"
    )
