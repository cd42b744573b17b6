"""How a generator learns to draw in fewer steps: rounds of training, each kept, and the scheduler that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.models.model import TorchModel
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.caption_images import latent_rows, walked_path
from compress.plugins.diffusion.noise_prediction import NoiseTable, PredictionType
from compress.plugins.diffusion.noised_latents import LATENTS, TEXT
from compress.plugins.diffusion.pipeline_model import GeneratorModel
from compress.plugins.diffusion.sampling_settings import Sampling
from compress.plugins.diffusion.scheduler import scheduler_class
from compress.plugins.diffusion.scheduler_search import COLUMNS, rows_of
from compress.plugins.diffusion.stage_settings import ConsistencyDistillation, ProgressiveDistillation
from compress.plugins.diffusion.step_losses import Agree, Averaged, Batch, Denoiser, Join, Match
from compress.plugins.diffusion.torch_session import torch_sampler
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DConditionModel

    from compress.stages.base import Context

_COMPARED, _REFERENCE_STEPS = 16, 50
"""Pictures, and steps of the teacher, by which it is told what was learned."""
_TOLD = "time_cond_proj_dim"
_TOLD_WIDTH = 256
"""Of the embedding of guidance, as in Luo et al. 2023."""


def distill_steps(
    settings: ProgressiveDistillation | ConsistencyDistillation,
    teacher: TorchModel,
    model: TorchModel,
    context: Context,
) -> GeneratorModel:
    """``model`` with a denoiser that has learned to draw in fewer steps, and the scheduler that goes with it.

    The report says how far from the teacher's pictures it ends, and how far the best scheduler of the untrained does.
    """
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    examples, empty = latent_rows(teacher, context)
    path = walked_path(guided_by(teacher, settings.guidance_range[0]), context, _COMPARED, _REFERENCE_STEPS)
    _, tried = path.best(settings.steps)
    student: UNet2DConditionModel = model.parts[UNET]
    student = told_of_guidance(student) if settings.conditions_on_guidance else copy.deepcopy(student)
    lesson = StepTrainer(settings, teacher.parts[UNET], student, teacher.scheduler, examples, empty, context)
    made = replace(model, scheduler=lesson.train(), sampling=Sampling(settings.steps, lesson.sampled_guidance))
    made.replace_part(UNET, student)
    rows = [*rows_of(tried), (f"{_method(settings)}, trained", round(path.distance(torch_sampler(made)), 5))]
    context.add_table(f"Distance in {settings.steps} steps from {_REFERENCE_STEPS}", COLUMNS, rows)
    context.note(
        f"distill_steps: {rows[-1][1]:.1%} from the teacher's {_REFERENCE_STEPS} steps, {rows[0][0]} {rows[0][1]:.1%}"
    )
    return made


def _method(settings: ProgressiveDistillation | ConsistencyDistillation) -> str:
    return "progressive" if isinstance(settings, ProgressiveDistillation) else "consistency"


def _follower(
    averaged: Averaged, settings: ProgressiveDistillation | ConsistencyDistillation
) -> Callable[[int, int], None]:
    """Return a hook for after each step that moves the averaged weights towards the trained ones."""
    assert isinstance(settings, ConsistencyDistillation)
    return lambda done, steps: averaged.follow(settings.average)


def guided_by(model: GeneratorModel, guidance: float) -> GeneratorModel:
    """The same model, drawing with another guidance."""
    return replace(model, sampling=replace(model.sampling, guidance=guidance))


@dataclass
class StepTrainer:
    """One distillation of ``teacher`` into ``student``, both denoisers of diffusers; ``scheduler`` is the teacher's.

    ``examples`` are those of `noised_latents.latent_examples`; ``empty`` [1, tokens, width] is what the text encoder
    says of the empty prompt, where the denoiser reads text.
    """

    settings: ProgressiveDistillation | ConsistencyDistillation
    teacher: nn.Module
    student: nn.Module
    scheduler: SchedulerMixin
    examples: Examples
    empty: torch.Tensor | None
    context: Context

    def __post_init__(self) -> None:
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        squares = getattr(self.scheduler, "alphas_cumprod", None)
        if squares is None or kind not in ("epsilon", "sample", "v_prediction"):
            raise StageError(
                f"A denoiser that was trained for {type(self.scheduler).__name__} ({kind}) learns no fewer steps here.",
                expected="one of alphas and sigmas, as of DDPM or DDIM, which predicts epsilon, sample or v_prediction",
                hint="leave the stage out, and choose a scheduler for fewer steps by `schedule`",
            )
        self.taught: PredictionType = kind
        progressive = isinstance(self.settings, ProgressiveDistillation)
        self.kind: PredictionType = self.settings.prediction_type or ("v_prediction" if progressive else kind)
        if self.kind == "epsilon" and not float(squares.min()) > 0:
            raise StageError(
                "Nothing of the signal is left at the last timestep, where epsilon says nothing of x.",
                where="prediction_type",
                expected="v_prediction or sample",
            )
        self.table = NoiseTable(squares.float())
        if self.guides and self.empty is None:
            raise StageError(
                "Guidance is the difference that a prompt makes, and this denoiser reads none.",
                where="guidance",
                expected="guidance: 1",
            )

    @property
    def guides(self) -> bool:
        """Whether guidance is folded in."""
        return self.settings.guidance_range[1] > 1

    @property
    def sampled_guidance(self) -> float:
        """What the student is drawn with: none, since it has it in itself, or what it is told where it is told."""
        return self.settings.guidance_range[0] if self.settings.conditions_on_guidance else 1.0

    @property
    def told(self) -> int:
        """The width of the embedding that tells the student of its guidance, or 0."""
        return int(getattr(self.student, "config", {}).get(_TOLD) or 0) if self.settings.conditions_on_guidance else 0

    def train(self) -> SchedulerMixin:
        """Train the student in place; returns the scheduler that draws with it. Raises `StageError`."""
        self.teacher.eval().requires_grad_(False)
        settings = self.settings
        if isinstance(settings, ConsistencyDistillation):
            self._train("consistent", lambda: self._agree(settings), 0, 1)
            return self.sampled_by()
        counts = [settings.first_steps, *settings.rounds]
        rounds = [(f"{steps}-steps", steps, before // steps) for before, steps in pairwise(counts)]
        if settings.guidance_first and (self.guides or self.kind != self.taught):
            rounds.insert(0, ("guided", 0, 1))
        teacher = self._first_teacher()
        for place, (name, steps, joined) in enumerate(rounds):
            self._train(name, _Round(self, teacher, steps, joined, settings.solver != "ddim"), place, len(rounds))
            frozen = copy.deepcopy(self.student).eval().requires_grad_(False)
            teacher = Denoiser(frozen, self.kind, self.table, self.told)
        return self.sampled_by()

    def sampled_by(self) -> SchedulerMixin:
        """The scheduler of the student."""
        config = {**self.scheduler.config, "prediction_type": self.kind, "clip_sample": False, "thresholding": False}
        if isinstance(self.settings, ConsistencyDistillation):
            lcm = scheduler_class("LCMScheduler")
            return lcm.from_config(
                _known(lcm, config),
                original_inference_steps=self.settings.teacher_steps,
                timestep_scaling=self.settings.timestep_scaling,
            )
        ddim = scheduler_class("DDIMScheduler")
        return ddim.from_config(_known(ddim, config), timestep_spacing="trailing", set_alpha_to_one=True)

    def _first_teacher(self) -> Denoiser:
        return Denoiser(self.teacher, self.taught, self.table, 0, self.empty if self.guides else None)

    def _agree(self, settings: ConsistencyDistillation) -> tuple[nn.Module, Agree]:
        averaged = Averaged(self.student)
        student = Denoiser(self.student, self.kind, self.table, self.told)
        loss = Agree(
            self._first_teacher(),
            student,
            settings.teacher_steps,
            averaged,
            settings.timestep_scaling,
            settings.loss == "pseudo_huber",
        )
        return averaged, loss

    def batch(self, given: dict[str, torch.Tensor]) -> Batch:
        """A batch of the loop as the losses want it; guidance scales are drawn."""
        latents, text = given[LATENTS], given.get(TEXT)
        if not self.guides:
            return Batch(latents, text)
        low, high = self.settings.guidance_range
        return Batch(latents, text, (low + (high - low) * torch.rand(len(latents))).to(latents.device))

    def _train(self, name: str, make: Callable[[], tuple[nn.Module, Any]], place: int, rounds: int) -> None:
        """One round of so many, unless a run that was killed had done it; then its weights are read."""
        done = self.context.scratch / f"{name}.safetensors"
        if done.is_file():
            self.student.load_state_dict(load_file(done))
            return
        module, loss = make()
        after = _follower(module, self.settings) if isinstance(module, Averaged) else None
        batches = -(-len(self.examples) // self.settings.batch_size)
        taken = [0]
        seconds = None if self.settings.seconds is None else self.settings.seconds / rounds
        trainee = Trainee(
            module,
            self.examples,
            loss=lambda network, given: self._loss(loss, network, given),
            after_step=after,
            length=Length(max(1, round(self.settings.epochs * batches / rounds)), seconds),
            told=lambda done, share, loss: taken.append(done),
            kept=None if processes.several() else TrainingCheckpoint(self.context.scratch / name),
            stopped=self.context.note,
            known=self.student,
        )
        for one in (loss.teacher.network, self.student):
            one.requires_grad_(one is self.student)
        losses = train(
            trainee, self.settings, self.context.seed + place, self.context.progress, f"distill_steps, {name}"
        )
        if isinstance(module, Averaged):
            module.settle()
        self.context.note(
            f"distill_steps, {name}: {taken[-1]:,} training steps; loss {losses[0]:.4g} first, {losses[-1]:.4g} last"
        )
        if not processes.several():
            done.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in self.student.state_dict().items()}, done)

    def _loss(self, loss: Match | Join | Agree, network: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
        loss.teacher.network.to(given[LATENTS].device)
        return loss.loss(network, self.batch(given))


@dataclass(frozen=True)
class _Round:
    """What a round of progressive distillation trains: ``steps`` of the student, or 0 to say what the teacher does."""

    lesson: StepTrainer
    teacher: Denoiser
    steps: int
    joined: int
    by_dpm_solver: bool

    def __call__(self) -> tuple[nn.Module, Match | Join]:
        lesson = self.lesson
        student = Denoiser(lesson.student, lesson.kind, lesson.table, lesson.told)
        match = Match(self.teacher, student)
        return lesson.student, self._joined(student) if self.steps else match

    def _joined(self, student: Denoiser) -> Join:
        return Join(self.teacher, student, self.steps, self.joined, self.by_dpm_solver)


def told_of_guidance(network: Any, width: int = _TOLD_WIDTH) -> Any:
    """A copy that takes `timestep_cond` of ``width`` beside timesteps, and does with any what ``network`` does without.

    Raises `StageError` for a network that has no such input.
    """
    if not hasattr(network.config, _TOLD):
        raise StageError(
            f"A {type(network).__name__} cannot be told of guidance.",
            where="guidance",
            expected="one number, or a UNet2DConditionModel, which takes timestep_cond",
        )
    if network.config.get(_TOLD):
        return copy.deepcopy(network)
    made = type(network).from_config(network.config, **{_TOLD: width})
    lacking = made.load_state_dict(network.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in lacking:
            made.get_parameter(name).zero_()
    return made


def _known(made: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What of a config a scheduler of that class has a field for."""
    import inspect

    return {name: value for name, value in config.items() if name in inspect.signature(made.__init__).parameters}
