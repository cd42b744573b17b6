"""Teach a UNet that lost blocks or channels by denoising, by its teacher's outputs and by features behind blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.models.hooks import removed_on_exit
from compress.models.model import TorchModel
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.caption_images import VALIDATION, latent_rows, some_places
from compress.plugins.diffusion.denoiser_importance import Probes
from compress.plugins.diffusion.noised_latents import TEXT, NoisedLatents, Noising, denoise
from compress.plugins.diffusion.pipeline_model import GeneratorModel
from compress.plugins.diffusion.stage_settings import FeatureDistillation
from compress.plugins.diffusion.unet_blocks import require_unet, stage_ends
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.tasks.inference import device_of, tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from compress.stages.base import Context

_RIDGE = 1e-4
"""Of the mean square of a feature, added where projections are fitted."""
_FITTED = 16
"""Examples by which they are."""


def distill_features(
    settings: FeatureDistillation, teacher: TorchModel, model: TorchModel, context: Context
) -> GeneratorModel:
    """``model`` with a UNet that has learned from ``teacher``'s. Raises `StageError` where one of them has none."""
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    student, taught = (require_unet(one.parts[UNET]) for one in (model, teacher))
    examples, empty = latent_rows(teacher, context)
    held_out = None
    if VALIDATION in context.data.splits:
        places = some_places(context, VALIDATION, settings.judged_examples)
        held_out, _ = latent_rows(teacher, context, VALIDATION, places)
    noising = Noising.of(teacher.scheduler, {TEXT: empty[0]}, settings.without_prompt)
    train_on_features(student, taught, examples, held_out, noising, settings, context)
    return model


def train_on_features(
    student: Any,
    teacher: UNet2DConditionModel,
    examples: Examples,
    held_out: Examples | None,
    noising: Noising,
    settings: FeatureDistillation,
    context: Context,
) -> None:
    """Train ``student`` in place on `latent_examples`; ``held_out`` ones judge every epoch.

    A killed training goes on where it was last kept in the context's scratch. Raises `StageError` for UNets that
    cannot be compared.
    """
    lesson = FeatureTrainer.between(teacher, student, examples, noising, settings, context.seed)
    batches = -(-len(examples) // settings.batch_size)
    probes = None
    if held_out is not None:
        probes = Probes.spaced(held_out, noising, settings.judged_timesteps, settings.batch_size, context.seed)
    before = None if probes is None else probes.loss(student)
    trainee = Trainee(
        student,
        examples,
        lesson.loss,
        extra=list(lesson.projections.parameters()),
        validate=None if probes is None else lambda: -probes.loss(student),
        length=Length(max(1, round(settings.epochs * batches)), settings.seconds),
        kept=None if processes.several() else TrainingCheckpoint(context.scratch),
        stopped=context.note,
        known=student,
        keep_best=settings.keep_best,
    )
    with lesson.listening():
        train(trainee, settings, context.seed, context.progress, "distill_features")
    if probes is not None:
        context.note(
            f"distill_features: denoising loss on held-out pictures {before:.4f} -> {probes.loss(student):.4f}, "
            f"the teacher's {probes.loss(teacher.to(device_of(student))):.4f}"
        )


@dataclass
class FeatureTrainer:
    """L = w_d L_denoising + w_o L_output + w_f sum of L_feature (Kim et al. 2023, section 3.2, equations 1 to 4).

    Features are what blocks give, of those that both UNets have. Where a student's is narrower it is projected to the
    teacher's width, by a matrix that is learned with it and thrown away.
    """

    teacher: UNet2DConditionModel
    noising: Noising
    losses: FeatureDistillation
    pairs: dict[str, tuple[nn.Module, nn.Module]]
    """The teacher's block and the student's, by what they are."""
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    _seen: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        teacher: UNet2DConditionModel,
        student: Any,
        examples: Examples,
        noising: Noising,
        losses: FeatureDistillation,
        seed: int,
    ) -> FeatureTrainer:
        """Pair the blocks, and fit the projections on some examples. Raises `StageError`."""
        if teacher.config.out_channels != student.config.out_channels:
            raise StageError(
                f"The student answers with {student.config.out_channels} channels and the teacher with "
                f"{teacher.config.out_channels}.",
                expected="two UNets of the same latents",
            )
        teacher.eval().requires_grad_(False)
        lesson = cls(teacher, noising, losses, _pairs(teacher, student))
        if losses.feature_weight:
            lesson._fit_projections(student, examples, seed)
        return lesson

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what the blocks give, as they are called."""
        watched = self.pairs if self.losses.feature_weight else {}
        handles = [
            block.register_forward_hook(self._keep(whose, name))
            for name, blocks in watched.items()
            for whose, block in zip(("teacher", "student"), blocks, strict=True)
        ]
        with removed_on_exit(handles):
            yield
        self._seen.clear()

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of a batch, with noise and timesteps drawn for it."""
        return self.loss_of(module, self.noising.draw(batch))

    def loss_of(self, module: nn.Module, noised: NoisedLatents) -> torch.Tensor:
        """Of noised latents; features count while the lesson is `listening`."""
        weights = self.losses
        mine = denoise(module, noised).float()
        loss = weights.denoising_weight * nn.functional.mse_loss(mine, noised.target.float())
        if weights.output_weight or weights.feature_weight:
            self.teacher.to(noised.clean.device)
            with torch.no_grad():
                taught = denoise(self.teacher, noised).float()
            loss = loss + weights.output_weight * nn.functional.mse_loss(mine, taught)
        if weights.feature_weight:
            loss = loss + weights.feature_weight * self._feature_loss()
        return loss

    def _feature_loss(self) -> torch.Tensor:
        losses = []
        for name in self.pairs:
            taught, mine = self._seen.pop(("teacher", name)).float(), self._seen.pop(("student", name)).float()
            if name in self.projections:
                mine = self.projections[name](mine)
            losses.append(nn.functional.mse_loss(mine, taught))
        return torch.stack(losses).sum()

    def _keep(self, whose: str, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, given: object, output: object) -> None:
            self._seen[whose, name] = _features(output)

        return hook

    @torch.no_grad()
    def _fit_projections(self, student: Any, examples: Examples, seed: int) -> None:
        """Least squares from the student's features to the teacher's, so that it learns to follow from the start on."""
        places = list(range(min(_FITTED, len(examples))))
        device = device_of(student)
        batch = {name: value.to(device) for name, value in tensors(examples, places).items()}
        noised = self.noising.draw(batch, generator=torch.Generator().manual_seed(seed))
        student.eval()
        with self.listening():
            for unet in (self.teacher.to(device), student):
                denoise(unet, noised)
            for name in self.pairs:
                taught, mine = self._seen["teacher", name], self._seen["student", name]
                if mine.shape[1] != taught.shape[1]:
                    self.projections[name] = _fitted(mine, taught)


def _pairs(teacher: UNet2DConditionModel, student: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    theirs, mine = stage_ends(teacher), stage_ends(student)
    found = {}
    for name, block in mine.items():
        taught = theirs.get(name)
        if taught is None:
            raise StageError(
                f"The student has a block ({name}) that the teacher lacks.",
                expected="a student that was cut out of its teacher",
            )
        if bool(getattr(taught, "downsamplers", None)) != bool(getattr(block, "downsamplers", None)):
            # The innermost stage that is left doesn't halve what it gives, as it did on the way to the next.
            taught, block = _last_layer(taught), _last_layer(block)
        found[name] = (taught, block)
    return found


def _last_layer(block: Any) -> nn.Module:
    layers: Any = block.attentions if hasattr(block, "attentions") else block.resnets
    last: nn.Module = layers[-1]
    return last


def _features(output: Any) -> torch.Tensor:
    """What a block gives [B, C, H, W], first of all that it hands on."""
    if isinstance(output, torch.Tensor):
        return output
    found: torch.Tensor = output[0]
    return found


def _fitted(mine: torch.Tensor, taught: torch.Tensor) -> nn.Conv2d:
    """The 1x1 convolution nearest to a map from ``mine`` [B, C, H, W] to ``taught`` [B, D, H, W]."""
    given, wanted = (one.double().movedim(1, -1).flatten(0, 2) for one in (mine, taught))
    products = given.T @ given
    products += _RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    weight = torch.linalg.solve(products, given.T @ wanted).T.to(mine.dtype)
    made = nn.Conv2d(mine.shape[1], taught.shape[1], 1, bias=False)
    made.weight = nn.Parameter(weight[:, :, None, None].contiguous())
    return made
