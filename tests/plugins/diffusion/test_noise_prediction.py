"""Steps of diffusion against closed forms of a normal distribution, and against diffusers' own schedulers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compress.plugins.diffusion.noise_prediction import (
    Level,
    NoiseTable,
    PredictionType,
    boundary_scalings,
    clean_of,
    ddim_step,
    guidance_embedding,
    noised,
    progressive_target,
    pseudo_huber,
)

diffusers = pytest.importorskip("diffusers")

MEAN, DEVIATION = 0.7, 0.3


def table(final: float = 1.0) -> NoiseTable:
    return NoiseTable(diffusers.DDIMScheduler(1000).alphas_cumprod.double(), final)


def posterior_mean(noisy: torch.Tensor, level: Level) -> torch.Tensor:
    """E[x | z] of x ~ N(m, s^2): m + alpha s^2 / (alpha^2 s^2 + sigma^2) (z - alpha m)."""
    share = level.alpha * DEVIATION**2 / (level.alpha**2 * DEVIATION**2 + level.sigma**2)
    return MEAN + share * (noisy - level.alpha * MEAN)


def exact(noisy: torch.Tensor, here: Level, there: Level) -> torch.Tensor:
    """The probability flow's solution for x ~ N(m, s^2): z keeps its place in units of its own deviation."""
    deviation_before, after = ((level.alpha**2 * DEVIATION**2 + level.sigma**2).sqrt() for level in (here, there))
    return there.alpha * MEAN + after / deviation_before * (noisy - here.alpha * MEAN)


def walked(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where so many DDIM steps with the exact denoiser arrive, and where the exact solution does."""
    levels, noisy = table(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = [1000 * step // steps - 1 for step in range(steps, -1, -1)]
    latents = noisy
    for start_time, end_time in pairwise(times):
        start_level, other = (levels.at(torch.tensor([time]), 2) for time in (start_time, end_time))
        latents = ddim_step(posterior_mean(latents, start_level), latents, start_level, other)
    return latents, exact(noisy, levels.at(torch.tensor([999]), 2), levels.at(torch.tensor([-1]), 2))


def test_ddim_comes_to_the_exact_solution_as_steps_grow() -> None:
    errors = {steps: float((walked(steps)[0] - walked(steps)[1]).abs().max()) for steps in (10, 100, 1000)}
    assert errors[1000] < 0.01 and errors[10] > 5 * errors[100] > 5 * errors[1000]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_step_is_that_of_diffusers(kind: PredictionType) -> None:
    scheduler = diffusers.DDIMScheduler(
        1000, prediction_type=kind, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False
    )
    scheduler.set_timesteps(8)
    levels = NoiseTable(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))
    noisy, output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    for time in scheduler.timesteps.tolist():
        start_level, end_level = levels.at(torch.tensor([time]), 4), levels.at(torch.tensor([time - 125]), 4)
        stepped = ddim_step(clean_of(kind, output, noisy, start_level), noisy, start_level, end_level)
        expected = scheduler.step(output, time, noisy).prev_sample
        torch.testing.assert_close(stepped, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("time", [999, 749, 249])
def test_one_step_with_the_target_arrives_where_two_of_the_teacher_do(time: int) -> None:
    levels, noisy = table(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    start_level, middle, end_level = (levels.at(torch.tensor([time - less]), 2) for less in (0, 125, 250))
    half = ddim_step(posterior_mean(noisy, start_level), noisy, start_level, middle)
    reached = ddim_step(posterior_mean(half, middle), half, middle, end_level)
    target = progressive_target(noisy, reached, start_level, end_level)
    torch.testing.assert_close(ddim_step(target, noisy, start_level, end_level), reached)
    # Both teachers' steps have a say: neither's own x is the target.
    assert float((target - posterior_mean(noisy, start_level)).abs().max()) > 1e-3


def test_outputs_of_every_kind_mean_the_same() -> None:
    clean, noise = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    level = table().at(torch.tensor([3, 100, 500, 900, 999]), 2)
    noisy = noised(clean, noise, level)
    outputs: dict[PredictionType, torch.Tensor] = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": level.alpha * noise - level.sigma * clean,
    }
    for kind, output in outputs.items():
        torch.testing.assert_close(clean_of(kind, output, noisy, level), clean)


def test_at_the_smallest_timestep_a_consistency_function_is_the_identity() -> None:
    skip, out = boundary_scalings(torch.tensor([0]), 4)
    assert skip.shape == (1, 1, 1, 1) and float(skip) == 1 and float(out) == 0


def test_boundary_scalings_are_those_of_diffusers() -> None:
    scheduler = diffusers.LCMScheduler(timestep_scaling=3.0)
    skip, out = boundary_scalings(torch.arange(1000), 1, 3.0)
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(time) for time in range(1000)]
    torch.testing.assert_close(torch.stack([skip, out], 1), torch.tensor(expected))


def test_guidance_is_embedded_as_diffusers_does_it() -> None:
    """LatentConsistencyModelPipeline has the sinusoids of timesteps, of 1000 (scale - 1)."""
    from diffusers.models.embeddings import get_timestep_embedding

    scales = torch.tensor([1.0, 4.5, 8.0])
    expected = get_timestep_embedding(1000 * (scales - 1), 33, downscale_freq_shift=1)
    torch.testing.assert_close(guidance_embedding(scales, 33), expected, rtol=1e-4, atol=1e-3)


def test_the_pseudo_huber_loss_is_a_square_near_by_and_a_distance_far_off() -> None:
    target = torch.zeros(1, 100)
    constant = 0.00054 * 10
    near, far = torch.full((1, 100), 1e-6), torch.full((1, 100), 10.0)
    assert float(pseudo_huber(near.double(), target.double())) == pytest.approx((1e-5) ** 2 / 2 / constant, rel=1e-3)
    assert float(pseudo_huber(far, target)) == pytest.approx(100 - constant, rel=1e-5)
