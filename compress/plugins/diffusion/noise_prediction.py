"""Diffusion in discrete time: z_t = alpha_t x + sigma_t epsilon, alpha_t^2 + sigma_t^2 = 1, with t a row of a table.

x: what is drawn, z: it under noise. B: batch. Levels are [B, 1, ...], so that they multiply [B, ...].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""What a network gives, by diffusers' names: epsilon, x, or v = alpha epsilon - sigma x (Salimans and Ho 2022, 4)."""


class Level(NamedTuple):
    """The shares of the signal and of the noise."""

    alpha: torch.Tensor
    sigma: torch.Tensor


@dataclass(frozen=True)
class NoiseTable:
    """alpha_t^2 of each timestep [T], and ``final`` of what comes behind the last one."""

    squares: torch.Tensor
    final: float = 1.0

    def __len__(self) -> int:
        return len(self.squares)

    def at(self, timesteps: torch.Tensor, axes: int) -> Level:
        """The levels [B, 1, ...] with so many axes of timesteps [B]; one below 0 is behind the last step."""
        squares = torch.cat([self.squares.new_tensor([self.final]), self.squares]).to(timesteps.device)
        square = squares[(timesteps + 1).clamp(min=0)].reshape(-1, *[1] * (axes - 1))
        return Level(square.sqrt(), (1 - square).sqrt())


def noised(clean: torch.Tensor, noise: torch.Tensor, level: Level) -> torch.Tensor:
    """z of x and epsilon [B, ...]."""
    return level.alpha * clean + level.sigma * noise


def clean_of(kind: PredictionType, output: torch.Tensor, noisy: torch.Tensor, level: Level) -> torch.Tensor:
    """x [B, ...] that a network's ``output`` for z means."""
    if kind == "sample":
        return output
    if kind == "epsilon":
        return (noisy - level.sigma * output) / level.alpha
    return level.alpha * noisy - level.sigma * output


def guided(wanted: torch.Tensor, without: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Classifier-free guidance as diffusers has it; ``scale`` is 1 + w of Ho and Salimans (2022, equation 6)."""
    return without + scale * (wanted - without)


def ddim_step(clean: torch.Tensor, noisy: torch.Tensor, here: Level, there: Level) -> torch.Tensor:
    """alpha_s x + sigma_s / sigma_t (z_t - alpha_t x): from z_t to z_s (Song et al. 2021, equation 12)."""
    return there.alpha * clean + there.sigma / here.sigma * (noisy - here.alpha * clean)


def extrapolated(clean: torch.Tensor, before: torch.Tensor, last: Level, here: Level, there: Level) -> torch.Tensor:
    """The x that makes a `ddim_step` one of second order, of x here and at the ``last`` step ``before``.

    DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): x + (x - x_last) h / (2 h_last), steps being those of
    log(alpha / sigma). Where nothing is left of the noise, x itself.
    """
    past, now, after = (torch.log(level.alpha / level.sigma) for level in (last, here, there))
    share = (after - now) / (2 * (now - past))
    return clean + torch.where(there.sigma > 0, share, 0.0) * (clean - before)


def progressive_target(noisy: torch.Tensor, reached: torch.Tensor, here: Level, there: Level) -> torch.Tensor:
    """The x by which one DDIM step from z_t arrives at ``reached``, where two of the teacher's did.

    Salimans and Ho 2022, algorithm 2: (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t).
    """
    ratio = there.sigma / here.sigma
    return (reached - ratio * noisy) / (there.alpha - ratio * here.alpha)


def truncated_snr(level: Level) -> torch.Tensor:
    """max(alpha^2 / sigma^2, 1), the weight of an error of x (Salimans and Ho 2022, equation 9)."""
    return (level.alpha / level.sigma).square().clamp(min=1)


def boundary_scalings(
    timesteps: torch.Tensor, axes: int, scaling: float = 10.0, deviation: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out, [B, 1, ...], with f(z, t) = c_skip z + c_out x: at t = 0 f is z itself.

    Luo et al. 2023, equation 9, with timesteps [B] multiplied by ``scaling``, as diffusers' LCMScheduler does.
    """
    scaled = (timesteps.double() * scaling).reshape(-1, *[1] * (axes - 1))
    whole = scaled.square() + deviation**2
    return (deviation**2 / whole).float(), (scaled / whole.sqrt()).float()


def pseudo_huber(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each example, averaged; c = 0.00054 sqrt(d) for d numbers (Song and Dhariwal 2024).

    Section 3.3 there: outliers count less than in a square.
    """
    apart = (found - wanted).flatten(1)
    constant = 0.00054 * math.sqrt(apart.shape[1])
    return ((apart.square().sum(1) + constant**2).sqrt() - constant).mean()


def guidance_embedding(scales: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids [B, width] of guidance scales [B], as diffusers' LatentConsistencyModelPipeline has them."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=scales.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * (scales - 1)[:, None] * rates
    found = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(found, (0, width % 2))
