"""Choice of another scheduler of diffusers for the same denoiser. Importing this imports no torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from compress.plugins.diffusion.pipeline_model import import_diffusers
from compress.plugins.diffusion.sampler import DiffusionSampler
from compress.utils.errors import InputError, first_line, nearest_name

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_SPACING = "timestep_spacing"
_NOISE_TOLERANCE = 1e-5
"""Largest accepted difference of the noise levels of two schedulers."""
_CONFIG_ERRORS = (ValueError, TypeError, IndexError, AttributeError, NotImplementedError, ImportError, ArithmeticError)
"""Errors that diffusers raises for settings that do not fit together."""


@dataclass(frozen=True)
class SchedulerChoice:
    """Class of a scheduler in diffusers, and the fields of its config that differ from the model's scheduler."""

    scheduler: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join((self.scheduler, *(f"{name}={value}" for name, value in self.fields.items())))


CANDIDATES: tuple[SchedulerChoice, ...] = (
    SchedulerChoice("DDIMScheduler", {_SPACING: "leading"}),
    SchedulerChoice("DDIMScheduler", {_SPACING: "trailing"}),
    SchedulerChoice("DPMSolverMultistepScheduler", {_SPACING: "linspace"}),
    SchedulerChoice("DPMSolverMultistepScheduler", {_SPACING: "trailing"}),
    SchedulerChoice("DPMSolverMultistepScheduler", {_SPACING: "linspace", "use_karras_sigmas": True}),
    SchedulerChoice("UniPCMultistepScheduler", {_SPACING: "linspace"}),
    SchedulerChoice("UniPCMultistepScheduler", {_SPACING: "trailing"}),
    SchedulerChoice("EulerDiscreteScheduler", {_SPACING: "linspace"}),
    SchedulerChoice("EulerDiscreteScheduler", {_SPACING: "trailing"}),
)
"""Schedulers of `scheduler: best`. They follow the same trajectory without training, so that they can be compared."""
REFERENCE = SchedulerChoice("DPMSolverMultistepScheduler", {_SPACING: "trailing"})
"""DPM-Solver++ 2M (Lu et al. 2022) is of second order, so that its error at many steps is negligible."""


def build_scheduler(base: SchedulerMixin, choice: SchedulerChoice, steps: int) -> SchedulerMixin:
    """Build the chosen scheduler with the noise levels and the prediction type of ``base``, the model's own.

    Raises:
        InputError: There is no such scheduler, the model was trained for another kind, or prediction type, timestep
            spacing or number of steps do not fit it.
    """
    scheduler_class = find_scheduler_class(choice.scheduler)
    # diffusers lists the schedulers that can replace each other.
    if scheduler_class is not type(base) and scheduler_class not in base.compatibles:
        others = sorted(other.__name__ for other in base.compatibles if not other.__name__.startswith("Dummy"))
        raise InputError(
            f"{scheduler_class.__name__} does not fit a denoiser that was trained for {type(base).__name__}.",
            where="scheduler",
            expected=f"one of {', '.join(others)}",
            hint="models that `distill_consistency` trained are sampled by LCMScheduler, and no others are",
        )
    accepted = inspect.signature(scheduler_class).parameters
    for name in choice.fields:
        if name not in accepted:
            raise _misfit(choice, f"it has no {name}", f"one of {', '.join(sorted(accepted))}")
    prediction_type = base.config.get("prediction_type", "epsilon")
    if prediction_type != "epsilon" and "prediction_type" not in accepted:
        raise _misfit(choice, f"it takes networks that predict epsilon, and this one predicts {prediction_type}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = scheduler_class.from_config(dict(base.config), **choice.fields)
    except _CONFIG_ERRORS as error:
        raise _misfit(choice, first_line(error)) from error
    expected, actual = getattr(base, "alphas_cumprod", None), getattr(scheduler, "alphas_cumprod", None)
    differs = (
        expected is not None
        and actual is not None
        and (expected.shape != actual.shape or float((expected - actual).abs().max()) > _NOISE_TOLERANCE)
    )
    if differs:
        raise _misfit(choice, "it makes other noise levels of the model's config than the model was trained with")
    check_steps(scheduler, steps, choice)
    return scheduler


def check_steps(scheduler: SchedulerMixin, steps: int, choice: SchedulerChoice) -> None:
    """Run ``steps`` steps on zeros. Raises `InputError` if the scheduler cannot."""
    import torch

    trial = type(scheduler).from_config(scheduler.config)
    num_timesteps = int(scheduler.config.num_train_timesteps)
    try:
        trial.set_timesteps(steps)
        timesteps = trial.timesteps.tolist()
        if min(timesteps) < 0 or max(timesteps) > num_timesteps - 1:
            raise _misfit(choice, f"{steps} steps reach timestep {max(timesteps):g} of {num_timesteps}")
        sample = torch.zeros(1, 3, 2, 2) * trial.init_noise_sigma
        for timestep in trial.timesteps:
            output = torch.zeros_like(trial.scale_model_input(sample, timestep))
            sample = trial.step(output, timestep, sample).prev_sample
    except _CONFIG_ERRORS as error:
        expected = f"a number of steps that suits it; the recipe has {steps}"
        raise _misfit(choice, first_line(error), expected) from error
    if not torch.isfinite(sample).all():
        raise _misfit(choice, f"{steps} steps end in numbers that are not finite")


@dataclass(frozen=True)
class SchedulerTrial:
    """Error of a scheduler at a number of steps, or the reason why it does not fit."""

    choice: SchedulerChoice
    error: float | None
    reason: str = ""


def rank_schedulers(
    base: SchedulerMixin,
    steps: int,
    measure: Callable[[SchedulerMixin], float],
    choices: Sequence[SchedulerChoice] = CANDIDATES,
) -> tuple[SchedulerMixin, list[SchedulerTrial]]:
    """Return the scheduler with the smallest error for ``steps`` denoiser calls, and all trials, best first.

    Args:
        base: The model's own scheduler.
        steps: Number of steps.
        measure: Returns the error of a scheduler.
        choices: Schedulers to compare.

    Raises:
        InputError: No scheduler fits.
    """
    trials, schedulers = list[SchedulerTrial](), dict[str, "SchedulerMixin"]()
    for choice in choices:
        try:
            scheduler = build_scheduler(base, choice, steps)
        except InputError as error:
            trials.append(SchedulerTrial(choice, None, error.what))
            continue
        trial = type(scheduler).from_config(scheduler.config)
        trial.set_timesteps(steps)
        # Schedulers of second order call the denoiser twice per step, which would be an unfair comparison.
        if len(trial.timesteps) != steps:
            trials.append(SchedulerTrial(choice, None, "it calls the denoiser more than once a step"))
            continue
        schedulers[str(choice)] = scheduler
        trials.append(SchedulerTrial(choice, measure(scheduler)))
    trials.sort(key=lambda trial: float("inf") if trial.error is None else trial.error)
    if not schedulers:
        raise InputError(
            f"No scheduler fits {steps} steps: {trials[0].reason}",
            where="scheduler",
            expected=f"one like the model's own, {type(base).__name__}",
        )
    return schedulers[str(trials[0].choice)], trials


TRIAL_COLUMNS = ("scheduler", "distance")


def trial_rows(trials: Sequence[SchedulerTrial]) -> list[tuple[str, float | str]]:
    """Return rows of a stage's table: each scheduler, and its distance or the reason why it does not fit."""
    return [(str(trial.choice), trial.reason if trial.error is None else round(trial.error, 5)) for trial in trials]


@dataclass(frozen=True)
class ReferenceTrajectory:
    """End of a trajectory of many steps: latents ``end`` [n, channels, h, w] for prompts and noise."""

    sampler: DiffusionSampler
    ids: np.ndarray
    noise: np.ndarray
    end: np.ndarray = field(repr=False)

    def distance(self, sampler: DiffusionSampler) -> float:
        """Return the root mean square error of another sampler's latents, relative to the latents."""
        latents = sampler.sample_latents(self.ids, self.noise, seeds=range(len(self.noise)))
        return float(np.sqrt(np.mean((latents - self.end) ** 2) / np.mean(self.end**2)))

    def best_scheduler(self, steps: int) -> tuple[SchedulerMixin, list[SchedulerTrial]]:
        """Return the nearest scheduler for ``steps`` steps of the same denoiser, and all trials, nearest first."""
        sampler = replace(self.sampler, sampling=replace(self.sampler.sampling, steps=steps))
        return rank_schedulers(sampler.scheduler, steps, lambda trial: self.distance(replace(sampler, scheduler=trial)))


def find_scheduler_class(name: str) -> type[SchedulerMixin]:
    """Return the scheduler class of diffusers with that name. Raises `InputError` with a similar name."""
    diffusers = import_diffusers()
    scheduler_class = getattr(diffusers, name, None)
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin):
        return scheduler_class
    similar = nearest_name(name, [other for other in dir(diffusers) if other.endswith("Scheduler")])
    raise InputError(
        f"diffusers has no scheduler {name!r}.",
        where="scheduler",
        expected="the name of one of its scheduler classes, such as DPMSolverMultistepScheduler",
        hint=f"did you mean {similar}?" if similar else None,
    )


def _misfit(choice: SchedulerChoice, reason: str, expected: str | None = None) -> InputError:
    return InputError(
        f"{choice} does not fit: {reason.rstrip('.')}.",
        where="scheduler",
        expected=expected or "a scheduler that takes what the denoiser was trained for",
        hint="take another scheduler, timestep_spacing or number of steps, or `scheduler: best`",
    )
