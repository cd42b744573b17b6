"""Stages that prune and distill text-to-image models. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compress.models.model import TorchModel
from compress.stages.base import SEARCH, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, predicted
from compress.stages.protocols import KeepsShape
from compress.stages.training.settings import KEEP_BEST, BudgetedTraining
from compress.tasks.capability import GENERATES_IMAGES

_CONSISTENCY_STEPS = 50
"""Default steps of the teacher in consistency distillation (Luo et al. 2023, section 4.3: 1000 / 20)."""
_LEAST_TEACHER_STEPS = 32
"""Smallest default number of steps of the first teacher in progressive distillation."""
_BEST = "best"


class PruneDenoiser(Stage[TorchModel, TorchModel]):
    """Structured pruning of a text-to-image model's UNet.

    Blocks are removed by BK-SDM (Kim et al. 2023, section 3.1), or those without which the denoising loss rises least,
    and channels by importance accumulated over timesteps (Fang et al. 2023, Diff-Pruning). The result is a UNet that
    diffusers' own config describes.
    """

    packages = ("torch", "transformers", "accelerate", "diffusers")
    requires = frozenset({GENERATES_IMAGES})
    kind: Literal["prune_denoiser"] = "prune_denoiser"
    blocks: Literal["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"] | None = Field(
        None,
        description="blocks that BK-SDM removes: all pairs of resnet and attention except the first of a stage on the "
        "way down, and the first and last on the way up; `small`: the middle too; `tiny`: and the innermost stage",
    )
    pairs: int = Field(
        0, ge=0, le=64, description="pairs of resnet and attention to remove, those without which the loss rises least"
    )
    middle: bool = Field(False, description="with pairs: the block in the middle may be one of them")
    channels: float = Field(0.0, ge=0, lt=1, description="share of the channels to remove in each stage")
    parameters: float | None = Field(
        None, gt=0, lt=1, description="share of all parameters to remove, by the channels that matter least for it"
    )
    flops: float | None = Field(
        None, gt=0, lt=1, description="share of all FLOPs to remove, by the channels that matter least for it"
    )
    block_out_channels: tuple[int, ...] | None = Field(
        None, min_length=1, description="channels of each stage to keep, in place of a share"
    )
    importance_examples: int = Field(64, ge=1, description="training images that importance is measured on")
    timesteps: int = Field(
        50, ge=3, le=1000, description="timesteps, evenly spaced, over which importance is accumulated"
    )
    threshold: float = Field(
        0.05, ge=0, lt=1, description="timesteps whose loss is a smaller share of the largest loss are left out"
    )
    batch_size: int = Field(16, ge=1, description="images whose importance is computed at once")

    @property
    def prunes_channels(self) -> bool:
        """True if channels are removed."""
        return self._ways() > 0

    def _ways(self) -> int:
        asked = (self.channels or None, self.parameters, self.flops, self.block_out_channels)
        return sum(value is not None for value in asked)

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if self._ways() > 1:
            raise ValueError("one of channels, parameters, flops and block_out_channels")
        if self.blocks is not None and self.pairs:
            raise ValueError("either blocks, which BK-SDM chose, or pairs, which the loss chooses")
        if self.middle and not self.pairs:
            raise ValueError("pairs, one of which the middle would be")
        if not self._ways() and self.blocks is None and not self.pairs:
            raise ValueError("blocks or pairs, channels, parameters, flops or block_out_channels")
        return self

    def needs(self) -> Requirements:
        """Return the training split, whose images importance is measured on."""
        return Requirements(splits=("train",))

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return an unknown cost."""
        unknown = "not predicted: it depends on the size of latents, and on how many blocks are tried"
        return predicted(before, None, Estimate.unknown(unknown))

    def data_passes(self, examples: float) -> tuple[float, float]:
        """Return the images that importance is measured on."""
        return min(examples, self.importance_examples), 0.0

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


class _DistillsDenoiser(BudgetedTraining, Stage[TorchModel, TorchModel]):
    """Stage in which a part of a text-to-image model learns from the same part of its teacher."""

    packages = ("torch", "transformers", "accelerate", "diffusers")
    requires = frozenset({GENERATES_IMAGES})
    teacher: str | None = Field(None, description="label of the stage whose output is the teacher; default: the input")
    learning_rate: float = Field(
        5e-5, gt=0, le=1, description="peak learning rate", json_schema_extra={SEARCH: [1e-4, 3e-4]}
    )

    def needs(self) -> Requirements:
        """Return the training split."""
        return Requirements(splits=("train",))

    def earlier_outputs(self) -> tuple[str, ...]:
        """Return the teacher's label."""
        return (self.teacher,) if self.teacher else ()

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Return the budget, or an unknown time."""
        seconds = Estimate.unknown("what an example costs is not known before it is tried")
        if self.seconds is not None:
            seconds = Estimate(value=self.seconds, note="the budget")
        return predicted(before, before, seconds)

    def _teacher(self, model: TorchModel, context: Context) -> TorchModel:
        return context.earlier(self.teacher) if self.teacher else model


class _KeepsWeightShapes:
    """Mixin of stages that keep the shapes of all weights."""

    def infer_shapes(self, model: TorchModel, context: Context) -> TorchModel:
        """Return the model itself."""
        return model


class DistillFeatures(_KeepsWeightShapes, _DistillsDenoiser):
    """Distillation of a pruned UNet by its teacher's outputs and features (Kim et al. 2023, BK-SDM, section 3.2).

    The losses compare the noise prediction with the noise, with the teacher's prediction, and the features after each
    block with the teacher's.
    """

    kind: Literal["distill_features"] = "distill_features"
    teacher: str = Field(description="label of the stage before pruning, or `start`, whose UNet is the teacher")
    keep_best: bool = KEEP_BEST
    denoising_weight: float = Field(1.0, ge=0, description="weight of the loss against the noise that was added")
    output_weight: float = Field(1.0, ge=0, description="weight of the loss against the teacher's output")
    feature_weight: float = Field(1.0, ge=0, description="weight of the losses against the features after each block")
    without_prompt: float = Field(
        0.1, ge=0, lt=1, description="share of the images that are learned without their prompt, for guidance"
    )
    judged_examples: int = Field(64, ge=1, description="validation images that judge an epoch")
    judged_timesteps: int = Field(10, ge=1, le=1000, description="timesteps at which they do")

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not (self.denoising_weight or self.output_weight or self.feature_weight):
            raise ValueError("a weight above 0 for one of the losses")
        return self

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the UNet of ``model``. Raises `StageError` if one of the models has none."""
        from compress.plugins.diffusion.feature_distillation import distill_features

        return distill_features(self, self._teacher(model, context), model, context)


class StepDistillation(_KeepsWeightShapes, _DistillsDenoiser):
    """Stage in which a denoiser learns to do in one step what took its teacher several.

    Classifier-free guidance is folded in, so that a step is one call of the denoiser (Meng et al. 2023, section 3.1).
    """

    steps: int = Field(4, ge=1, le=64, description="sampling steps of the student")
    guidance: float | tuple[float, float] = Field(
        1.0,
        description="guidance_scale that is folded in, 1 for none; with two numbers the student is conditioned on any "
        "scale between them by timestep_cond, and the artifact's guidance is the first",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = Field(
        None,
        description="what the student predicts; default: v_prediction in progressive distillation, since x divides by "
        "the signal that is left where epsilon is predicted; otherwise as the teacher",
    )

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.guidance_range[0] < 1 or self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError("guidance of 1 or more; of two numbers the smaller first")
        return self

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Smallest and largest guidance scale that is learned."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    @property
    def conditions_on_guidance(self) -> bool:
        """True if the student gets the guidance scale as an input."""
        return isinstance(self.guidance, tuple)

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train the denoiser of ``model``. Raises `StageError` for a scheduler that it cannot be trained for."""
        from compress.plugins.diffusion.step_distillation import distill_steps

        assert isinstance(self, DistillSteps | DistillConsistency)
        return distill_steps(self, self._teacher(model, context), model, context)


class DistillSteps(StepDistillation):
    """Progressive distillation of a denoiser: one step learns to do what two did, round by round.

    After each round the student is the teacher of the next (Salimans and Ho 2022, algorithm 2). The output has the
    DDIM scheduler that samples from the student.
    """

    kind: Literal["distill_steps"] = "distill_steps"
    teacher_steps: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="sampling steps of the teacher: `steps` times 2, 4, 8 ...; default: the first such number from 32 "
        "on",
    )
    at_once: Literal[2, 4, 8] = Field(
        2,
        description="how many steps of the teacher become one in a round. More take fewer rounds, each of which calls "
        "the teacher as many times for one training step",
    )
    solver: Literal["ddim", "dpm-solver++"] = Field(
        "ddim",
        description="how the teacher takes the steps that become one: by DDIM as in the paper, or by DPM-Solver++ 2M, "
        "which stays nearer to the teacher's own trajectory",
    )
    guidance_first: bool = Field(
        True,
        description="fold guidance in by a round of its own before the number of steps falls; false: in the first "
        "round that reduces steps, which saves time",
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.first_steps not in self._halvings():
            raise ValueError(f"teacher_steps: {self.steps} times a power of 2, since each round halves the steps")
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


class DistillConsistency(StepDistillation):
    """Latent consistency distillation of a denoiser (Luo et al. 2023, algorithm 1).

    The denoiser learns to predict the end of a trajectory from each of its points. The output has the LCM scheduler
    that samples from the student.
    """

    kind: Literal["distill_consistency"] = "distill_consistency"
    teacher_steps: int = Field(
        _CONSISTENCY_STEPS, ge=2, le=1000, description="sampling steps of the teacher on whose trajectory points agree"
    )
    loss: Literal["pseudo_huber", "l2"] = Field("pseudo_huber", description="distance between two predicted ends")
    average: float = Field(0.95, ge=0, lt=1, description="decay of the target's moving average of weights")
    timestep_scaling: float = Field(10.0, gt=0, description="factor on timesteps in c_skip and c_out")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.teacher_steps <= self.steps:
            raise ValueError(f"teacher_steps above steps, {self.steps}")
        return self


class DistillAutoencoder(_DistillsDenoiser):
    """Distillation of the VAE into a small convolutional autoencoder, after the idea of TAESD.

    The small decoder learns to decode latents as the VAE does, by absolute differences and by features.
    """

    kind: Literal["distill_autoencoder"] = "distill_autoencoder"
    keep_best: bool = KEEP_BEST
    width: int = Field(64, ge=4, le=1024, description="channels of its convolutions")
    layers: int = Field(3, ge=1, le=8, description="residual blocks at each resolution")
    feature_weight: float = Field(
        0.5, ge=0, description="weight of the loss on features that the VAE's own encoder computes of the images"
    )
    encoder_weight: float = Field(
        0.1, ge=0, description="weight of the loss of the small encoder, which generating images does not use"
    )

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        """Train a small autoencoder and put it in the VAE's place."""
        from compress.plugins.diffusion.tiny_autoencoder import distill_autoencoder

        return distill_autoencoder(self, self._teacher(model, context), model, context)


class Schedule(KeepsShape, _KeepsWeightShapes, Stage[TorchModel, TorchModel]):
    """Another scheduler of diffusers for the same denoiser, and how many steps it takes; weights stay as they are.

    `best` takes the scheduler whose pictures in so many steps are nearest to those in `reference_steps`, from the same
    noise and for prompts of the train split: DDIM (Song et al. 2021), DPM-Solver++ (Lu et al. 2022), UniPC (Zhao et al.
    2023) and Euler (Karras et al. 2022), each with the timesteps of Lin et al. 2024, table 2.
    """

    packages = ("torch", "transformers", "diffusers")
    requires = frozenset({GENERATES_IMAGES})
    kind: Literal["schedule"] = "schedule"
    steps: int = Field(
        20, ge=1, le=1000, description="steps of a picture", json_schema_extra={SEARCH: [4, 6, 8, 12, 20]}
    )
    scheduler: str | None = Field(
        None,
        description="a class of diffusers, such as DPMSolverMultistepScheduler, or `best`; default: the model's own",
    )
    guidance: float | None = Field(None, ge=0, description="guidance_scale from now on; default: as it is")
    config: dict[str, Any] = Field(
        {}, description="fields of the scheduler's config, such as {timestep_spacing: trailing}"
    )
    reference_steps: int = Field(100, ge=10, le=1000, description="best: steps that others are compared with")
    prompts: int = Field(16, ge=1, description="best: how many pictures are compared")

    @model_validator(mode="after")
    def _best_has_no_config(self) -> Self:
        if self.scheduler == _BEST and self.config:
            raise ValueError("no config: `best` tries several")
        return self

    def needs(self) -> Requirements:
        """Return the training split if schedulers are compared on its prompts."""
        return Requirements(splits=("train",) if self.scheduler == _BEST else ())

    def output_spec(self) -> OutputSpec:
        """Guarantee that no weight changes."""
        return OutputSpec(changes_weights=False)

    def check_model(self, start: Path) -> None:
        """Raise `InputError` for a scheduler that diffusers does not have."""
        if self.scheduler not in (None, _BEST):
            from compress.plugins.diffusion.scheduler import find_scheduler_class

            find_scheduler_class(str(self.scheduler))

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
