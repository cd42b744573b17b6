"""Distillation of a denoiser that samples in fewer steps: rounds of training, and the student's scheduler."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.models.model import TorchModel
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.noised_latents import LATENTS, TEXT, encode_split, reference_trajectory
from compress.plugins.diffusion.pipeline_model import GeneratorModel, Sampling
from compress.plugins.diffusion.sampler import torch_sampler
from compress.plugins.diffusion.scheduler import TRIAL_COLUMNS, find_scheduler_class, trial_rows
from compress.plugins.diffusion.stage_settings import ConsistencyDistillation, ProgressiveDistillation
from compress.plugins.diffusion.step_losses import (
    AveragedNetwork,
    CleanBatch,
    ConsistencyLoss,
    GuidanceLoss,
    GuidedDenoiser,
    NoiseSchedule,
    PredictionType,
    ProgressiveLoss,
)
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from compress.stages.base import Context

_COMPARED_IMAGES, _REFERENCE_STEPS = 16, 50
"""Number of images, and steps of the teacher, of the comparison in the report."""


def distill_steps(
    settings: ProgressiveDistillation | ConsistencyDistillation,
    teacher: TorchModel,
    model: TorchModel,
    context: Context,
) -> GeneratorModel:
    """Return ``model`` with a denoiser that samples in fewer steps, and its scheduler.

    The report compares its distance from the teacher's images with that of the best untrained scheduler.

    Args:
        settings: Settings of the stage.
        teacher: Model to learn from.
        model: Model whose denoiser is trained.
        context: Context of the stage.
    """
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    examples, empty = encode_split(teacher, context)
    guided_teacher = replace(teacher, sampling=replace(teacher.sampling, guidance=settings.guidance))
    trajectory = reference_trajectory(guided_teacher, context, _COMPARED_IMAGES, _REFERENCE_STEPS)
    _, trials = trajectory.best_scheduler(settings.steps)
    # The input may also be the teacher, so the student is a copy.
    student = copy.deepcopy(model.parts[UNET])
    trainer = StepTrainer(settings, teacher.parts[UNET], student, teacher.scheduler, examples, empty, context)
    distilled = replace(model, scheduler=trainer.train(), sampling=Sampling(settings.steps, guidance=1.0))
    distilled.replace_part(UNET, student)
    method = "progressive" if isinstance(settings, ProgressiveDistillation) else "consistency"
    distance = round(trajectory.distance(torch_sampler(distilled)), 5)
    rows = [*trial_rows(trials), (f"{method}, trained", distance)]
    context.add_table(f"Distance in {settings.steps} steps from {_REFERENCE_STEPS}", TRIAL_COLUMNS, rows)
    context.note(
        f"distill_steps: {distance:.1%} from the teacher's {_REFERENCE_STEPS} steps, {rows[0][0]} {rows[0][1]:.1%}"
    )
    return distilled


@dataclass
class StepTrainer:
    """Distillation of the denoiser ``teacher`` into ``student``. ``scheduler`` is the teacher's.

    ``examples`` are `latent_examples`. ``empty`` [1, tokens, width] are the hidden states of the empty prompt, if the
    denoiser reads text.
    """

    settings: ProgressiveDistillation | ConsistencyDistillation
    teacher: nn.Module
    student: nn.Module
    scheduler: SchedulerMixin
    examples: Examples
    empty: torch.Tensor | None
    context: Context

    def __post_init__(self) -> None:
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        squares = getattr(self.scheduler, "alphas_cumprod", None)
        if squares is None or prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise StageError(
                f"A denoiser that was trained for {type(self.scheduler).__name__} ({prediction_type}) learns no fewer "
                "steps here.",
                expected="one of alphas and sigmas, as of DDPM or DDIM, which predicts epsilon, sample or v_prediction",
                hint="leave the stage out, and choose a scheduler for fewer steps by `schedule`",
            )
        self.teacher_prediction: PredictionType = prediction_type
        is_progressive = isinstance(self.settings, ProgressiveDistillation)
        # In progressive distillation x divides by the signal that is left where epsilon is predicted.
        self.student_prediction: PredictionType = "v_prediction" if is_progressive else prediction_type
        self.schedule = NoiseSchedule(squares.float())
        if self.guides and self.empty is None:
            raise StageError(
                "Guidance is the difference that a prompt makes, and this denoiser reads none.",
                where="guidance",
                expected="guidance: 1",
            )

    @property
    def guides(self) -> bool:
        """True if classifier-free guidance is folded in."""
        return self.settings.guidance > 1

    def train(self) -> SchedulerMixin:
        """Train the student in place and return its scheduler. Raises `StageError`."""
        self.teacher.eval().requires_grad_(False)
        settings, empty = self.settings, self.empty if self.guides else None
        teacher = GuidedDenoiser(self.teacher, self.teacher_prediction, self.schedule, empty, settings.guidance)
        student = self._denoiser(self.student)
        if isinstance(settings, ConsistencyDistillation):
            averaged = AveragedNetwork(self.student, settings.average)
            self._train_round("consistent", ConsistencyLoss(teacher, student, settings.teacher_steps, averaged), 0, 1)
            return self.student_scheduler()
        counts = [settings.first_steps, *settings.rounds]
        rounds = [(f"{steps}-steps", steps, previous // steps) for previous, steps in pairwise(counts)]
        if settings.guidance_first and (self.guides or self.student_prediction != self.teacher_prediction):
            # The student first learns to predict as the guided teacher, at all timesteps.
            rounds.insert(0, ("guided", 0, 1))
        second_order = settings.solver != "ddim"
        for index, (name, steps, merged) in enumerate(rounds):
            round_loss = GuidanceLoss(teacher, student)
            if steps:
                round_loss = ProgressiveLoss(teacher, student, steps, merged, second_order)
            self._train_round(name, round_loss, index, len(rounds))
            # The student of a round is the teacher of the next.
            teacher = self._denoiser(copy.deepcopy(self.student).eval().requires_grad_(False))
        return self.student_scheduler()

    def _denoiser(self, network: nn.Module) -> GuidedDenoiser:
        return GuidedDenoiser(network, self.student_prediction, self.schedule)

    def student_scheduler(self) -> SchedulerMixin:
        """Return the scheduler of the student: LCM after consistency distillation, otherwise DDIM."""
        settings, name = self.settings, "DDIMScheduler"
        options: dict[str, object] = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        if isinstance(settings, ConsistencyDistillation):
            name, options = "LCMScheduler", {"original_inference_steps": settings.teacher_steps}
        scheduler_class = find_scheduler_class(name)
        fields = inspect.signature(scheduler_class).parameters
        config = {field: value for field, value in self.scheduler.config.items() if field in fields}
        changes = {"prediction_type": self.student_prediction, "clip_sample": False, "thresholding": False}
        config |= {field: value for field, value in changes.items() if field in fields}
        return scheduler_class.from_config(config, **options)

    def batch(self, inputs: dict[str, torch.Tensor]) -> CleanBatch:
        """Return a batch for the losses."""
        return CleanBatch(inputs[LATENTS], inputs.get(TEXT))

    def _train_round(self, name: str, loss: GuidanceLoss, index: int, rounds: int) -> None:
        """Train one round, or read its weights if a killed run completed it.

        Args:
            name: Name of the round and of its files in the scratch folder.
            loss: Loss of the round.
            index: Index of the round.
            rounds: Number of rounds, which share the time budget.
        """
        completed = self.context.scratch / f"{name}.safetensors"
        if completed.is_file():
            self.student.load_state_dict(load_file(completed))
            return
        settings = self.settings
        averaged = loss.averaged if isinstance(loss, ConsistencyLoss) else None
        batches = -(-len(self.examples) // settings.batch_size)
        seconds, num_steps = None if settings.seconds is None else settings.seconds / rounds, [0]

        def batch_loss(network: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            loss.teacher.network.to(inputs[LATENTS].device)
            return loss.loss(network, self.batch(inputs))

        trainee = Trainee(
            self.student if averaged is None else averaged,
            self.examples,
            batch_loss,
            after_step=None if averaged is None else lambda *_: averaged.update_average(),
            length=Length(max(1, round(settings.epochs * batches / rounds)), seconds),
            told=lambda done, share, loss: num_steps.append(done),
            kept=None if processes.num_processes() > 1 else TrainingCheckpoint(self.context.scratch / name),
            stopped=self.context.note,
        )
        # Gradients are needed for the student alone.
        for network in (loss.teacher.network, self.student):
            network.requires_grad_(network is self.student)
        label = f"distill_steps, {name}"
        losses = train(trainee, settings, self.context.seed + index, self.context.progress, label)
        if averaged is not None:
            averaged.apply_average()
        self.context.note(
            f"{label}: {num_steps[-1]:,} training steps; loss {losses[0]:.4g} first, {losses[-1]:.4g} last"
        )
        if not processes.num_processes() > 1:
            completed.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in self.student.state_dict().items()}, completed)
