"""Distillation of a pipeline's VAE into a small convolutional autoencoder.

It is diffusers' `AutoencoderTiny` (TAESD's layout) rather than a narrower `AutoencoderKL`, which has one list of widths
for encoder and decoder, attention in the middle of both, and group norms. The pipelines of diffusers and optimum divide
latents by the config's ``scaling_factor`` and call ``decode`` of any VAE class. The small autoencoder is trained on
latents as the UNet has them, with a ``scaling_factor`` of 1, so that pipelines open without changes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compress.models.model import TorchModel
from compress.numerics.losses import feature_distance
from compress.plugins.diffusion.component_costs import cost_rows, costs_of_component, count_parameters
from compress.plugins.diffusion.noised_latents import (
    LATENTS,
    VALIDATION,
    encode_images,
    load_images,
    sample_rows,
    unscale_latents,
)
from compress.plugins.diffusion.pipeline_model import VAE, GeneratorModel, import_diffusers
from compress.plugins.diffusion.stage_settings import AutoencoderDistillation
from compress.stages.training import processes
from compress.stages.training.checkpoint import TrainingCheckpoint
from compress.stages.training.length import Length
from compress.stages.training.loop import Trainee, train
from compress.tasks.inference import tensors
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    from compress.stages.base import Context

PIXELS = "pixel_values"
_JUDGED_IMAGES = 64
"""Number of validation images that judge an epoch."""
_FEATURE_WEIGHT, _ENCODER_WEIGHT = 0.5, 0.1
"""Weights of the loss on features of decoded images, and on latents of the encoder, which generation does not use."""


def image_examples(vae: AutoencoderKL, images: np.ndarray) -> Examples:
    """Return training examples of images [n, channels, H, W] from -1 to 1 with their latents."""
    latents = encode_images(vae, images)
    inputs = [{PIXELS: image, LATENTS: latent} for image, latent in zip(images, latents, strict=True)]
    return Examples(inputs, {PIXELS: None, LATENTS: None})


def build_tiny_autoencoder(vae: AutoencoderKL, settings: AutoencoderDistillation, seed: int) -> AutoencoderTiny:
    """Build an `AutoencoderTiny` for the images and latents of ``vae``, with random weights of a seed.

    Raises:
        StageError: ``vae`` is no `AutoencoderKL`.
    """
    diffusers = import_diffusers()
    if not isinstance(vae, diffusers.AutoencoderKL):
        raise StageError(
            f"A {type(vae).__name__} cannot be distilled into a small decoder.",
            expected="an AutoencoderKL, whose decoder is called with one tensor of latents",
            hint="leave the stage out",
        )
    config, stages = vae.config, len(vae.config.block_out_channels)
    torch.manual_seed(seed)
    return diffusers.AutoencoderTiny(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(settings.width,) * stages,
        decoder_block_out_channels=(settings.width,) * stages,
        num_encoder_blocks=(1, *(settings.layers,) * (stages - 1)),
        num_decoder_blocks=(*(settings.layers,) * (stages - 1), 1),
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def distill_autoencoder(
    settings: AutoencoderDistillation, teacher: TorchModel, model: TorchModel, context: Context
) -> GeneratorModel:
    """Return ``model`` with a small autoencoder instead of its VAE, trained by that of ``teacher``.

    Args:
        settings: Settings of the stage.
        teacher: Model whose VAE is the teacher.
        model: Model whose VAE is replaced, in place.
        context: Context of the stage.
    """
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    vae = teacher.parts[VAE]
    examples = image_examples(vae, load_images(teacher, context))
    held_out = None
    if VALIDATION in context.data.splits:
        indices = sample_rows(context, VALIDATION, _JUDGED_IMAGES)
        held_out = image_examples(vae, load_images(teacher, context, VALIDATION, indices))
    model.replace_part(VAE, train_tiny_autoencoder(vae, examples, held_out, settings, context))
    return model


def train_tiny_autoencoder(
    vae: AutoencoderKL,
    examples: Examples,
    held_out: Examples | None,
    settings: AutoencoderDistillation,
    context: Context,
) -> AutoencoderTiny:
    """Train an autoencoder that decodes as ``vae`` does. A killed training continues from its checkpoint.

    Args:
        vae: Teacher.
        examples: `image_examples` of the train split.
        held_out: Those of the validation split, which judge each epoch.
        settings: Settings of the stage.
        context: Context of the stage.

    Raises:
        StageError: ``vae`` is no `AutoencoderKL`.
    """
    small = build_tiny_autoencoder(vae, settings, context.seed)
    vae.eval().requires_grad_(False)
    batches = -(-len(examples) // settings.batch_size)
    trainee = Trainee(
        _EncoderAndDecoder(small),
        examples,
        partial(autoencoder_loss, vae),
        validate=None if held_out is None else lambda: decoding_error(vae, small, held_out),
        validates_loss=True,
        length=Length(max(1, round(settings.epochs * batches)), settings.seconds),
        kept=None if processes.num_processes() > 1 else TrainingCheckpoint(context.scratch),
        stopped=context.note,
        keep_best=settings.keep_best,
    )
    train(trainee, settings, context.seed, context.progress, "distill_autoencoder")
    note = f"{count_parameters(vae.decoder):,} -> {count_parameters(small.decoder):,} parameters of the decoder"
    side = examples.inputs[0][LATENTS].shape[-1]
    rows = cost_rows(costs_of_component(vae, side), costs_of_component(small, side))
    context.add_table("Decoding, predicted", ("", "before", "after"), rows)
    if held_out is not None:
        error = decoding_error(vae, small, held_out) * 127.5
        note += f"; images differ by {error:.2f} of 255 levels on average"
    context.note(f"distill_autoencoder: {note}")
    return small.eval()


class _EncoderAndDecoder(nn.Module):
    """Module that encodes and decodes in one call, because training in several processes wraps a single module."""

    def __init__(self, small: AutoencoderTiny) -> None:
        super().__init__()
        self.small = small

    def forward(self, images: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.small.encode(images, return_dict=False)[0], self.small.decode(latents, return_dict=False)[0]


def autoencoder_loss(vae: AutoencoderKL, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the L1 and feature distance of decoded images, and the squared error of encoded latents.

    The features are those of the VAE's own encoder, which exist for images of any kind. ``module`` encodes and decodes
    a batch of `image_examples` as the teacher ``vae`` does.
    """
    latents = batch[LATENTS]
    vae.to(latents.device)
    with torch.no_grad():
        target = vae.decode(unscale_latents(vae, latents), return_dict=False)[0]
    encoded, decoded = module(batch[PIXELS], latents)
    loss = nn.functional.l1_loss(decoded.float(), target.float())
    loss = loss + _ENCODER_WEIGHT * nn.functional.mse_loss(encoded.float(), latents)
    with torch.no_grad():
        target_features = encoder_features(vae, target)
    pairs = zip(encoder_features(vae, decoded), target_features, strict=True)
    return loss + _FEATURE_WEIGHT * torch.stack([feature_distance(*pair) for pair in pairs]).mean()


def encoder_features(vae: AutoencoderKL, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of each block of a VAE's encoder for images [B, channels, H, W]."""
    hidden, features = vae.encoder.conv_in(images), []
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
        features.append(hidden.float())
    return features


@torch.no_grad()
def decoding_error(vae: AutoencoderKL, small: AutoencoderTiny, examples: Examples) -> float:
    """Return the mean absolute difference of the images that both decode, from -1 to 1."""
    small.eval()
    total = 0.0
    for index in range(len(examples)):
        latents = tensors(examples, [index])[LATENTS].to(small.device)
        target = vae.to(small.device).decode(unscale_latents(vae, latents), return_dict=False)[0]
        decoded = small.decode(unscale_latents(small, latents), return_dict=False)[0]
        total += float((decoded.clamp(-1, 1) - target.clamp(-1, 1)).abs().mean())
    return total / len(examples)
