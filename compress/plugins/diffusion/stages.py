"""Stages that prune and distill text-to-image models. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compress.models.model import TorchModel
from compress.plugins.diffusion.stage_settings import (
    AutoencoderDistillation,
    ConsistencyDistillation,
    DenoiserDistillation,
    DenoiserPruning,
    FeatureDistillation,
    ProgressiveDistillation,
)
from compress.stages.base import SEARCH, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import GENERATES_IMAGES


class PruneDenoiser(DenoiserPruning, Stage[TorchModel, TorchModel]):
    """Structured pruning of a text-to-image model's UNet.

    Blocks are removed by BK-SDM (Kim et al. 2023, section 3.1), and channels by importance accumulated over timesteps
    (Fang et al. 2023, Diff-Pruning). The result is a UNet that diffusers' own config describes.
    """

    packages = ("torch", "transformers", "accelerate", "diffusers")
    requires = frozenset({GENERATES_IMAGES})
    required_data = Requirements(splits=("train",))
    kind: Literal["prune_denoiser"] = "prune_denoiser"

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return an unknown cost."""
        unknown = "not predicted: it depends on the size of latents"
        return predicted(before, None, Estimate.unknown(unknown))

    def check_model(self, start: Path) -> None:
        """Raise `StageError` for a UNet that does not have these blocks or channels."""
        from compress.models.pipeline_folder import UNET, part_config
        from compress.plugins.diffusion.component_costs import build_component_on_meta
        from compress.plugins.diffusion.denoiser_pruning import check_pruning

        if (start / UNET).is_dir():
            check_pruning(build_component_on_meta(part_config(start, UNET)), self)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Prune the UNet of ``model`` in place."""
        from compress.plugins.diffusion.denoiser_pruning import prune_denoiser
        from compress.plugins.diffusion.pipeline_model import GeneratorModel

        assert isinstance(model, GeneratorModel)
        prune_denoiser(model, self, context)
        return model


class _DistillsDenoiser(DenoiserDistillation, Stage[TorchModel, TorchModel]):
    """Stage that trains a part of a text-to-image model."""

    required_data = Requirements(splits=("train",))
    packages = ("torch", "transformers", "accelerate", "diffusers")
    requires = frozenset({GENERATES_IMAGES})

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return the teacher's label."""
        return (self.teacher,) if self.teacher else ()

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the budget, or an unknown time."""
        seconds = Estimate.unknown("the cost of an example is unknown before a first run")
        if self.seconds is not None:
            seconds = Estimate(value=self.seconds, note="the budget")
        return predicted(before, before, seconds)

    def _teacher(self, model: TorchModel, context: Context) -> TorchModel:
        return context.earlier(self.teacher) if self.teacher else model


class _KeepsDenoiserShape:
    """Mixin of stages that train the denoiser and keep the shapes of its weights."""

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model


class DistillFeatures(FeatureDistillation, _KeepsDenoiserShape, _DistillsDenoiser):
    """Distillation of a pruned UNet by its teacher's outputs and features (Kim et al. 2023, BK-SDM, section 3.2).

    The losses compare the noise prediction with the noise, with the teacher's prediction, and the features after each
    block with the teacher's.
    """

    kind: Literal["distill_features"] = "distill_features"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the UNet of ``model``. Raises `StageError` if one of the models has none."""
        from compress.plugins.diffusion.feature_distillation import distill_features

        return distill_features(self, self._teacher(model, context), model, context)


class DistillSteps(ProgressiveDistillation, _KeepsDenoiserShape, _DistillsDenoiser):
    """Progressive distillation of a denoiser: in each round, one student step learns to replace two teacher steps.

    After each round the student is the teacher of the next (Salimans and Ho 2022, algorithm 2). The output contains the
    DDIM scheduler that samples from the student.
    """

    kind: Literal["distill_steps"] = "distill_steps"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the denoiser of ``model``. Raises `StageError` for a scheduler that it cannot be trained for."""
        from compress.plugins.diffusion.step_distillation import distill_steps

        return distill_steps(self, self._teacher(model, context), model, context)


class DistillConsistency(ConsistencyDistillation, _KeepsDenoiserShape, _DistillsDenoiser):
    """Latent consistency distillation of a denoiser (Luo et al. 2023, algorithm 1).

    The denoiser learns to predict the end of a trajectory from each of its points. The output contains the LCM
    scheduler that samples from the student.
    """

    kind: Literal["distill_consistency"] = "distill_consistency"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the denoiser of ``model``. Raises `StageError` for a scheduler that it cannot be trained for."""
        from compress.plugins.diffusion.step_distillation import distill_steps

        return distill_steps(self, self._teacher(model, context), model, context)


class DistillAutoencoder(AutoencoderDistillation, _DistillsDenoiser):
    """Distillation of the VAE into a small convolutional autoencoder, after the idea of TAESD.

    The small decoder learns to decode latents as the VAE does, by absolute differences and by features.
    """

    kind: Literal["distill_autoencoder"] = "distill_autoencoder"

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train a small autoencoder and put it in the VAE's place."""
        from compress.plugins.diffusion.tiny_autoencoder import distill_autoencoder

        return distill_autoencoder(self, self._teacher(model, context), model, context)


_BEST = "best"


class Schedule(KeepsShape, Stage[TorchModel, TorchModel]):
    """Set another diffusers scheduler and number of steps for the same denoiser; weights do not change.

    `best` chooses the scheduler whose images in `steps` steps are closest to those in `reference_steps`, from the same
    noise and for prompts of the train split: DDIM (Song et al. 2021), DPM-Solver++ (Lu et al. 2022), UniPC (Zhao et al.
    2023) and Euler (Karras et al. 2022), each with the timesteps of Lin et al. 2024, table 2.
    """

    packages = ("torch", "transformers", "diffusers")
    requires = frozenset({GENERATES_IMAGES})
    guarantees = OutputSpec(changes_weights=False)
    kind: Literal["schedule"] = "schedule"
    steps: int = Field(
        20, ge=1, le=1000, description="number of sampling steps", json_schema_extra={SEARCH: [4, 6, 8, 12, 20]}
    )
    scheduler: str | None = Field(
        None,
        description="a scheduler class of diffusers, such as DPMSolverMultistepScheduler, or `best`; default: that of "
        "the model",
    )
    guidance: float | None = Field(None, ge=0, description="new guidance_scale; default: unchanged")
    config: dict[str, Any] = Field(
        {}, description="fields of the scheduler's config, such as {timestep_spacing: trailing}"
    )
    reference_steps: int = Field(100, ge=10, le=1000, description="with `best`: sampling steps of the reference images")
    prompts: int = Field(16, ge=1, description="with `best`: number of images to compare")

    @model_validator(mode="after")
    def _best_has_no_config(self) -> Self:
        if self.scheduler == _BEST and self.config:
            raise ValueError("no config: `best` tries several")
        return self

    def needs(self) -> Requirements:
        """Return the training split if schedulers are compared on its prompts."""
        return Requirements(splits=("train",) if self.scheduler == _BEST else ())

    def check_model(self, start: Path) -> None:
        """Raise `InputError` for a scheduler that diffusers does not have."""
        if self.scheduler not in (None, _BEST):
            from compress.plugins.diffusion.scheduler import find_scheduler_class

            find_scheduler_class(str(self.scheduler))

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself, because no size changes."""
        return model

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model with the scheduler and the number of steps.

        Raises:
            InputError: The scheduler does not fit the denoiser.
        """
        from dataclasses import replace

        from compress.plugins.diffusion.noised_latents import reference_trajectory
        from compress.plugins.diffusion.pipeline_model import GeneratorModel
        from compress.plugins.diffusion.scheduler import TRIAL_COLUMNS, SchedulerChoice, build_scheduler, trial_rows

        assert isinstance(model, GeneratorModel)
        guidance = model.sampling.guidance if self.guidance is None else self.guidance
        model = replace(model, sampling=replace(model.sampling, steps=self.steps, guidance=guidance))
        if self.scheduler != _BEST:
            name = self.scheduler or type(model.scheduler).__name__
            choice = SchedulerChoice(name, self.config)
            return replace(model, scheduler=build_scheduler(model.scheduler, choice, self.steps))
        # `best`: compare schedulers by their distance from a trajectory of many steps.
        trajectory = reference_trajectory(model, context, self.prompts, self.reference_steps)
        scheduler, trials = trajectory.best_scheduler(self.steps)
        context.add_table(
            f"Distance in {self.steps} steps from {self.reference_steps}", TRIAL_COLUMNS, trial_rows(trials)
        )
        context.note(f"schedule: {trials[0].choice}, {trials[0].error:.1%} from {self.reference_steps} steps")
        return replace(model, scheduler=scheduler)
