"""A small autoencoder of convolutions in the place of a pipeline's VAE, taught by it.

It is an `AutoencoderTiny` of diffusers (TAESD's layout) and no narrower `AutoencoderKL`: that has one list of widths
for encoder and decoder and attention in the middle of both, and keeps group norms, which the small one does without.
diffusers' pipelines, and optimum's for ONNX Runtime, divide latents by the ``scaling_factor`` of the config and call
``decode``, of whichever class the VAE is. The small one is taught on latents as the UNet has them, with a
``scaling_factor`` of 1, so that a pipeline opens as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.models.model import TorchModel
from compress.numerics.losses import feature_distance
from compress.plugins.diffusion.caption_images import VALIDATION, picture_rows, some_places
from compress.plugins.diffusion.component_costs import cost_rows, costs_of, parameters
from compress.plugins.diffusion.noised_latents import LATENTS, encode_pictures, unscaled_latents
from compress.plugins.diffusion.pipeline_model import VAE, GeneratorModel
from compress.plugins.diffusion.sampling_settings import import_diffusers
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

PICTURES = "pixel_values"
_JUDGED = 64
"""Pictures of the validation split that judge an epoch."""


def picture_examples(vae: AutoencoderKL, pictures: np.ndarray) -> Examples:
    """Pictures [n, channels, H, W] from -1 to 1 with their latents, for `train_small_autoencoder`."""
    latents = encode_pictures(vae, pictures)
    inputs = [{PICTURES: one, LATENTS: other} for one, other in zip(pictures, latents, strict=True)]
    return Examples(inputs, {PICTURES: None, LATENTS: None})


def make_small_autoencoder(vae: AutoencoderKL, settings: AutoencoderDistillation, seed: int) -> AutoencoderTiny:
    """An `AutoencoderTiny` for pictures and latents shaped as those of ``vae``, with weights drawn from ``seed``.

    Raises `StageError` for a VAE of another kind than `AutoencoderKL`.
    """
    diffusers = import_diffusers()
    if not isinstance(vae, diffusers.AutoencoderKL):
        raise StageError(
            f"A {type(vae).__name__} teaches no small decoder.",
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


def distill_decoder(
    settings: AutoencoderDistillation, teacher: TorchModel, model: TorchModel, context: Context
) -> GeneratorModel:
    """``model`` with a small autoencoder in the place of its VAE, taught by ``teacher``'s."""
    assert isinstance(model, GeneratorModel) and isinstance(teacher, GeneratorModel)
    vae = teacher.parts[VAE]
    examples = picture_examples(vae, picture_rows(teacher, context))
    held_out = None
    if VALIDATION in context.data.splits:
        places = some_places(context, VALIDATION, _JUDGED)
        held_out = picture_examples(vae, picture_rows(teacher, context, VALIDATION, places))
    model.replace_part(VAE, train_small_autoencoder(vae, examples, held_out, settings, context))
    return model


def train_small_autoencoder(
    vae: AutoencoderKL,
    examples: Examples,
    held_out: Examples | None,
    settings: AutoencoderDistillation,
    context: Context,
) -> AutoencoderTiny:
    """An autoencoder that decodes as ``vae`` does, taught on `picture_examples`; ``held_out`` ones judge every epoch.

    A killed training goes on where it was last kept. Raises `StageError`.
    """
    small = make_small_autoencoder(vae, settings, context.seed)
    vae.eval().requires_grad_(False)
    both = _Both(small)
    batches = -(-len(examples) // settings.batch_size)
    trainee = Trainee(
        both,
        examples,
        AutoencoderTrainer(vae, settings).loss,
        validate=None if held_out is None else lambda: -decoded_distance(vae, small, held_out),
        length=Length(max(1, round(settings.epochs * batches)), settings.seconds),
        kept=None if processes.several() else TrainingCheckpoint(context.scratch),
        stopped=context.note,
        known=small,
        keep_best=settings.keep_best,
    )
    train(trainee, settings, context.seed, context.progress, "distill_autoencoder")
    said = f"{parameters(vae.decoder):,} -> {parameters(small.decoder):,} parameters of the decoder"
    side = examples.inputs[0][LATENTS].shape[-1]
    rows = cost_rows(costs_of(vae, side), costs_of(small, side))
    context.add_table("Decoding, predicted", ("", "before", "after"), rows)
    if held_out is not None:
        said += f"; pictures are off by {decoded_distance(vae, small, held_out) * 127.5:.2f} of 255 levels on average"
    context.note(f"distill_autoencoder: {said}")
    return small.eval()


class _Both(nn.Module):
    """Encodes and decodes in one call, as several processes want it."""

    def __init__(self, small: Any) -> None:
        super().__init__()
        self.small = small

    def forward(self, pictures: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.small.encode(pictures, return_dict=False)[0], self.small.decode(latents, return_dict=False)[0]


class AutoencoderTrainer:
    """L1 and a distance of features between decoded pictures, and the squared error of encoded latents.

    The features are those of the VAE's own encoder behind each of its blocks: they are there for pictures of any kind.
    """

    def __init__(self, vae: AutoencoderKL, settings: AutoencoderDistillation) -> None:
        self.vae = vae
        self.settings = settings

    def loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of a batch of `picture_examples`."""
        weights, latents = self.settings, batch[LATENTS]
        vae = self.vae.to(latents.device)
        with torch.no_grad():
            taught = vae.decode(unscaled_latents(vae, latents), return_dict=False)[0]
        encoded, mine = module(batch[PICTURES], latents)
        loss = nn.functional.l1_loss(mine.float(), taught.float())
        if weights.encoder_weight:
            loss = loss + weights.encoder_weight * nn.functional.mse_loss(encoded.float(), latents)
        if weights.feature_weight:
            with torch.no_grad():
                wanted = encoder_features(vae, taught)
            found = encoder_features(vae, mine)
            distances = [feature_distance(one, other) for one, other in zip(found, wanted, strict=True)]
            loss = loss + weights.feature_weight * torch.stack(distances).mean()
        return loss


def encoder_features(vae: AutoencoderKL, pictures: torch.Tensor) -> list[torch.Tensor]:
    """What each block of a VAE's encoder makes of pictures [B, channels, H, W]."""
    hidden, found = vae.encoder.conv_in(pictures), []
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
        found.append(hidden.float())
    return found


@torch.no_grad()
def decoded_distance(vae: AutoencoderKL, small: Any, examples: Examples) -> float:
    """The mean absolute difference of what both decode, for pictures from -1 to 1."""
    small.eval()
    total = 0.0
    for place in range(len(examples)):
        latents = tensors(examples, [place])[LATENTS].to(small.device)
        taught = vae.to(small.device).decode(unscaled_latents(vae, latents), return_dict=False)[0]
        mine = small.decode(unscaled_latents(small, latents), return_dict=False)[0]
        total += float((mine.clamp(-1, 1) - taught.clamp(-1, 1)).abs().mean())
    return total / len(examples)
