"""A mixture of normal distributions in the plane, for which the optimal denoiser has a closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

MODES, DEVIATION, RADIUS = 5, 0.1, 1.0
TRAINED = 1000


def centres() -> torch.Tensor:
    """Return the means [modes, 2], which lie on a circle."""
    angles = torch.arange(MODES) * 2 * math.pi / MODES
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


def shares() -> torch.Tensor:
    """Return the mixture weights [modes], which are all different and sum to 1."""
    weights = torch.arange(1, MODES + 1).float()
    return weights / weights.sum()


def points(count: int, seed: int = 0) -> np.ndarray:
    """Return samples [count, 2] of the mixture."""
    drawn = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(shares(), count, replacement=True, generator=drawn)
    drawn_points = centres()[chosen] + DEVIATION * torch.randn(count, 2, generator=drawn)
    return drawn_points.numpy()


def scheduler(**fields: Any) -> Any:
    """Return the scheduler of the exact teacher, with v prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        TRAINED, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, **fields
    )


class ExactDenoiser(nn.Module):
    """The optimal denoiser, which predicts v from the posterior mean.

    E[x | z] = sum_k r_k (m_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (z - alpha m_k))
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("squares", scheduler().alphas_cumprod)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        """Return v [B, 2] at timesteps [B]."""
        square = self.get_buffer("squares")[timestep].reshape(-1, 1)
        alpha, sigma = square.sqrt(), (1 - square).sqrt()
        variance = square * DEVIATION**2 + sigma**2
        offsets = sample[:, None] - alpha[:, :, None] * centres()
        likely = shares().log() - offsets.square().sum(2) / (2 * variance)
        means = centres() + (alpha * DEVIATION**2 / variance)[:, :, None] * offsets
        clean = (likely.softmax(1)[:, :, None] * means).sum(1)
        return ((alpha * sample - clean) / sigma,)


class SmallDenoiser(nn.Module):
    """A trainable denoiser: three linear layers over the point and sinusoidal features of the timestep."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)),
            *(nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        """Return v [B, 2] at timesteps [B]."""
        relative_time = timestep.float().reshape(-1, 1).expand(len(sample), 1) / TRAINED
        angles = relative_time * 2.0 ** torch.arange(8) * math.pi / 2
        return (self.layers(torch.cat([sample, angles.sin(), angles.cos()], 1)),)


@torch.no_grad()
def drawn(network: nn.Module, made: Any, steps: int, noise: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return the samples [n, 2] that a diffusers scheduler computes from noise [n, 2] in ``steps`` steps."""
    made = type(made).from_config(made.config)
    made.set_timesteps(steps)
    options = {"generator": torch.Generator().manual_seed(seed)} if "LCM" in type(made).__name__ else {}
    latents = noise * made.init_noise_sigma
    for time in made.timesteps:
        given = made.scale_model_input(latents, time)
        output = network(given, time.round().long().expand(len(noise)), return_dict=False)[0]
        latents = made.step(output, time, latents, **options).prev_sample
    return latents
