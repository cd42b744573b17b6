"""Training data of denoisers: latents of images, embeddings of their captions, and noise at random timesteps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compress.plugins.diffusion.image_metrics import decode_images
from compress.plugins.diffusion.pipeline_model import TEXT_ENCODER, VAE, GeneratorModel, import_diffusers
from compress.plugins.diffusion.sampler import torch_sampler
from compress.plugins.diffusion.scheduler import REFERENCE, ReferenceTrajectory, build_scheduler
from compress.tasks.task import Examples
from compress.utils.errors import DataError, StageError

if TYPE_CHECKING:
    import pyarrow as pa
    from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, SchedulerMixin

    from compress.stages.base import Context

TRAIN, VALIDATION = "train", "validation"
"""Splits that training uses."""
LATENTS, TEXT = "latents", "encoder_hidden_states"
"""Inputs of an example: scaled latents of an image [C, H, W], and hidden states of the text encoder [tokens, width]."""
_IMAGE, _CAPTION = "image", "text"
_NOT_CONDITIONS = frozenset({LATENTS, "index", "labels"})
_BATCH = 32


def load_images(
    model: GeneratorModel, context: Context, split: str = TRAIN, indices: Sequence[int] | None = None
) -> np.ndarray:
    """Load the images of a split, [n, channels, height, width] from -1 to 1.

    Args:
        model: Model that decides the size.
        context: Context of the stage.
        split: Name of the split.
        indices: Rows of the split; all if None.

    Raises:
        DataError: The rows have no images, or a broken one.
    """
    rows = _select_rows(context, split, indices)
    if _IMAGE not in rows.column_names:
        raise DataError(f"The {split} split has no images to train on.", expected=f"a column {_IMAGE!r}")
    levels = decode_images(rows[_IMAGE].to_pylist(), model.processor.image_shape)
    return np.asarray(levels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def encode_split(
    model: GeneratorModel, context: Context, split: str = TRAIN, indices: Sequence[int] | None = None
) -> tuple[Examples, torch.Tensor]:
    """Encode images and captions of a split.

    Args:
        model: Model whose VAE and text encoder are used.
        context: Context of the stage.
        split: Name of the split.
        indices: Rows of the split; all if None.

    Returns:
        The examples, and the hidden states of the empty prompt, [1, tokens, width].

    Raises:
        DataError: The rows have no images, or a broken one.
    """
    latents = encode_images(model.parts[VAE], load_images(model, context, split, indices))
    captions = [str(caption) for caption in _select_rows(context, split, indices)[_CAPTION].to_pylist()]
    states = encode_captions(captions, lambda batch: _hidden_states(model, batch))
    return latent_examples(latents, {TEXT: states}), torch.from_numpy(_hidden_states(model, [""]))


def sample_rows(context: Context, split: str, count: int) -> list[int]:
    """Return ``count`` random rows of a split in order, or all, sampled with the run's seed."""
    order = np.random.default_rng(context.seed).permutation(context.data.split(split).num_rows)
    return [int(row) for row in np.sort(order[:count])]


def reference_trajectory(model: GeneratorModel, context: Context, count: int, steps: int) -> ReferenceTrajectory:
    """Sample a trajectory for captions that are spread over the train split, each from its own noise.

    Args:
        model: Model whose trajectory is sampled.
        context: Context of the stage.
        count: Number of captions.
        steps: Number of steps.

    Raises:
        InputError: DPM-Solver++ 2M does not fit the denoiser.
    """
    captions = context.data.split(TRAIN)[_CAPTION].to_pylist()
    chosen = [captions[index] for index in np.linspace(0, len(captions) - 1, count).round().astype(int)]
    ids = model.processor.ids(chosen)
    noise = np.stack([model.processor.noise(context.seed + index) for index in range(count)])
    sampler = torch_sampler(model)
    scheduler = build_scheduler(sampler.scheduler, REFERENCE, steps)
    reference = replace(sampler, scheduler=scheduler, sampling=replace(sampler.sampling, steps=steps))
    return ReferenceTrajectory(sampler, ids, noise, reference.sample_latents(ids, noise))


def _select_rows(context: Context, split: str, indices: Sequence[int] | None) -> pa.Table:
    rows = context.data.split(split)
    return rows if indices is None else rows.take(list(indices))


@torch.inference_mode()
def _hidden_states(model: GeneratorModel, prompts: Sequence[str]) -> np.ndarray:
    """Return the text encoder's hidden states of prompts, [n, tokens, width]."""
    states = model.parts[TEXT_ENCODER](torch.from_numpy(model.processor.ids(prompts)))[0]
    return np.asarray(states.float().numpy())


def latent_examples(latents: np.ndarray, conditions: Mapping[str, Sequence[np.ndarray]]) -> Examples:
    """Return training examples of latents [n, C, H, W] and n arrays of each condition of the UNet.

    Conditions have the names of the UNet's arguments: `encoder_hidden_states`, `class_labels`. Rows may share an array,
    as those with the same caption do.
    """
    columns: dict[str, Sequence[np.ndarray] | np.ndarray] = {LATENTS: latents, **conditions}
    inputs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Examples(inputs, dict.fromkeys(columns))


@torch.inference_mode()
def encode_images(vae: AutoencoderKL | AutoencoderTiny, images: np.ndarray) -> np.ndarray:
    """Encode images [n, channels, H, W] from -1 to 1 to the scaled latents [n, C, h, w] that a UNet takes."""
    vae.eval()
    latents = []
    for start in range(0, len(images), _BATCH):
        encoded = vae.encode(torch.from_numpy(images[start : start + _BATCH]).to(vae.device, vae.dtype))
        # The mean of an AutoencoderKL's distribution, so that the same image always has the same latents. An
        # AutoencoderTiny has no distribution.
        batch = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        # A VAE's own latents become those of a UNet (Rombach et al. 2022, appendix D.1).
        scaled = (batch - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
        latents.append(scaled.float().cpu().numpy())
    return np.concatenate(latents)


def unscale_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Convert a UNet's latents to those that the VAE decodes, as diffusers' pipelines do."""
    unscaled: torch.Tensor = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return unscaled


def encode_captions(captions: Sequence[str], encode: Callable[[list[str]], np.ndarray]) -> list[np.ndarray]:
    """Return the hidden states [tokens, width] of each caption. ``encode`` is called once for each distinct caption."""
    distinct = list(dict.fromkeys(captions))
    states: dict[str, np.ndarray] = {}
    for start in range(0, len(distinct), _BATCH):
        batch = distinct[start : start + _BATCH]
        states.update(zip(batch, encode(batch), strict=True))
    return [states[caption] for caption in captions]


@dataclass(frozen=True)
class NoisedLatents:
    """Batch of a denoiser.

    ``noised`` is the denoiser's input: ``clean`` with ``noise`` at ``timesteps``. ``target`` is its expected output.
    These are [B, C, H, W], ``timesteps`` [B] int64, and each of the ``conditions`` [B, ...], by the UNet's arguments.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    noised: torch.Tensor
    target: torch.Tensor
    conditions: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class NoiseProcess:
    """Noising of latents by the schedule that a UNet was trained with.

    ``scheduler`` is a DDPMScheduler, whose config names the UNet's prediction type. ``unconditional`` are the
    conditions without a prompt, such as `TEXT` [tokens, width] of the empty one. They replace those of the share
    ``dropped`` of the rows (classifier-free guidance; Ho and Salimans 2022, algorithm 1).
    """

    scheduler: DDPMScheduler
    unconditional: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dropped: float = 0.0

    @classmethod
    def from_scheduler(
        cls, scheduler: SchedulerMixin, unconditional: Mapping[str, torch.Tensor] | None = None, dropped: float = 0.0
    ) -> NoiseProcess:
        """Return the noising that belongs to a pipeline's scheduler.

        Raises:
            StageError: The scheduler has no schedule of betas, such as those of flow matching.
        """
        if "beta_schedule" not in scheduler.config:
            raise StageError(
                f"{type(scheduler).__name__} has no schedule of betas by which noise is added.",
                where="scheduler/scheduler_config.json",
                expected="a scheduler for models trained as DDPM is: DDPMScheduler, DDIMScheduler, "
                "DPMSolverMultistepScheduler, UniPCMultistepScheduler",
                hint="leave the training of the denoiser out",
            )
        return cls(import_diffusers().DDPMScheduler.from_config(scheduler.config), unconditional or {}, dropped)

    @property
    def steps(self) -> int:
        """Number of timesteps of the schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    def sample(
        self,
        batch: Mapping[str, torch.Tensor],
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> NoisedLatents:
        """Add random noise to a batch of `latent_examples`.

        Args:
            batch: Inputs of the examples.
            timesteps: Timesteps, [B] or one number; random if None.
            generator: CPU generator of noise and timesteps; torch's own if None.
        """
        clean = batch[LATENTS]
        rows = len(clean)
        # Random numbers come from the CPU, whose generator state a training checkpoint contains, on every device.
        if timesteps is None:
            timesteps = torch.randint(0, self.steps, (rows,), generator=generator)
        timesteps = timesteps.to(clean.device).expand(rows)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
        conditions = {name: value for name, value in batch.items() if name not in _NOT_CONDITIONS}
        if self.dropped:
            is_dropped = (torch.rand(rows, generator=generator) < self.dropped).to(clean.device)
            for name, empty in self.unconditional.items():
                value = conditions[name]
                mask = is_dropped.to(value.device).view(-1, *[1] * (value.ndim - 1))
                conditions[name] = torch.where(mask, empty.to(value.device, value.dtype), value)
        target = noise
        if self.scheduler.config.prediction_type == "sample":
            target = clean
        elif self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(clean, noise, timesteps)
        noised = self.scheduler.add_noise(clean, noise, timesteps)
        return NoisedLatents(clean, noise, timesteps, noised, target, conditions)


def denoise(unet: nn.Module, noised: NoisedLatents) -> torch.Tensor:
    """Return the output [B, C, H, W] of a UNet for noised latents."""
    output: torch.Tensor = unet(noised.noised, noised.timesteps, **noised.conditions, return_dict=False)[0]
    return output


def denoising_losses(unet: nn.Module, noised: NoisedLatents) -> torch.Tensor:
    """Return the mean squared error of each row, [B] (Ho et al. 2020, equation 14)."""
    output = denoise(unet, noised)
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (output.to(dtype) - noised.target.to(dtype)).square().flatten(1).mean(1)
