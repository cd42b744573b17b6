"""Settings of the stages for text-to-image models. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.stages.base import SEARCH
from compress.stages.training.settings import KEEP_BEST, BudgetedTraining
from compress.utils.pydantic_models import Frozen

_CONSISTENCY_STEPS = 50
"""Default steps of the teacher in consistency distillation (Luo et al. 2023, section 4.3: 1000 / 20)."""
_LEAST_TEACHER_STEPS = 32
"""Smallest default number of steps of the first teacher in progressive distillation."""


class DenoiserPruning(Frozen):
    """Settings that say which blocks and channels of a UNet are removed; diffusers' own config describes the rest."""

    blocks: Literal["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"] | None = Field(
        None,
        description="blocks that BK-SDM removes. `base`: in down blocks all pairs of resnet and attention except the "
        "first, in up blocks all except the first and last; `small`: also the middle block; `tiny`: also the "
        "innermost stage",
    )
    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of all parameters to remove, as channels of the lowest importance"
    )
    importance_examples: int = Field(64, ge=1, description="number of training images for importance scores")
    timesteps: int = Field(
        50, ge=3, le=1000, description="number of evenly spaced timesteps over which importance is accumulated"
    )
    threshold: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="minimum loss of a timestep relative to the largest loss; other timesteps are skipped",
    )
    batch_size: int = Field(16, ge=1, description="batch size for importance scores")

    @model_validator(mode="after")
    def _require_blocks_or_parameters(self) -> Self:
        if self.blocks is None and self.parameters is None:
            raise ValueError("blocks or parameters")
        return self


class DenoiserDistillation(BudgetedTraining):
    """Settings of a training in which a part of a text-to-image model learns from the same part of its teacher."""

    teacher: str | None = Field(None, description="label of the stage whose output is the teacher; default: the input")
    learning_rate: float = Field(
        5e-5, gt=0, le=1, description="peak learning rate", json_schema_extra={SEARCH: [1e-4, 3e-4]}
    )


class FeatureDistillation(DenoiserDistillation):
    """Settings of BK-SDM's distillation (Kim et al. 2023, section 3.2), which weighs its three losses alike."""

    teacher: str = Field(description="label of the stage before pruning, or `start`, whose UNet is the teacher")
    keep_best: bool = KEEP_BEST
    denoising_weight: float = Field(1.0, ge=0, description="weight of the denoising loss")
    output_weight: float = Field(1.0, ge=0, description="weight of the loss on the teacher's output")
    feature_weight: float = Field(1.0, ge=0, description="weight of the losses on features after each block")
    without_prompt: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="probability of dropping the prompt of an image, as classifier-free guidance requires",
    )
    judged_examples: int = Field(64, ge=1, description="number of validation images for the loss after each epoch")
    judged_timesteps: int = Field(10, ge=1, le=1000, description="number of timesteps for the loss after each epoch")

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not (self.denoising_weight or self.output_weight or self.feature_weight):
            raise ValueError("a weight above 0 for one of the losses")
        return self


class AutoencoderDistillation(DenoiserDistillation):
    """Settings of a small convolutional autoencoder that replaces the VAE, after the idea of TAESD."""

    keep_best: bool = KEEP_BEST
    width: int = Field(64, ge=4, le=1024, description="channels of its convolutions")
    layers: int = Field(3, ge=1, le=8, description="residual blocks at each resolution")


class StepDistillation(DenoiserDistillation):
    """Settings of a denoiser that learns to do in one step what took its teacher several.

    Classifier-free guidance is folded in, so that a step is one call of the denoiser (Meng et al. 2023, section 3.1).
    """

    steps: int = Field(4, ge=1, le=64, description="sampling steps of the student")
    guidance: float = Field(1.0, ge=1, description="guidance_scale that is folded in, 1 for none")


class ProgressiveDistillation(StepDistillation):
    """Settings of progressive distillation (Salimans and Ho 2022, algorithm 2)."""

    teacher_steps: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="sampling steps of the teacher: `steps` times a power of 2; default: the smallest one of at least "
        "32",
    )
    at_once: Literal[2, 4, 8] = Field(
        2,
        description="teacher steps that one student step replaces in a round. A larger number needs fewer rounds, but "
        "more teacher calls per training step",
    )
    solver: Literal["ddim", "dpm-solver++"] = Field(
        "ddim",
        description="solver of the teacher's steps: DDIM as in the paper, or DPM-Solver++ 2M, which follows the "
        "teacher's trajectory more closely",
    )
    guidance_first: bool = Field(
        True,
        description="distil guidance in a separate round before the number of steps is reduced; false: in the first "
        "round, which saves time",
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.first_steps not in self._halvings():
            raise ValueError(f"teacher_steps: {self.steps} times a power of 2, since each round halves the steps")
        if self.first_steps <= self.steps:
            raise ValueError(f"teacher_steps above steps, {self.steps}")
        return self

    @property
    def first_steps(self) -> int:
        """Sampling steps of the first teacher."""
        if self.teacher_steps is not None:
            return self.teacher_steps
        return next(count for count in self._halvings() if count >= _LEAST_TEACHER_STEPS and count > self.steps)

    def _halvings(self) -> list[int]:
        return [self.steps << power for power in range(1, 11)]

    @property
    def rounds(self) -> list[int]:
        """Sampling steps of the student of each round, largest first."""
        counts = [self.first_steps]
        while counts[-1] > self.steps:
            counts.append(max(self.steps, counts[-1] // self.at_once))
        return counts[1:]


class ConsistencyDistillation(StepDistillation):
    """Settings of latent consistency distillation (Luo et al. 2023, algorithm 1)."""

    teacher_steps: int = Field(
        _CONSISTENCY_STEPS, ge=2, le=1000, description="sampling steps of the teacher's trajectory"
    )
    average: float = Field(0.95, ge=0, lt=1, description="decay of the moving average of the target's weights")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.teacher_steps <= self.steps:
            raise ValueError(f"teacher_steps above steps, {self.steps}")
        return self
