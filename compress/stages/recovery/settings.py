"""Settings of stages that recover quality after quantization. Importing this imports no torch."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from compress.stages.base import Requirements
from compress.stages.training.settings import PRECISION, Precision
from compress.utils.pydantic_models import Frozen


class Recovery(Frozen):
    """Settings of a training in which a quantized model learns on sequences of text to predict as it did before.

    The optimizer is AdamW with linear warm-up and decay; each step reads new sequences of the ``train`` split.
    """

    required_data: ClassVar[Requirements] = Requirements(splits=("train",))
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate")
    steps: int = Field(100, ge=1, le=1_000_000, description="number of training steps")
    batch_size: int = Field(2, ge=1, description="sequences per step")
    sequence_length: int = Field(512, ge=16, description="tokens of a sequence")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    validation_windows: int = Field(
        8, ge=1, description="held-out sequences that evaluate the result, from the validation split if it exists"
    )
    precision: Precision = PRECISION
    teacher: str = Field("start", description="label of the stage whose output is the teacher, or `start`")
    labels_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the cross-entropy of the text itself, besides the KL to the teacher's predictions",
    )

    def shortened(self, share: float) -> Self:
        """Return the settings with a share of the steps."""
        return self.model_copy(update={"steps": max(1, round(self.steps * share))})

    def with_default_training(self) -> Self:
        """Return the settings with default values in the fields that change nothing but the values of weights."""
        fields = type(self).model_fields
        names = ("steps", "batch_size", "sequence_length", "warmup_ratio", "precision")
        return self.model_copy(update={name: fields[name].default for name in names})

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return the teacher's label."""
        return (self.teacher,)


class ScaleTuning(Recovery):
    """Settings of a recovery that changes scales and norms, and no integer."""

    learning_rate: float = Field(2e-3, gt=0, le=0.5, description="peak relative learning rate of scales and norms")


class AdapterTraining(Recovery):
    """Settings of a recovery that trains a low-rank adapter and leaves the base as it is."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    rank: int = Field(16, ge=1, le=4096, description="rank of the adapter")
    alpha: float | None = Field(None, gt=0, description="the adapter is scaled by alpha / rank; default: 2 rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="names of adapted layers, e.g. q_proj; default: all linear layers",
    )
