"""Latents with noise at random timesteps, beside what the denoiser is told of them: what every lesson of one reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.plugins.diffusion.sampling_settings import import_diffusers
from compress.tasks.task import Examples
from compress.utils.errors import StageError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin


LATENTS, TEXT = "latents", "encoder_hidden_states"
"""Inputs of an example: a picture's scaled latents [C, H, W], and the text encoder's states [tokens, width]."""
_ADDED = frozenset({"text_embeds", "time_ids"})
"""What SDXL's UNet takes as ``added_cond_kwargs``."""
_NOT_CONDITIONS = frozenset({LATENTS, "index", "labels"})
_ENCODED_AT_ONCE = 32


def latent_examples(latents: np.ndarray, conditions: Mapping[str, Sequence[np.ndarray]]) -> Examples:
    """Examples for `training.loop.train`: ``latents`` [n, C, H, W], and n arrays of each of the UNet's ``conditions``.

    Conditions go by the names of the UNet's arguments: `encoder_hidden_states`, `class_labels`. Rows may share an
    array, as those of one caption do.
    """
    columns: dict[str, Any] = {LATENTS: latents, **conditions}
    inputs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Examples(inputs, dict.fromkeys(columns))


@torch.inference_mode()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """The latents [n, C, h, w] as a UNet takes them, of pictures [n, channels, H, W] from -1 to 1.

    Each is the mean of what an `AutoencoderKL` holds possible, so that the same picture gives the same latents, or
    what an `AutoencoderTiny` makes of it; shifted and scaled as the VAE's config says.
    """
    vae.eval()
    found = []
    for start in range(0, len(pictures), _ENCODED_AT_ONCE):
        batch = torch.from_numpy(pictures[start : start + _ENCODED_AT_ONCE]).to(vae.device, vae.dtype)
        encoded = vae.encode(batch)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        found.append(scaled_latents(vae, latents).float().cpu().numpy())
    return np.concatenate(found)


def scaled_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """A VAE's own latents as a UNet takes them (Rombach et al. 2022, appendix D.1)."""
    scaled: torch.Tensor = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled


def unscaled_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """A UNet's latents as the VAE's decoder takes them: `scaled_latents` undone, as diffusers' pipelines do it."""
    unscaled: torch.Tensor = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return unscaled


def caption_states(captions: Sequence[str], encode: Callable[[list[str]], np.ndarray]) -> list[np.ndarray]:
    """The states [tokens, width] of each caption; ``encode`` makes [n, tokens, width] of n captions that differ."""
    distinct = list(dict.fromkeys(captions))
    states: dict[str, np.ndarray] = {}
    for start in range(0, len(distinct), _ENCODED_AT_ONCE):
        some = distinct[start : start + _ENCODED_AT_ONCE]
        states.update(zip(some, encode(some), strict=True))
    return [states[caption] for caption in captions]


@dataclass(frozen=True)
class NoisedLatents:
    """``noised`` is what the UNet sees of ``clean`` with ``noise`` at ``timesteps``.

    ``clean``, ``noise``, ``noised`` and ``target``, what it should answer, are [B, C, H, W], ``timesteps`` [B] int64,
    and ``conditions`` [B, ...] each, by the names of the UNet's arguments.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    noised: torch.Tensor
    target: torch.Tensor
    conditions: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Noising:
    """How noise is added: by the schedule that the UNet was trained on.

    ``scheduler`` is DDPM's, whose config says what the UNet predicts. ``unconditional`` has what conditions are without
    a prompt, as `TEXT` [tokens, width] of the empty one, for the share ``dropped`` of the rows (Ho and Salimans 2022,
    algorithm 1).
    """

    scheduler: SchedulerMixin
    unconditional: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dropped: float = 0.0

    @classmethod
    def of(
        cls, scheduler: SchedulerMixin, unconditional: Mapping[str, torch.Tensor] | None = None, dropped: float = 0.0
    ) -> Noising:
        """The noising that belongs to a pipeline's scheduler, whatever steps that takes.

        Raises `StageError` for a scheduler without a schedule of betas, as those of flow matching are.
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
        """How many timesteps the schedule has."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def prediction(self) -> str:
        """What the UNet predicts: `epsilon`, `v_prediction` or `sample`."""
        return str(self.scheduler.config.prediction_type)

    def draw(
        self,
        batch: Mapping[str, torch.Tensor],
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> NoisedLatents:
        """Noise for a batch of `latent_examples`, and timesteps where none are given [B] or as one number.

        They are drawn by this machine's processor, whose random state a kept training keeps, wherever the batch is.
        """
        clean = batch[LATENTS]
        rows = len(clean)
        if timesteps is None:
            timesteps = torch.randint(0, self.steps, (rows,), generator=generator)
        timesteps = timesteps.to(clean.device).expand(rows)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
        conditions = {name: value for name, value in batch.items() if name not in _NOT_CONDITIONS}
        if self.dropped:
            emptied = (torch.rand(rows, generator=generator) < self.dropped).to(clean.device)
            conditions = self._without(conditions, emptied)
        noised = self.scheduler.add_noise(clean, noise, timesteps)
        return NoisedLatents(clean, noise, timesteps, noised, self._target(clean, noise, timesteps), conditions)

    def _without(self, conditions: Mapping[str, torch.Tensor], emptied: torch.Tensor) -> dict[str, torch.Tensor]:
        made = dict(conditions)
        for name, empty in self.unconditional.items():
            value = made[name]
            chosen = emptied.to(value.device).view(-1, *[1] * (value.ndim - 1))
            made[name] = torch.where(chosen, empty.to(value.device, value.dtype), value)
        return made

    def _target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction == "sample":
            return clean
        if self.prediction == "v_prediction":
            velocity: torch.Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
            return velocity
        return noise


def denoise(unet: nn.Module, noised: NoisedLatents) -> torch.Tensor:
    """What ``unet`` answers to noised latents, [B, C, H, W]: a `UNet2DConditionModel`, or a `UNet2DModel`."""
    arguments = {name: value for name, value in noised.conditions.items() if name not in _ADDED}
    added = {name: value for name, value in noised.conditions.items() if name in _ADDED}
    if added:
        arguments["added_cond_kwargs"] = added  # type: ignore[assignment]
    answer: torch.Tensor = unet(noised.noised, noised.timesteps, **arguments, return_dict=False)[0]
    return answer


def denoising_losses(unet: nn.Module, noised: NoisedLatents) -> torch.Tensor:
    """The mean squared error of each row, [B] (Ho et al. 2020, equation 14)."""
    answer = denoise(unet, noised)
    exact = torch.promote_types(answer.dtype, torch.float32)
    return (answer.to(exact) - noised.target.to(exact)).square().flatten(1).mean(1)
