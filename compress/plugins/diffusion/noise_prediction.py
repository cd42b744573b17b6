"""Formulas of diffusion in discrete time: z_t = alpha_t x + sigma_t epsilon, with alpha_t^2 + sigma_t^2 = 1.

x: clean latents, z: noisy latents, epsilon: noise, t: timestep, B: batch. Noise levels are [B, 1, ...], so that they
multiply [B, ...].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""Output of a denoiser, by diffusers' names: epsilon, x, or v = alpha epsilon - sigma x (Salimans and Ho 2022, 4)."""


class NoiseLevel(NamedTuple):
    """Weights of the signal and of the noise at a timestep."""

    alpha: torch.Tensor
    sigma: torch.Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Values of alpha_t^2 at each timestep [T], and ``final`` for the level after the last step."""

    squares: torch.Tensor
    final: float = 1.0

    def __len__(self) -> int:
        return len(self.squares)

    def levels(self, timesteps: torch.Tensor, axes: int) -> NoiseLevel:
        """Return the levels of timesteps [B] with ``axes`` axes, [B, 1, ...]. A negative timestep is after the last."""
        squares = torch.cat([self.squares.new_tensor([self.final]), self.squares]).to(timesteps.device)
        square = squares[(timesteps + 1).clamp(min=0)].reshape(-1, *[1] * (axes - 1))
        return NoiseLevel(square.sqrt(), (1 - square).sqrt())


def add_noise(clean: torch.Tensor, noise: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """Return z of x and epsilon, [B, ...]."""
    return level.alpha * clean + level.sigma * noise


def predicted_clean(
    prediction_type: PredictionType, output: torch.Tensor, noisy: torch.Tensor, level: NoiseLevel
) -> torch.Tensor:
    """Return the x [B, ...] that a denoiser's output for z stands for.

    Args:
        prediction_type: Quantity that the denoiser predicts.
        output: Output of the denoiser, [B, ...].
        noisy: Noisy latents z, [B, ...].
        level: Noise level of each row.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - level.sigma * output) / level.alpha
    return level.alpha * noisy - level.sigma * output


def apply_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Apply classifier-free guidance as diffusers does: ``scale`` is 1 + w of Ho and Salimans (2022, equation 6)."""
    return unconditional + scale * (conditional - unconditional)


def ddim_step(clean: torch.Tensor, noisy: torch.Tensor, start: NoiseLevel, end: NoiseLevel) -> torch.Tensor:
    """Return z_s = alpha_s x + sigma_s / sigma_t (z_t - alpha_t x) (Song et al. 2021, equation 12).

    Args:
        clean: Predicted x, [B, ...].
        noisy: Noisy latents z_t, [B, ...].
        start: Level of t.
        end: Level of s, the next timestep.
    """
    return end.alpha * clean + end.sigma / start.sigma * (noisy - start.alpha * clean)


def extrapolate(
    clean: torch.Tensor, previous_clean: torch.Tensor, previous: NoiseLevel, start: NoiseLevel, end: NoiseLevel
) -> torch.Tensor:
    """Return the x with which a `ddim_step` is of second order (DPM-Solver++ 2M; Lu et al. 2022, algorithm 2).

    x + (x - x_previous) h / (2 h_previous), where h are steps of log(alpha / sigma). If no noise is left at the end of
    the step, x itself.

    Args:
        clean: x predicted at this step.
        previous_clean: x predicted at the previous step.
        previous: Level at the start of the previous step.
        start: Level at the start of this step.
        end: Level at the end of this step.
    """
    past, now, after = (torch.log(level.alpha / level.sigma) for level in (previous, start, end))
    share = (after - now) / (2 * (now - past))
    return clean + torch.where(end.sigma > 0, share, 0.0) * (clean - previous_clean)


def progressive_target(noisy: torch.Tensor, reached: torch.Tensor, start: NoiseLevel, end: NoiseLevel) -> torch.Tensor:
    """Return the x with which one DDIM step from z_t arrives where several steps of the teacher did.

    Salimans and Ho 2022, algorithm 2: (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t).

    Args:
        noisy: Noisy latents z_t, [B, ...].
        reached: Latents z_s that the teacher reaches.
        start: Level of t.
        end: Level of s.
    """
    ratio = end.sigma / start.sigma
    return (reached - ratio * noisy) / (end.alpha - ratio * start.alpha)


def truncated_snr(level: NoiseLevel) -> torch.Tensor:
    """Return max(alpha^2 / sigma^2, 1), the weight of an error of x (Salimans and Ho 2022, equation 9)."""
    return (level.alpha / level.sigma).square().clamp(min=1)


def boundary_scalings(
    timesteps: torch.Tensor, axes: int, scaling: float = 10.0, deviation: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c_skip and c_out [B, 1, ...] of f(z, t) = c_skip z + c_out x, so that f is z at t = 0.

    Luo et al. 2023, equation 9.

    Args:
        timesteps: Timesteps, [B].
        axes: Number of axes of the result.
        scaling: Factor on timesteps, as in diffusers' LCMScheduler.
        deviation: Standard deviation of the data.
    """
    scaled = (timesteps.double() * scaling).reshape(-1, *[1] * (axes - 1))
    total = scaled.square() + deviation**2
    return (deviation**2 / total).float(), (scaled / total.sqrt()).float()


def pseudo_huber(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return sqrt(|a - b|^2 + c^2) - c of each example, averaged, with c = 0.00054 sqrt(d) for d values.

    Outliers count less than in a squared error (Song and Dhariwal 2024, section 3.3).
    """
    difference = (predicted - target).flatten(1)
    constant = 0.00054 * math.sqrt(difference.shape[1])
    return ((difference.square().sum(1) + constant**2).sqrt() - constant).mean()


def guidance_embedding(scales: torch.Tensor, width: int) -> torch.Tensor:
    """Return sinusoids [B, width] of guidance scales [B], as in diffusers' LatentConsistencyModelPipeline."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=scales.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * (scales - 1)[:, None] * rates
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
