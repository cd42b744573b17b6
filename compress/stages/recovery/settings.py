"""Settings of stages that recover quality after quantization. Importing this imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from compress.stages.training.settings import SequenceTraining


class Recovery(SequenceTraining):
    """Settings of a training in which a quantized model learns to predict as it did before."""

    teacher: str = Field("start", description="label of the stage whose output is imitated, or `start`")
    logits_weight: float = Field(1.0, ge=0, description="weight of the KL to the teacher's predictions")
    labels_weight: float = Field(
        0.0, ge=0, description="weight of the cross-entropy of the text itself, whose content is learned then"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout while training, in the model's layers and adapters")

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not self.logits_weight and not self.labels_weight:
            raise ValueError("logits_weight or labels_weight above 0, or there is nothing to learn from")
        return self

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return the teacher's label."""
        return (self.teacher,)


class ScaleTuning(Recovery):
    """Settings of a recovery that changes scales and norms, and no integer."""

    learning_rate: float = Field(2e-3, gt=0, le=0.5, description="peak change of a scale or norm in a step, relative")
    scales: bool = Field(True, description="tune the scales of linear layers")
    norms: bool = Field(True, description="tune the weights of norms, and biases")
    embeddings: bool = Field(True, description="tune the scales of quantized embedding tables and tied heads")


class AdapterTraining(Recovery):
    """Settings of a recovery that trains a low-rank adapter and leaves the base as it is."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    rank: int = Field(16, ge=1, le=4096, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha / rank; default: twice the rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="last parts of the names of adapted layers, e.g. q_proj; default: all linear ones",
    )
