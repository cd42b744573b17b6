"""Another scheduler of diffusers for the same denoiser, where it fits; importing this imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.plugins.diffusion.sampling_settings import import_diffusers
from compress.utils.errors import InputError, first_line, nearest_name

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


_SPACING = "timestep_spacing"
_SAME = 1e-5
"""How far the noise levels of two schedulers may differ."""
FAILURES = (ValueError, TypeError, IndexError, AttributeError, NotImplementedError, ImportError, ArithmeticError)
"""What diffusers raises for settings that don't go together."""


@dataclass(frozen=True)
class Choice:
    """A scheduler by its class's name in diffusers, and what of its config is not as the model has it."""

    scheduler: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join((self.scheduler, *(f"{name}={value}" for name, value in self.fields.items())))


UNTRAINED: tuple[Choice, ...] = (
    Choice("DDIMScheduler", {_SPACING: "leading"}),
    Choice("DDIMScheduler", {_SPACING: "trailing"}),
    Choice("DPMSolverMultistepScheduler", {_SPACING: "linspace"}),
    Choice("DPMSolverMultistepScheduler", {_SPACING: "trailing"}),
    Choice("DPMSolverMultistepScheduler", {_SPACING: "linspace", "use_karras_sigmas": True}),
    Choice("UniPCMultistepScheduler", {_SPACING: "linspace"}),
    Choice("UniPCMultistepScheduler", {_SPACING: "trailing"}),
    Choice("EulerDiscreteScheduler", {_SPACING: "linspace"}),
    Choice("EulerDiscreteScheduler", {_SPACING: "trailing"}),
)
"""Those that are tried where a recipe leaves the choice: they follow the same path, so that they can be compared."""


def fitting_scheduler(base: Any, choice: Choice, steps: int) -> SchedulerMixin:
    """The chosen scheduler with the noise levels and the prediction type of ``base``, the model's own.

    Raises `InputError` where there is no such scheduler, where the model was trained for one of another sort, and where
    prediction type, timestep spacing or the number of ``steps`` don't fit it.
    """
    made = scheduler_class(choice.scheduler)
    _require_compatible(base, made)
    accepted = set(_parameters(made))
    for name in choice.fields:
        if name not in accepted:
            raise _unfit(choice, f"it has no {name}", f"one of {', '.join(sorted(accepted))}")
    kind = base.config.get("prediction_type", "epsilon")
    if kind != "epsilon" and "prediction_type" not in accepted:
        raise _unfit(choice, f"it takes networks that predict epsilon, and this one predicts {kind}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = made.from_config(dict(base.config), **choice.fields)
    except FAILURES as error:
        raise _unfit(choice, first_line(error)) from error
    _require_same_noise(base, found, choice)
    check_steps(found, steps, choice)
    return found


def check_steps(scheduler: SchedulerMixin, steps: int, choice: Choice | None = None) -> None:
    """Walk ``steps`` of them on zeros. Raises `InputError` where the scheduler can't."""
    import torch

    walked = type(scheduler).from_config(scheduler.config)
    said = choice or Choice(type(scheduler).__name__)
    trained = int(scheduler.config.num_train_timesteps)
    try:
        walked.set_timesteps(steps)
        times = walked.timesteps.tolist()
        if min(times) < 0 or max(times) > trained - 1:
            raise _unfit(said, f"{steps} steps reach timestep {max(times):g} of {trained}")
        sample = torch.zeros(1, 3, 2, 2) * walked.init_noise_sigma
        for time in walked.timesteps:
            output = torch.zeros_like(walked.scale_model_input(sample, time))
            sample = walked.step(output, time, sample).prev_sample
    except FAILURES as error:
        raise _unfit(
            said, first_line(error), f"a number of steps that suits it, where {steps} were asked for"
        ) from error
    if not torch.isfinite(sample).all():
        raise _unfit(said, f"{steps} steps end in numbers that are not finite")


def network_calls(scheduler: SchedulerMixin, steps: int) -> int:
    """How often the denoiser is called for so many steps: twice as often by schedulers of second order."""
    walked = type(scheduler).from_config(scheduler.config)
    walked.set_timesteps(steps)
    return len(walked.timesteps)


@dataclass(frozen=True)
class Tried:
    """A choice, and by the measure how far it is off at so many steps; or why it doesn't fit."""

    choice: Choice
    error: float | None
    reason: str = ""


def best_untrained(
    base: object, steps: int, measure: Callable[[Any], float], choices: Sequence[Choice] = UNTRAINED
) -> tuple[Any, list[Tried]]:
    """The scheduler of least ``measure`` at so many calls of the denoiser, and all that were tried, best first.

    Raises `InputError` where none fits.
    """
    tried, schedulers = list[Tried](), dict[str, Any]()
    for choice in choices:
        try:
            scheduler = fitting_scheduler(base, choice, steps)
        except InputError as error:
            tried.append(Tried(choice, None, error.what))
            continue
        if network_calls(scheduler, steps) != steps:
            tried.append(Tried(choice, None, "it calls the denoiser more than once a step"))
            continue
        schedulers[str(choice)] = scheduler
        tried.append(Tried(choice, measure(scheduler)))
    tried.sort(key=lambda one: float("inf") if one.error is None else one.error)
    if not schedulers:
        raise InputError(
            f"No scheduler fits {steps} steps: {tried[0].reason}",
            where="scheduler",
            expected=f"one like the model's own, {type(base).__name__}",
        )
    return schedulers[str(tried[0].choice)], tried


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The class of that name in diffusers. Raises `InputError` where there is none, naming one that is spelt alike."""
    diffusers = import_diffusers()
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
        return found
    known = [one for one in dir(diffusers) if one.endswith("Scheduler")]
    near = nearest_name(name, known)
    raise InputError(
        f"diffusers has no scheduler {name!r}.",
        where="scheduler",
        expected="the name of one of its scheduler classes, such as DPMSolverMultistepScheduler",
        hint=f"did you mean {near}?" if near else None,
    )


def _parameters(made: Any) -> tuple[str, ...]:
    import inspect

    return tuple(name for name in inspect.signature(made.__init__).parameters if name != "self")


def _require_compatible(base: Any, made: Any) -> None:
    """diffusers' own word on which schedulers can take each other's place."""
    if made is type(base) or made in base.compatibles:
        return
    others = sorted(one.__name__ for one in base.compatibles if not one.__name__.startswith("Dummy"))
    raise InputError(
        f"{made.__name__} does not fit a denoiser that was trained for {type(base).__name__}.",
        where="scheduler",
        expected=f"one of {', '.join(others)}",
        hint="models that `distill` made consistent are sampled by LCMScheduler, and no others are",
    )


def _require_same_noise(base: object, found: object, choice: Choice) -> None:
    ours, theirs = getattr(base, "alphas_cumprod", None), getattr(found, "alphas_cumprod", None)
    if ours is None or theirs is None:
        return
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > _SAME:
        raise _unfit(choice, "it makes other noise levels of the model's config than the model was trained with")


def _unfit(choice: Choice, why: str, expected: str | None = None) -> InputError:
    return InputError(
        f"{choice} does not fit: {why.rstrip('.')}.",
        where="scheduler",
        expected=expected or "a scheduler that takes what the denoiser was trained for",
        hint="take another scheduler, timestep_spacing or number of steps, or `scheduler: best`",
    )
