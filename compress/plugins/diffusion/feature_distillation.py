"""Training of a pruned UNet by denoising, by its teacher's outputs, and by features after each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.models.hooks import removed_on_exit
from compress.models.model import TorchModel
from compress.models.pipeline_folder import UNET
from compress.plugins.diffusion.denoiser_pruning import LossProbe
from compress.plugins.diffusion.noised_latents import (
    TEXT,
    VALIDATION,
    NoisedLatents,
    NoiseProcess,
    denoise,
    encode_split,
    sample_rows,
)
from compress.plugins.diffusion.pipeline_model import GeneratorModel
from compress.plugins.diffusion.stage_settings import FeatureDistillation
from compress.plugins.diffusion.unet_blocks import require_unet, stage_blocks
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
"""Share of a feature's mean square that is added to the diagonal when projections are fitted."""
_FIT_EXAMPLES = 16


def distill_features(
    settings: FeatureDistillation, teacher: TorchModel, model: TorchModel, context: Context
) -> GeneratorModel:
    """Train the UNet of ``model`` by that of ``teacher``.

    Args:
        settings: Settings of the stage.
        teacher: Model before pruning.
        model: Model whose UNet is trained, in place.
        context: Context of the stage.

    Raises:
        StageError: One of the models has no UNet.
    """
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    student, teacher_unet = require_unet(model.parts[UNET]), require_unet(teacher.parts[UNET])
    examples, empty = encode_split(teacher, context)
    held_out = None
    if VALIDATION in context.data.splits:
        indices = sample_rows(context, VALIDATION, settings.judged_examples)
        held_out, _ = encode_split(teacher, context, VALIDATION, indices)
    noising = NoiseProcess.from_scheduler(teacher.scheduler, {TEXT: empty[0]}, settings.without_prompt)
    train_on_features(student, teacher_unet, examples, held_out, noising, settings, context)
    return model


def train_on_features(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    examples: Examples,
    held_out: Examples | None,
    noising: NoiseProcess,
    settings: FeatureDistillation,
    context: Context,
) -> None:
    """Train ``student`` in place. A killed training continues from its checkpoint in the context's scratch folder.

    Args:
        student: UNet2DConditionModel to train.
        teacher: UNet2DConditionModel to learn from.
        examples: `latent_examples` of the train split.
        held_out: Those of the validation split, which judge each epoch.
        noising: Noising that the teacher was trained with.
        settings: Settings of the stage.
        context: Context of the stage.

    Raises:
        StageError: The UNets do not have the same latents and blocks.
    """
    trainer = FeatureTrainer(teacher, student, examples, noising, settings, context.seed)
    probe = None
    if held_out is not None:
        probe = LossProbe.spaced(held_out, noising, settings.judged_timesteps, settings.batch_size, context.seed)
    loss_before = None if probe is None else probe.mean_loss(student)
    batches = -(-len(examples) // settings.batch_size)
    trainee = Trainee(
        student,
        examples,
        trainer.loss,
        extra=list(trainer.projections.parameters()),
        validate=None if probe is None else lambda: probe.mean_loss(student),
        validates_loss=True,
        length=Length(max(1, round(settings.epochs * batches)), settings.seconds),
        kept=None if processes.num_processes() > 1 else TrainingCheckpoint(context.scratch),
        stopped=context.note,
        keep_best=settings.keep_best,
    )
    with trainer.capture_features():
        train(trainee, settings, context.seed, context.progress, "distill_features")
    if probe is not None:
        teacher_loss = probe.mean_loss(teacher.to(device_of(student)))
        context.note(
            f"distill_features: denoising loss on held-out images {loss_before:.4f} -> {probe.mean_loss(student):.4f}, "
            f"the teacher's {teacher_loss:.4f}"
        )


class FeatureTrainer:
    """Loss L = w_d L_denoising + w_o L_output + w_f sum of L_feature (Kim et al. 2023, section 3.2, equations 1 to 4).

    Features are the outputs of blocks that both UNets have: ``pairs`` are the block of the teacher and of the student,
    by name. Narrower features of the student are projected to the teacher's width by a matrix that is trained with it
    and then discarded.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        examples: Examples,
        noising: NoiseProcess,
        settings: FeatureDistillation,
        seed: int,
    ) -> None:
        """Pair the blocks of two UNets and fit projections on some examples.

        Args:
            teacher: UNet2DConditionModel to learn from.
            student: UNet2DConditionModel to train.
            examples: Examples to fit projections on.
            noising: Noising that the teacher was trained with.
            settings: Weights of the losses.
            seed: Seed of the noise of the examples.

        Raises:
            StageError: The UNets do not have the same latents and blocks.
        """
        if teacher.config.out_channels != student.config.out_channels:
            raise StageError(
                f"The student answers with {student.config.out_channels} channels and the teacher with "
                f"{teacher.config.out_channels}.",
                expected="two UNets of the same latents",
            )
        self.teacher, self.noising, self.settings = teacher.eval().requires_grad_(False), noising, settings
        self.pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        self.projections = nn.ModuleDict()
        self._features: dict[tuple[str, str], torch.Tensor] = {}
        teacher_blocks = stage_blocks(teacher)
        for name, block in stage_blocks(student).items():
            teacher_block = teacher_blocks.get(name)
            if teacher_block is None:
                raise StageError(
                    f"The student has a block ({name}) that the teacher lacks.",
                    expected="a student that was pruned from its teacher",
                )
            if bool(getattr(teacher_block, "downsamplers", None)) != bool(getattr(block, "downsamplers", None)):
                # Without inner stages, the student's last stage does not downsample, as the teacher's does. Compare the
                # outputs of their last layers.
                teacher_block, block = _last_layer(teacher_block), _last_layer(block)
            self.pairs[name] = (teacher_block, block)
        if settings.feature_weight:
            self._fit_projections(student, examples, seed)

    @contextmanager
    def capture_features(self) -> Iterator[None]:
        """Record the outputs of the paired blocks while the context is open."""
        pairs = self.pairs if self.settings.feature_weight else {}

        def record(
            key: tuple[str, str], block: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]
        ) -> None:
            # Blocks on the way down return a tuple: hidden states, then skip connections.
            self._features[key] = output if isinstance(output, torch.Tensor) else output[0]

        handles = [
            block.register_forward_hook(partial(record, (side, name)))
            for name, blocks in pairs.items()
            for side, block in zip(("teacher", "student"), blocks, strict=True)
        ]
        with removed_on_exit(handles):
            yield
        self._features.clear()

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch with random noise and timesteps."""
        return self.noised_loss(module, self.noising.sample(batch))

    def noised_loss(self, module: nn.Module, noised: NoisedLatents) -> torch.Tensor:
        """Return the loss of noised latents. Features count inside `capture_features`."""
        weights = self.settings
        prediction = denoise(module, noised).float()
        loss = weights.denoising_weight * nn.functional.mse_loss(prediction, noised.target.float())
        if weights.output_weight or weights.feature_weight:
            self.teacher.to(noised.clean.device)
            with torch.no_grad():
                teacher_prediction = denoise(self.teacher, noised).float()
            loss = loss + weights.output_weight * nn.functional.mse_loss(prediction, teacher_prediction)
        if weights.feature_weight:
            losses = []
            for name in self.pairs:
                # The features of the teacher and of the student.
                target = self._features.pop(("teacher", name)).float()
                features = self._features.pop(("student", name)).float()
                if name in self.projections:
                    features = self.projections[name](features)
                losses.append(nn.functional.mse_loss(features, target))
            loss = loss + weights.feature_weight * torch.stack(losses).sum()
        return loss

    @torch.no_grad()
    def _fit_projections(self, student: UNet2DConditionModel, examples: Examples, seed: int) -> None:
        """Fit projections by least squares, so that the student follows the teacher's features from the start."""
        indices = list(range(min(_FIT_EXAMPLES, len(examples))))
        device = device_of(student)
        batch = {name: value.to(device) for name, value in tensors(examples, indices).items()}
        noised = self.noising.sample(batch, generator=torch.Generator().manual_seed(seed))
        student.eval()
        with self.capture_features():
            for unet in (self.teacher.to(device), student):
                denoise(unet, noised)
            for name in self.pairs:
                target, features = self._features["teacher", name], self._features["student", name]
                if features.shape[1] != target.shape[1]:
                    # The 1x1 convolution nearest to a map from ``features`` [B, C, H, W] to ``target`` [B, D, H, W].
                    inputs, outputs = (values.double().movedim(1, -1).flatten(0, 2) for values in (features, target))
                    products = inputs.T @ inputs
                    products += _RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
                    weight = torch.linalg.solve(products, inputs.T @ outputs).T.to(features.dtype)
                    projection = nn.Conv2d(features.shape[1], target.shape[1], 1, bias=False)
                    projection.weight = nn.Parameter(weight[:, :, None, None].contiguous())
                    self.projections[name] = projection


def _last_layer(block: nn.Module) -> nn.Module:
    return list(block.get_submodule("attentions" if hasattr(block, "attentions") else "resnets").children())[-1]
