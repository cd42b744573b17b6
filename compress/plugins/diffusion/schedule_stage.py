"""Draw in another number of steps, by another scheduler, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compress.models.model import TorchModel
from compress.stages.base import SEARCH, Context, OutputSpec, Requirements, Stage
from compress.stages.protocols import KeepsShape
from compress.tasks.capability import GENERATES_IMAGES

_BEST = "best"


class Schedule(KeepsShape, Stage[TorchModel, TorchModel]):
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
